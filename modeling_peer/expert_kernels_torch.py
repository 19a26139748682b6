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
"""
Experts in PyTorch operations, for any device: Algorithm 1 as printed, and in pieces of `[T, A, d]` that a cache holds.
"""

from collections.abc import Iterator

import torch
from torch.nn import functional as F


# Elements of a piece: 4 MB in float32, which a cache holds.
PIECE_SIZE = 2**20


class EagerKernels:
    """
    The reference: gathers the rows of all active experts, `[T, A, d]`, and multiplies. Differentiable any number of
    times, in reverse and forward mode.

    Signatures are those of [`TorchKernels`], with `sparse_gradient` in addition: whether the table's gradient is
    sparse.
    """

    @staticmethod
    def unavailable_reason(table: torch.Tensor) -> str | None:
        return None

    @staticmethod
    def up(
        hidden_states: torch.Tensor, indices: torch.Tensor, table: torch.Tensor, sparse_gradient: bool = False
    ) -> torch.Tensor:
        rows = F.embedding(indices, table, sparse=sparse_gradient).to(hidden_states.dtype)
        return torch.einsum("td,tad->ta", hidden_states, rows)

    @staticmethod
    def down(
        weights: torch.Tensor, indices: torch.Tensor, table: torch.Tensor, sparse_gradient: bool = False
    ) -> torch.Tensor:
        rows = F.embedding(indices, table, sparse=sparse_gradient).to(weights.dtype)
        return torch.einsum("ta,tad->td", weights, rows)


class TorchKernels:
    """
    PyTorch operations on pieces of the tokens. Every implementation has these signatures.

    Sums are accumulated in float32, or in float64 for a float64 table. Indices are rows of the table, int64. Tokens
    and table may differ in dtype; `up` and `down` return the dtype of their first argument.
    """

    @staticmethod
    def unavailable_reason(table: torch.Tensor) -> str | None:
        """Why this implementation cannot run on a table, a sentence, or `None` if it can."""
        return None

    @staticmethod
    def up(hidden_states: torch.Tensor, indices: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """`(hidden [T, d], indices [T, A], table [N, d]) -> [T, A]`"""
        output = hidden_states.new_empty(indices.shape)
        for piece in _pieces(indices.shape[0], indices.shape[1] * table.shape[1]):
            rows = _accumulated(table[indices[piece]])  # [piece, A, d]
            output[piece] = torch.einsum("td,tad->ta", hidden_states[piece].to(rows.dtype), rows)
        return output

    @staticmethod
    def down(weights: torch.Tensor, indices: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """`(weights [T, A], indices [T, A], table [N, d]) -> [T, d]`"""
        output = weights.new_empty(weights.shape[0], table.shape[1])
        for piece in _pieces(indices.shape[0], indices.shape[1] * table.shape[1]):
            rows = _accumulated(table[indices[piece]])
            output[piece] = torch.einsum("ta,tad->td", weights[piece].to(rows.dtype), rows)
        return output

    @staticmethod
    def row_gradient(
        coefficients: torch.Tensor,
        tokens: torch.Tensor,
        indices: torch.Tensor,
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """
        `(coefficients [T, A], tokens [T, d], indices [T, A]) -> rows [U], values [U, d]`: the U rows in `indices`,
        each once and ascending, and for each the sum of coefficient · token, in `dtype`. If `out [N, d]` is given, the
        values are written into its rows, the others are left as they are, and nothing is returned.
        """
        rows, positions = torch.unique(indices, return_inverse=True)
        sums = _accumulated(tokens[:0]).new_zeros(rows.shape[0], tokens.shape[1])
        for piece in _pieces(indices.shape[0], indices.shape[1] * tokens.shape[1]):
            products = coefficients[piece, :, None].to(sums.dtype) * tokens[piece, None, :].to(sums.dtype)
            sums.index_add_(0, positions[piece].flatten(), products.flatten(0, 1))
        if out is None:
            return rows, sums.to(dtype)
        out[rows] = sums.to(dtype)
        return None


def _pieces(num_tokens: int, elements_per_token: int) -> Iterator[slice]:
    step = max(PIECE_SIZE // max(elements_per_token, 1), 1)
    return (slice(start, start + step) for start in range(0, num_tokens, step))


def _accumulated(tensor: torch.Tensor) -> torch.Tensor:
    """Cast to the dtype in which sums are accumulated."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
