# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Retrieval against brute force over all experts, and expert indices."""

import pytest
import torch

from modeling_peer.configuration_peer import grid_size
from modeling_peer.experts import expert_index, product_key_topk


def all_expert_scores(scores):
    """[..., N] scores of all experts, in the order of their indices, from `[..., 2, √N]`."""
    size = scores.shape[-1]
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    sums = scores[..., 0, :, None] + scores[..., 1, None, :]
    flat = torch.empty(*scores.shape[:-2], size * size, dtype=scores.dtype)
    flat[..., expert_index(rows, columns).flatten()] = sums.flatten(-2)
    return flat


@pytest.mark.parametrize("size, k", [(1, 1), (2, 2), (5, 1), (5, 3), (5, 5), (32, 16), (32, 32)])
def test_retrieval_equals_brute_force(size, k):
    scores = torch.randn(7, 3, 2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size + k))
    indices, top_scores = product_key_topk(scores, k)
    expected = all_expert_scores(scores).topk(k)
    assert torch.equal(top_scores, expected.values)
    assert torch.equal(indices, expected.indices)


def test_a_tie_changes_no_score():
    scores = torch.randint(0, 3, (200, 2, 12), generator=torch.Generator().manual_seed(0)).double()
    indices, top_scores = product_key_topk(scores, 8)
    everything = all_expert_scores(scores)
    assert torch.equal(top_scores, everything.topk(8).values)
    assert torch.equal(everything.gather(-1, indices), top_scores)
    assert all(len(set(row.tolist())) == 8 for row in indices)


def test_indices_are_stable_under_growth():
    def indices(size):
        rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        return expert_index(rows, columns)

    small, large = indices(9), indices(13)
    assert torch.equal(large[:9, :9], small)
    assert sorted(small.flatten().tolist()) == list(range(81))
    assert sorted(large.flatten().tolist()) == list(range(169))


@pytest.mark.parametrize("num_experts", [0, 2, 63, 1024**2 - 1])
def test_a_number_of_experts_that_is_no_square_is_refused(num_experts):
    with pytest.raises(ValueError, match=f"`num_experts` must be a perfect square.*got {num_experts}"):
        grid_size(num_experts)
