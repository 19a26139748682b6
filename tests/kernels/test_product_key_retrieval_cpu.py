# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Product-key retrieval in C against `product_key_topk`, which `test_product_key_retrieval.py` holds against brute force.
"""

from functools import partial

import pytest
import torch
from kernel_cases import retrieve_as_compiled_with

from modeling_peer.experts import expert_cell, expert_index, retrieve
from modeling_peer.ops.kernels_cpu import CpuKernels
from modeling_peer.ops.retrieval import retrieve_on_kernels


retrieve_on_cpu = partial(retrieve_on_kernels, kernels="cpu")


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# tokens, heads, sets of sub-keys, √N, d_k / 2, k
SHAPES = [
    (0, 2, 1, 6, 4, 2),
    (1, 8, 1, 256, 128, 16),
    (33, 8, 8, 100, 20, 16),
    (64, 3, 3, 37, 5, 37),
    (100, 1, 1, 300, 16, 1),
    (50, 2, 1, 512, 64, 128),
    (3, 1, 1, 1, 1, 1),
]


def assert_equals_the_reference(num_tokens, num_heads, num_sets, size, half_size, k):
    generator = torch.Generator().manual_seed(num_tokens)
    queries = torch.randn(num_tokens, num_heads, 2, half_size, generator=generator).requires_grad_()
    sub_keys = torch.randn(num_sets, 2, size, half_size, generator=generator).requires_grad_()
    indices, scores = retrieve_on_cpu(queries, sub_keys, k)
    exact = [x.detach().double().requires_grad_() for x in (queries, sub_keys)]
    exact_indices, exact_scores = retrieve(*exact, k)
    assert torch.equal(indices, exact_indices)
    torch.testing.assert_close(scores.double(), exact_scores, rtol=1e-5, atol=1e-5)
    direction = torch.randn(scores.shape, generator=generator)
    actual = torch.autograd.grad(scores, (queries, sub_keys), direction)
    expected = torch.autograd.grad(exact_scores, exact, direction.double())
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


HALF_SIZES = [1, 3, 15, 16, 17, 33, 100, 128]


def assert_gradients_equal_literal_ones(num_sets, half_size):
    """Of any experts, which share rows and columns, and one of which may be there twice."""
    size, k = 12, 9
    generator = torch.Generator().manual_seed(half_size)
    queries = torch.randn(21, 3, 2, half_size, generator=generator)
    sub_keys = torch.randn(num_sets, 2, size, half_size, generator=generator)
    indices = torch.randint(0, size**2, (21, 3, k), generator=generator)
    gradient = torch.randn(21, 3, k, generator=generator)
    exact = [x.double().requires_grad_() for x in (queries, sub_keys)]
    cells = torch.stack(expert_cell(indices), dim=2)  # [tokens, heads, 2, k]
    sets, halves = torch.arange(3)[:, None, None] % num_sets, torch.arange(2)[:, None]
    keys = exact[1][sets, halves, cells]  # [tokens, heads, 2, k, half_size]
    scores = torch.einsum("thpc,thpkc->thk", exact[0], keys)
    expected = torch.autograd.grad(scores, exact, gradient.double())
    found = CpuKernels.retrieval_gradients(gradient, indices, queries, sub_keys)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=2e-5)
    # Alone or together, now or later: to the bit.
    for wanted in ((True, True), (True, False), (False, True)):
        again = CpuKernels.retrieval_gradients(gradient, indices, queries, sub_keys, wanted)
        for x, y, is_wanted in zip(again, found, wanted, strict=True):
            assert torch.equal(x, y) if is_wanted else not x.numel()


class TestRetrieval:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_equals_the_reference(self, threads, shape):
        assert_equals_the_reference(*shape)

    @pytest.mark.parametrize("flags", ["-mno-avx512f", "-mno-avx512f -mno-avx2 -mno-avx"])
    def test_on_processors_with_narrower_registers(self, flags, monkeypatch, tmp_path):
        retrieve_as_compiled_with(flags, monkeypatch, tmp_path)
        for shape in SHAPES:
            assert_equals_the_reference(*shape)
        for half_size in HALF_SIZES:
            assert_gradients_equal_literal_ones(1, half_size)

    def test_ties(self):
        """Any of equal experts may be selected; none twice, and none that is worse."""
        queries = torch.randint(0, 2, (50, 3, 2, 4)).float()
        sub_keys = torch.randint(0, 2, (1, 2, 40, 4)).float()
        indices, scores = retrieve_on_cpu(queries, sub_keys, 8)
        assert torch.equal(scores, retrieve(queries, sub_keys, 8)[1])
        rows, columns = expert_cell(indices)
        assert torch.equal(expert_index(rows, columns), indices)
        halves = torch.einsum("thpc,pnc->thpn", queries, sub_keys[0])
        assert torch.equal(scores, halves[:, :, 0].gather(-1, rows) + halves[:, :, 1].gather(-1, columns))
        assert all(len(set(row.tolist())) == 8 for row in indices.flatten(0, 1))

    def test_not_a_number_is_seen(self):
        queries, sub_keys = torch.randn(4, 2, 2, 3), torch.randn(1, 2, 37, 3)
        queries[1, 0] = float("nan")
        indices, scores = retrieve_on_cpu(queries, sub_keys, 5)
        assert indices.min() >= 0
        assert indices.max() < 37**2
        weights = scores.softmax(-1)
        assert weights[1, 0].isnan().any()
        assert weights[0].isfinite().all()

    @pytest.mark.parametrize("query", [3e38, float("inf"), float("nan")])
    def test_opposite_infinities(self, query):
        """The sum of a pair may be NaN though neither of its scores is."""
        queries, sub_keys = torch.full((1, 1, 2, 2), query), torch.rand(1, 2, 256, 2) * 5 + 1
        sub_keys[0, 1] *= -1
        indices, scores = retrieve_on_cpu(queries, sub_keys, 16)
        assert indices.min() >= 0
        assert indices.max() < 256**2
        assert scores.softmax(-1).isnan().any()

    @pytest.mark.parametrize("num_sets", [1, 3])
    @pytest.mark.parametrize("half_size", HALF_SIZES)
    def test_gradients(self, threads, half_size, num_sets):
        assert_gradients_equal_literal_ones(num_sets, half_size)

    @pytest.mark.parametrize("frozen", [0, 1], ids=["queries", "sub_keys"])
    def test_what_is_frozen_gets_no_gradient(self, frozen, monkeypatch):
        """Nor is it computed."""
        computed = []

        def gradients(*arguments):
            computed.append([each.numel() > 0 for each in retrieval_gradients(*arguments)])
            return retrieval_gradients(*arguments)

        retrieval_gradients = CpuKernels.retrieval_gradients
        monkeypatch.setattr(CpuKernels, "retrieval_gradients", staticmethod(gradients))
        leaves = [torch.randn(9, 2, 2, 8, requires_grad=True), torch.randn(2, 2, 6, 8, requires_grad=True)]
        _, scores = retrieve_on_cpu(*leaves, 3)
        gradient = torch.randn_like(scores)
        expected = torch.autograd.grad(scores, leaves, gradient)[1 - frozen]
        leaves[frozen].requires_grad_(False)
        retrieve_on_cpu(*leaves, 3)[1].backward(gradient)
        assert leaves[frozen].grad is None
        assert torch.equal(leaves[1 - frozen].grad, expected)
        assert computed == [[True, True], [which != frozen for which in range(2)]]

    @pytest.mark.parametrize("index", [-1, 36])
    def test_gradients_of_an_expert_that_does_not_exist(self, index):
        queries, sub_keys = torch.randn(2, 1, 2, 3), torch.randn(1, 2, 6, 3)
        indices = torch.tensor([[[0, 35]], [[index, 1]]])
        with pytest.raises(IndexError, match=f"got {index}"):
            CpuKernels.retrieval_gradients(torch.randn(2, 1, 2), indices, queries, sub_keys)


class TestNothingElseReachesC:
    """What C would misread, it never gets: it checks nothing, and reads what an address points to."""

    QUERIES = torch.randn(5, 2, 2, 8)
    SUB_KEYS = torch.randn(1, 2, 6, 8)

    # Wrong for both functions.
    TENSORS = [
        ({"queries": QUERIES.double()}, "`queries`"),
        ({"queries": QUERIES.to("meta")}, "`queries`"),
        ({"queries": QUERIES.flatten(0, 1)}, "`queries`"),
        ({"queries": torch.randn(5, 2, 3, 8)}, "`queries`"),
        ({"sub_keys": SUB_KEYS.bfloat16()}, "`sub_keys`"),
        ({"sub_keys": SUB_KEYS[0]}, "`sub_keys`"),
        ({"sub_keys": torch.randn(1, 1, 6, 8)}, "`sub_keys`"),
        ({"sub_keys": torch.randn(1, 2, 6, 7)}, "`sub_keys`"),
        ({"sub_keys": torch.randn(3, 2, 6, 8)}, "`sub_keys`"),
        ({"queries": torch.randn(5, 0, 2, 8), "sub_keys": torch.randn(0, 2, 6, 8)}, "`sub_keys`"),
    ]

    def retrieve(self, queries=QUERIES, sub_keys=SUB_KEYS, k=3):
        return CpuKernels.retrieve(queries, sub_keys, k)

    def gradients(self, gradient=None, indices=None, queries=QUERIES, sub_keys=SUB_KEYS):
        indices = torch.zeros(5, 2, 3, dtype=torch.int64) if indices is None else indices
        gradient = torch.zeros(5, 2, 3) if gradient is None else gradient
        return CpuKernels.retrieval_gradients(gradient, indices, queries, sub_keys)

    @pytest.mark.parametrize("changes, message", TENSORS)
    def test_by_either_function(self, changes, message):
        for function in (self.retrieve, self.gradients):
            with pytest.raises(ValueError, match=message):
                function(**changes)

    @pytest.mark.parametrize("k", [-1, 0, 7])
    def test_more_experts_than_sub_keys(self, k):
        for function in (self.retrieve, partial(retrieve_on_cpu, self.QUERIES, self.SUB_KEYS)):
            with pytest.raises(ValueError, match="`num_experts_per_head`"):
                function(k=k)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"gradient": torch.zeros(5, 2, 4)}, "`gradient`"),
            ({"gradient": torch.zeros(5, 2, 3).double()}, "`gradient`"),
            ({"indices": torch.zeros(5, 2, 3)}, "`indices`"),
            ({"indices": torch.zeros(4, 2, 3).long()}, "`indices`"),
            ({"indices": torch.zeros(10, 3).long()}, "`indices`"),
        ],
    )
    def test_by_the_gradients(self, changes, message):
        with pytest.raises(ValueError, match=message):
            self.gradients(**changes)
