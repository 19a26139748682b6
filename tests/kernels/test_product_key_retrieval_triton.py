# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Product-key retrieval in Triton, in its interpreter, against sorting, against C, and against autograd in float64."""

import math

import pytest
import torch
from retrieval_tests import SCORES, RetrievalTests, best, random_inputs
from slow_tests import slow

from modeling_peer.experts import expert_cell
from modeling_peer.ops import retrieval_triton
from modeling_peer.ops.kernels_cpu import CpuKernels
from modeling_peer.ops.kernels_triton import TritonKernels
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


@pytest.mark.parametrize("size, k", [(1, 1), (5, 3), (16, 16), (37, 37), (64, 16), (200, 1), (300, 20), (1000, 16)])
def test_selection_is_that_of_stable_sorts(size, k):
    """Whatever the scores are, in each row of another kind."""
    torch.manual_seed(size)
    scores = torch.stack([each((size, 1))[:, 0] for each in SCORES.values()])
    values, places = select(scores, k)
    expected, expected_places = best(scores, k)
    assert torch.equal(values, expected)
    assert torch.equal(places.long(), expected_places)


class TestRetrieval(RetrievalTests):
    kernels = "triton"

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_equals_the_reference(self, shape, monkeypatch):
        monkeypatch.setattr(retrieval_triton, "PIECE_SIZE", 2**9)  # of several tokens or heads
        self.assert_equals_the_reference(*shape[:-1], k=shape[-1])

    @slow
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_equals_the_c_kernels_with_ties(self, shape):
        """To the bit: sums of small integers are exact."""
        *sizes, k = shape
        inputs = [each.mul(2).clamp(-2, 2).round() for each in random_inputs(*sizes)]
        found, expected = TritonKernels.retrieve(*inputs, k), CpuKernels.retrieve(*inputs, k)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))

    def test_gradients_read_and_move_selected_sub_keys_alone(self):
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
