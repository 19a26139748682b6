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
"""The key grid of a pool: which expert is in which cell, so that every expert keeps its index when the pool grows."""

import math

import torch


def grid_size(num_experts: int) -> int:
    """The side √N of the key grid of N = `num_experts` experts. Raises `ValueError` if N is not a perfect square."""
    size = math.isqrt(max(num_experts, 0))
    if size < 1 or size * size != num_experts:
        raise ValueError(
            f"`num_experts` must be a perfect square, one expert for each pair of two sets of sub-keys, "
            f"got {num_experts}; the nearest are {max(size, 1) ** 2} and {(max(size, 1) + 1) ** 2}."
        )
    return size


def expert_index(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """
    Return the index of the expert in each cell (`row`, `column`) of the key grid, two integer tensors of the same
    shape.

    Cells are counted in square shells, m = max(row, column): m² + m + row - column. A cell keeps its index when the
    grid gets larger, so that a pool grows by appending rows to its tables.
    """
    shell = torch.maximum(row, column)
    return shell * shell + shell + row - column


def expert_cell(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cell (row, column) of the key grid of each expert index: the inverse of [`expert_index`]."""
    shell = index.double().sqrt().long()
    before_diagonal = index - shell * shell - shell  # row - column
    return shell + before_diagonal.clamp(max=0), shell - before_diagonal.clamp(min=0)


_WINNING_PAIRS: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}


def winning_pairs(k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Ranks (i, j) of the pairs that can be among the k best sums: the (i + 1) (j + 1) - 1 pairs that precede (i, j) in
    both lists are at least as good. For k = 16 these are 50 of 256 pairs. They are copied to a device once.
    """
    if not torch.compiler.is_compiling() and (k, device) in _WINNING_PAIRS:
        return _WINNING_PAIRS[k, device]
    ranks = zip(*((i, j) for i in range(k) for j in range(k // (i + 1))), strict=True)
    with torch.inference_mode(False):
        rows, columns = (torch.tensor(each, device=device) for each in ranks)
    pairs = rows, columns
    # A compiler's tensors have no values.
    if not torch.compiler.is_compiling() and type(rows) is torch.Tensor:
        _WINNING_PAIRS[k, device] = pairs
    return pairs
