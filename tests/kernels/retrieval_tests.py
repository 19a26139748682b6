# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of product-key retrieval that are the same for all kernels, and scores to select from."""

import math
from functools import partial

import pytest
import torch

from modeling_peer.experts import retrieve
from modeling_peer.ops.kernels import KERNELS
from modeling_peer.ops.retrieval import retrieve_on_kernels


def best(scores, k):
    """The k best along the last dimension, of equal ones the first; NaN counts as infinity."""
    seen = torch.where(scores.isnan(), torch.inf, scores)
    found = seen.sort(dim=-1, descending=True, stable=True)
    return found.values[..., :k], found.indices[..., :k]


def some_infinite(shape):
    scores = torch.randn(shape)
    return torch.where(torch.rand(shape) < 0.2, torch.inf * scores.sign(), scores)


# Scores of a shape, along its last dimension but one.
SCORES = {
    "normal": torch.randn,
    "with_ties": lambda shape: torch.randint(-3, 4, shape).float(),
    "equal": lambda shape: torch.full(shape, 0.5),
    "zeros_of_both_signs": lambda shape: torch.where(torch.rand(shape) < 0.5, 0.0, -0.0),
    "with_outliers": lambda shape: torch.randn(shape).pow(15) * 1e20,
    "largest_and_smallest": lambda shape: (
        torch.randn(shape).sign() * torch.tensor([3.4e38, 2.8e-45])[torch.randint(0, 2, shape)]
    ),
    "ascending": lambda shape: torch.randn(shape).sort(-2).values,
    "descending": lambda shape: torch.randn(shape).sort(-2, descending=True).values,
    "alternating": lambda shape: torch.randn(shape) + 9.0 * (torch.arange(shape[-2])[:, None] % 16 == 3),
    "mostly_minus_infinity": lambda shape: torch.where(torch.rand(shape) < 0.9, -torch.inf, torch.randn(shape)),
    "infinite": some_infinite,
    "not_a_number": lambda shape: torch.where(torch.rand(shape) < 0.1, torch.nan, some_infinite(shape)),
}


def random_inputs(num_tokens, num_heads, num_sets, size, half_size):
    """Queries and sub-keys."""
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = (num_tokens, num_heads, 2, half_size), (num_sets, 2, size, half_size)
    return [torch.randn(shape, generator=generator) for shape in shapes]


class RetrievalTests:
    """Of the kernels of the name `kernels`."""

    kernels: str

    def assert_equals_the_reference(self, *sizes, k):
        leaves = [each.requires_grad_() for each in random_inputs(*sizes)]
        exact = [each.detach().double().requires_grad_() for each in leaves]
        indices, scores = retrieve_on_kernels(*leaves, k, self.kernels)
        exact_indices, exact_scores = retrieve(*exact, k)
        assert torch.equal(indices, exact_indices)
        torch.testing.assert_close(scores.double(), exact_scores, rtol=1e-5, atol=1e-5)
        direction = torch.randn(scores.shape, generator=torch.Generator().manual_seed(7))
        actual = torch.autograd.grad(scores, leaves, direction)
        expected = torch.autograd.grad(exact_scores, exact, direction.double())
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)

    def test_not_a_number_is_seen(self):
        queries, sub_keys = random_inputs(4, 2, 1, 37, 3)
        queries[1, 0] = math.nan
        indices, scores = KERNELS[self.kernels].retrieve(queries, sub_keys, 5)
        assert indices.min() >= 0 and indices.max() < 37**2
        weights = scores.softmax(-1)
        assert weights[1, 0].isnan().any() and weights[0].isfinite().all()

    @pytest.mark.parametrize("query", [3e38, math.inf, math.nan])
    def test_opposite_infinities(self, query):
        """The sum of a pair may be NaN though neither of its scores is."""
        queries, sub_keys = torch.full((1, 1, 2, 2), query), torch.rand(1, 2, 256, 2) * 5 + 1
        sub_keys[0, 1] *= -1
        indices, scores = KERNELS[self.kernels].retrieve(queries, sub_keys, 16)
        assert indices.min() >= 0 and indices.max() < 256**2
        assert scores.softmax(-1).isnan().any()

    def test_tensors_need_not_be_contiguous(self):
        inputs, kernels = random_inputs(3, 2, 2, 20, 8), KERNELS[self.kernels]
        transposed = [each.transpose(-1, -2).contiguous().transpose(-1, -2) for each in inputs]
        for actual, expected in zip(kernels.retrieve(*transposed, 4), kernels.retrieve(*inputs, 4), strict=True):
            assert torch.equal(actual, expected)

    @pytest.mark.parametrize("k", [0, 7])
    def test_more_experts_than_sub_keys(self, k):
        for run in (KERNELS[self.kernels].retrieve, partial(retrieve_on_kernels, kernels=self.kernels)):
            with pytest.raises(ValueError, match="`num_experts_per_head`"):
                run(*random_inputs(2, 1, 1, 6, 3), k)

    @pytest.mark.parametrize("frozen", [0, 1], ids=["queries", "sub_keys"])
    def test_what_is_frozen_gets_no_gradient(self, frozen, monkeypatch):
        """Nor is it computed."""
        computed, kernels = [], KERNELS[self.kernels]
        retrieval_gradients = kernels.retrieval_gradients

        def gradients(*arguments):
            found = retrieval_gradients(*arguments)
            computed.append([each.numel() > 0 for each in found])
            return found

        monkeypatch.setattr(kernels, "retrieval_gradients", staticmethod(gradients))
        leaves = [each.requires_grad_() for each in random_inputs(9, 2, 2, 6, 8)]
        scores = retrieve_on_kernels(*leaves, 3, self.kernels)[1]
        gradient = torch.randn_like(scores)
        expected = torch.autograd.grad(scores, leaves, gradient)[1 - frozen]
        leaves[frozen].requires_grad_(False)
        retrieve_on_kernels(*leaves, 3, self.kernels)[1].backward(gradient)
        assert leaves[frozen].grad is None
        assert torch.equal(leaves[1 - frozen].grad, expected)
        assert computed == [[True, True], [which != frozen for which in range(2)]]

    @pytest.mark.parametrize("index", [-1, 36])
    def test_gradients_of_an_expert_that_does_not_exist(self, index, monkeypatch):
        """A GPU looks for it on demand."""
        monkeypatch.setenv("MODELING_PEER_CHECK_INDICES", "1")
        indices = torch.tensor([[[0, 35]], [[index, 1]]])
        with pytest.raises(IndexError, match=f"got {index}"):
            KERNELS[self.kernels].retrieval_gradients(torch.randn(2, 1, 2), indices, *random_inputs(2, 1, 1, 6, 3))
