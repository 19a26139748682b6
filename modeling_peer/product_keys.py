# Copyright 2026 The PEER for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Exact product-key retrieval: the best k of N experts by looking at 2 √N sub-keys (paper, section 2.1)."""

import torch


def grid_size(num_experts: int) -> int:
    """Side √N of the key grid of `num_experts` = N experts. Raises `ValueError` if N is not a perfect square."""
    size = round(num_experts**0.5)
    if size < 1 or size * size != num_experts:
        raise ValueError(
            f"`num_experts` must be a perfect square, the product of two equal sets of sub-keys, got {num_experts}; "
            f"the nearest are {max(size, 1) ** 2} and {(max(size, 1) + 1) ** 2}."
        )
    return size


def expert_number(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """
    Number of the expert in cell (`row`, `column`) of the key grid, two integer tensors of one shape.

    Cells are counted in square shells, m = max(row, column): m² + m + row - column. A cell keeps its number when the
    grid gets larger, so that a pool grows by appending rows to its tables.
    """
    shell = torch.maximum(row, column)
    return shell * shell + shell + row - column


def _winning_pairs(k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Ranks (i, j) of the pairs that can be among the best k sums: whatever is before (i, j) in both lists,
    (i + 1) (j + 1) - 1 pairs, is at least as good. 50 of 256 pairs for k = 16.
    """
    rows, columns = zip(*((i, j) for i in range(k) for j in range(k // (i + 1))), strict=True)
    return torch.tensor(rows, device=device), torch.tensor(columns, device=device)


def product_key_topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The k best experts of every query, exactly.

    Args:
        scores (`torch.Tensor` of shape `(..., 2, √N)`):
            Scores of the two halves of a query against the two sets of sub-keys; an expert's score is their sum.
        k (`int`):
            Number of experts to retrieve, at most √N.

    Returns:
        `tuple(torch.Tensor)`: expert numbers (int64) and scores, both of shape `(..., k)`, best first.
    """
    half_scores, half_ranks = scores.topk(k, dim=-1)
    row_rank, column_rank = _winning_pairs(k, scores.device)
    pair_scores = half_scores[..., 0, :][..., row_rank] + half_scores[..., 1, :][..., column_rank]
    top_scores, pairs = pair_scores.topk(k, dim=-1)
    rows = half_ranks[..., 0, :].gather(-1, row_rank[pairs])
    columns = half_ranks[..., 1, :].gather(-1, column_rank[pairs])
    return expert_number(rows, columns), top_scores
