# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Product-key retrieval in C against `product_key_topk`, which `test_product_key_retrieval.py` holds against brute force,
and what it selects against stable sorts: bit for bit, whatever the scores.
"""

import pytest
import torch
from kernel_cases import retrieve_as_compiled_with
from retrieval_tests import SCORES, RetrievalTests, best, random_inputs

from modeling_peer.experts import expert_cell, expert_index
from modeling_peer.ops.kernels_cpu import CpuKernels


each_number_of_threads = pytest.mark.parametrize("threads", [1, 2], ids=["one_thread", "two_threads"], indirect=True)

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
HALF_SIZES = [1, 3, 15, 16, 17, 33, 100, 128]


def assert_gradients_equal_literal_ones(num_sets, half_size):
    """Of any experts, which share rows and columns, and one of which may be there twice."""
    torch.manual_seed(half_size)
    size, k = 12, 9
    queries, sub_keys = random_inputs(21, 3, num_sets, size, half_size)
    indices, gradient = torch.randint(0, size**2, (21, 3, k)), torch.randn(21, 3, k)
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


class TestRetrieval(RetrievalTests):
    kernels = "cpu"

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @each_number_of_threads
    def test_equals_the_reference(self, threads, shape):
        self.assert_equals_the_reference(*shape[:-1], k=shape[-1])

    @pytest.mark.parametrize("num_sets", [1, 3])
    @pytest.mark.parametrize("half_size", HALF_SIZES)
    @each_number_of_threads
    def test_gradients(self, threads, half_size, num_sets):
        assert_gradients_equal_literal_ones(num_sets, half_size)


PROCESSORS = {
    "this_one": "",
    "without_avx512": "-mno-avx512f",
    "without_avx": "-mno-avx512f -mno-avx2 -mno-avx",
    "of_another_kind": "-mno-avx512f -mno-avx2 -mno-avx -U__SSE2__",
}


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


def literal_retrieval(queries, sub_keys, k):
    """Indices and scores: a stable sort of each half, and one of the pairs that can be among the k best."""
    scores = queries * sub_keys.squeeze(-1) + 0.0  # the sum of one product starts at zero
    values, places = best(scores, k)
    pairs = [(i, j) for i in range(k) for j in range(k // (i + 1))]
    rows, columns = torch.tensor(pairs).T
    top_scores, pair = best(values[..., 0, :][..., rows] + values[..., 1, :][..., columns], k)
    row, column = (places[..., half, :].gather(-1, ranks[pair]) for half, ranks in enumerate((rows, columns)))
    return expert_index(row, column), top_scores


# √N and k: around multiples of the width of registers and of what is compared at a time, and all sub-keys.
SIZES = [(1, 1), (3, 3), (7, 4), (16, 16), (17, 5), (33, 16), (33, 33), (65, 17), (96, 32)]
SIZES += [(128, 16), (256, 16), (256, 33), (257, 128), (300, 300), (1024, 16)]


class TestProcessors(RetrievalTests):
    kernels = "cpu"

    @pytest.fixture(scope="class", params=PROCESSORS.values(), ids=PROCESSORS, autouse=True)
    def processor(self, request, tmp_path_factory):
        with pytest.MonkeyPatch.context() as patch:
            if request.param:
                retrieve_as_compiled_with(request.param, patch, tmp_path_factory.mktemp("home"))
            yield

    def test_equal_the_reference(self):
        for *sizes, k in SHAPES:
            self.assert_equals_the_reference(*sizes, k=k)
        for half_size in HALF_SIZES:
            assert_gradients_equal_literal_ones(1, half_size)

    @pytest.mark.parametrize("size, k", SIZES, ids=str)
    @pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
    def test_equals_stable_sorts(self, scores, size, k):
        """
        Queries are powers of two and sub-keys have one element, so that scores are the sub-keys themselves, and any
        scores can be given.
        """
        torch.manual_seed(size * k)
        for num_sets, num_tokens in ((1, 7), (3, 5)):
            sub_keys = scores((num_sets, 2, size, 1))
            queries = 2.0 ** torch.randint(-1, 2, (num_tokens, 3, 2, 1))
            indices, top_scores = CpuKernels.retrieve(queries, sub_keys, k)
            expected_indices, expected_scores = literal_retrieval(queries, sub_keys, k)
            assert torch.equal(bits(top_scores), bits(expected_scores))
            assert torch.equal(indices, expected_indices)
