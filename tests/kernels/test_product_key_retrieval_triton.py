# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Product-key retrieval in Triton, in its interpreter, against sorting, against C, and against autograd in float64."""

import math

import pytest
import torch
from slow_tests import slow

from modeling_peer.experts import expert_cell, retrieve
from modeling_peer.ops import retrieval_triton
from modeling_peer.ops.kernels_cpu import CpuKernels
from modeling_peer.ops.kernels_triton import TritonKernels
from modeling_peer.ops.retrieval import retrieve_on_kernels
from modeling_peer.ops.retrieval_triton import select


pytestmark = pytest.mark.interpreted

# tokens, heads, sets, √N, d_k / 2, k
SHAPES = [
    (0, 2, 1, 6, 4, 2),
    (1, 1, 1, 256, 32, 16),
    (2, 2, 2, 100, 20, 16),
    (1, 3, 3, 37, 5, 37),
    (5, 1, 1, 300, 16, 1),
    (1, 1, 1, 130, 40, 65),
    (3, 1, 1, 1, 1, 1),
]


def random_inputs(num_tokens, num_heads, num_sets, size, half_size, integers=False):
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = (num_tokens, num_heads, 2, half_size), (num_sets, 2, size, half_size)
    if integers:
        return tuple(torch.randint(-2, 3, shape, generator=generator).float() for shape in shapes)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def best_by_sorting(scores, k):
    """Of equal scores the earlier."""
    values, places = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], places[..., :k]


class TestSelection:
    @pytest.mark.parametrize("size, k", [(1, 1), (5, 3), (16, 16), (37, 37), (64, 16), (200, 1), (1000, 16)])
    def test_is_top_k(self, size, k):
        scores = torch.randn(2, size, generator=torch.Generator().manual_seed(size))
        values, places = select(scores, k)
        expected, expected_places = scores.topk(k)
        assert torch.equal(values, expected)
        assert torch.equal(places.long(), expected_places)

    @pytest.mark.parametrize("size, k", [(5, 3), (64, 16), (300, 20)])
    def test_of_equal_scores_the_earlier(self, size, k):
        scores = torch.randint(-2, 3, (4, size), generator=torch.Generator().manual_seed(size)).float()
        scores[0], scores[1], scores[2, ::2] = 1.0, -math.inf, -0.0
        values, places = select(scores, k)
        expected, expected_places = best_by_sorting(scores, k)
        assert torch.equal(values, expected)
        assert torch.equal(places.long(), expected_places)

    def test_of_infinities_and_of_what_is_no_number(self):
        scores = torch.randn(4, 100)
        scores[0, 40], scores[1, 50], scores[2] = math.inf, math.nan, -math.inf
        scores[2, 99] = -3e38
        values, places = select(scores, 3)
        assert (values[0, 0], places[0, 0]) == (math.inf, 40)
        assert (values[1, 0], places[1, 0]) == (math.inf, 50)
        assert places[2].tolist() == [99, 0, 1]


class TestRetrieval:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_equals_the_reference(self, shape, monkeypatch):
        monkeypatch.setattr(retrieval_triton, "PIECE_SIZE", 2**9)  # of several tokens or heads
        *sizes, k = shape
        queries, sub_keys = (each.requires_grad_() for each in random_inputs(*sizes))
        indices, scores = retrieve_on_kernels(queries, sub_keys, k, "triton")
        exact = [x.detach().double().requires_grad_() for x in (queries, sub_keys)]
        exact_indices, exact_scores = retrieve(*exact, k)
        assert torch.equal(indices, exact_indices)
        torch.testing.assert_close(scores.double(), exact_scores, rtol=1e-5, atol=1e-5)
        direction = torch.randn(scores.shape, generator=torch.Generator().manual_seed(7))
        actual = torch.autograd.grad(scores, (queries, sub_keys), direction)
        expected = torch.autograd.grad(exact_scores, exact, direction.double())
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)

    @slow
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_equals_the_c_kernels_with_ties(self, shape):
        """To the bit: sums of small integers are exact."""
        *sizes, k = shape
        queries, sub_keys = random_inputs(*sizes, integers=True)
        indices, scores = TritonKernels.retrieve(queries, sub_keys, k)
        expected_indices, expected_scores = CpuKernels.retrieve(queries, sub_keys, k)
        assert torch.equal(scores, expected_scores)
        assert torch.equal(indices, expected_indices)

    def test_not_a_number_is_seen(self):
        queries, sub_keys = torch.randn(2, 2, 2, 3), torch.randn(1, 2, 37, 3)
        queries[1, 0] = math.nan
        indices, scores = TritonKernels.retrieve(queries, sub_keys, 5)
        assert indices.min() >= 0 and indices.max() < 37**2
        weights = scores.softmax(-1)
        assert weights[1, 0].isnan().any()
        assert weights[0].isfinite().all()

    @pytest.mark.parametrize("query", [3e38, math.inf, math.nan])
    def test_opposite_infinities(self, query):
        """The sum of a pair may be NaN though neither of its scores is."""
        queries, sub_keys = torch.full((1, 1, 2, 2), query), torch.rand(1, 2, 64, 2) * 5 + 1
        sub_keys[0, 1] *= -1
        indices, scores = TritonKernels.retrieve(queries, sub_keys, 16)
        assert indices.min() >= 0 and indices.max() < 64**2
        assert scores.softmax(-1).isnan().any()

    def test_tensors_need_not_be_contiguous(self):
        queries, sub_keys = random_inputs(3, 2, 2, 20, 8)
        indices, scores = TritonKernels.retrieve(queries, sub_keys, 4)
        transposed = (each.transpose(-1, -2).contiguous().transpose(-1, -2) for each in (queries, sub_keys))
        for actual, expected in zip(TritonKernels.retrieve(*transposed, 4), (indices, scores), strict=True):
            assert torch.equal(actual, expected)

    @pytest.mark.parametrize("k", [0, 7])
    def test_more_experts_than_sub_keys(self, k):
        with pytest.raises(ValueError, match="num_experts_per_head"):
            TritonKernels.retrieve(*random_inputs(2, 1, 1, 6, 3), k)


class TestGradients:
    @pytest.mark.parametrize("frozen", [0, 1], ids=["queries", "sub_keys"])
    def test_what_is_frozen_gets_no_gradient(self, frozen):
        leaves = [each.requires_grad_() for each in random_inputs(5, 2, 2, 6, 8)]
        scores = retrieve_on_kernels(*leaves, 3, "triton")[1]
        gradient = torch.randn_like(scores)
        expected = torch.autograd.grad(scores, leaves, gradient)[1 - frozen]
        leaves[frozen].requires_grad_(False)
        retrieve_on_kernels(*leaves, 3, "triton")[1].backward(gradient)
        assert leaves[frozen].grad is None
        assert torch.equal(leaves[1 - frozen].grad, expected)

    def test_read_and_move_selected_sub_keys_alone(self):
        queries, sub_keys = random_inputs(3, 2, 1, 100, 8)
        indices, scores = TritonKernels.retrieve(queries, sub_keys, 4)
        selected = torch.zeros(2, 100, dtype=torch.bool)
        for half, of_half in enumerate(expert_cell(indices)):
            selected[half, of_half.flatten()] = True
        sub_keys[0, ~selected] = math.nan
        of_queries, of_sub_keys = TritonKernels.retrieval_gradients(
            torch.ones_like(scores), indices, queries, sub_keys
        )
        assert of_queries.isfinite().all()
        assert torch.equal(of_sub_keys[0].any(-1), selected)

    @pytest.mark.parametrize("index", [-1, 36])
    def test_of_an_expert_that_does_not_exist(self, index, monkeypatch):
        monkeypatch.setenv("MODELING_PEER_CHECK_INDICES", "1")
        queries, sub_keys = random_inputs(2, 1, 1, 6, 3)
        indices = torch.tensor([[[0, 35]], [[index, 1]]])
        with pytest.raises(IndexError, match=rf"at least 0 and below the number of experts 36, got {index}"):
            TritonKernels.retrieval_gradients(torch.randn(2, 1, 2), indices, queries, sub_keys)
