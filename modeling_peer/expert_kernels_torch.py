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

from .quantized_rows import QuantizedRows, dequantize


# Elements of a piece: 4 MB in float32, which a cache holds.
PIECE_SIZE = 2**20


class EagerKernels:
    """
    The reference: gathers the rows of all active experts, `[T, A, d]`, and multiplies. Differentiable any number of
    times, in reverse and forward mode.

    Signatures are those of [`TorchKernels`].
    """

    @staticmethod
    def unavailable_reason(table: torch.Tensor) -> str | None:
        return None

    @staticmethod
    def up(hidden_states: torch.Tensor, indices: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        rows = F.embedding(indices, table).to(hidden_states.dtype)
        return torch.einsum("td,tad->ta", hidden_states, rows)

    @staticmethod
    def down(weights: torch.Tensor, indices: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        rows = F.embedding(indices, table).to(weights.dtype)
        return torch.einsum("ta,tad->td", weights, rows)

    @staticmethod
    def quantized_up(hidden_states: torch.Tensor, indices: torch.Tensor, table: QuantizedRows) -> torch.Tensor:
        rows = dequantize(table.select(indices), hidden_states.dtype)
        return torch.einsum("td,tad->ta", hidden_states, rows)

    @staticmethod
    def quantized_down(weights: torch.Tensor, indices: torch.Tensor, table: QuantizedRows) -> torch.Tensor:
        rows = dequantize(table.select(indices), weights.dtype)
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
    def quantized_up(hidden_states: torch.Tensor, indices: torch.Tensor, table: QuantizedRows) -> torch.Tensor:
        """As `up`, of a table whose rows are quantized. Sums are in float64 for tokens in float64."""
        output = hidden_states.new_empty(indices.shape)
        for piece in _pieces(indices.shape[0], indices.shape[1] * table.width):
            tokens = _accumulated(hidden_states[piece])
            rows = dequantize(table.select(indices[piece]), tokens.dtype)
            output[piece] = torch.einsum("td,tad->ta", tokens, rows)
        return output

    @staticmethod
    def quantized_down(weights: torch.Tensor, indices: torch.Tensor, table: QuantizedRows) -> torch.Tensor:
        """As `down`, of a table whose rows are quantized. Sums are in float64 for weights in float64."""
        output = weights.new_empty(weights.shape[0], table.width)
        for piece in _pieces(indices.shape[0], indices.shape[1] * table.width):
            factors = _accumulated(weights[piece])
            rows = dequantize(table.select(indices[piece]), factors.dtype)
            output[piece] = torch.einsum("ta,tad->td", factors, rows)
        return output

    @staticmethod
    def group(indices: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Group entries by the row that they name.

        Args:
            indices (`torch.Tensor` of shape `(num_entries,)`): int64, rows of a table.
            num_rows (`int`): Number of rows of the table.

        Returns:
            `tuple(torch.Tensor)`: int32, the rows, each once and ascending, `(num_groups,)`; where the entries of each
            start, `(num_groups + 1,)`; and the entries, grouped, and ascending in each group, `(num_entries,)`. The
            last groups may be empty, of any row.
        """
        named, order = torch.sort(indices, stable=True)
        rows, counts = torch.unique_consecutive(named, return_counts=True)
        return rows.int(), F.pad(counts.cumsum(0), (1, 0)).int(), order.int()

    @staticmethod
    def row_gradient(
        coefficients: torch.Tensor,
        sources: torch.Tensor,
        starts: torch.Tensor,
        tokens: torch.Tensor,
        out: torch.Tensor,
        places: torch.Tensor | None = None,
    ) -> None:
        """
        Write a row of a table's gradient for each group of entries: `Σ coefficients[e] · tokens[sources[e]]`. An entry
        whose coefficient is zero adds nothing, even if its token is infinite or NaN: it may name a frozen row. For an
        empty group no row of a table is written, and a zero if the rows are in the groups' own order.

        Args:
            coefficients (`torch.Tensor` of shape `(num_entries,)`): By group.
            sources (`torch.Tensor` of shape `(num_entries,)`): int32, by group: the token of each entry.
            starts (`torch.Tensor` of shape `(num_groups + 1,)`): int32, where groups start.
            tokens (`torch.Tensor` of shape `(num_tokens, width)`)
            out (`torch.Tensor` of shape `(num_rows, width)`): Written in place, rows of no group are left as they are.
            places (`torch.Tensor` of shape `(num_groups,)`, *optional*):
                int32, the row of `out` for each group; the groups' own order if not given.
        """
        num_groups = len(starts) - 1
        groups = torch.repeat_interleave(starts.diff().long(), output_size=len(sources))
        sums = _accumulated(coefficients[:0]).new_zeros(num_groups, tokens.shape[1])
        for piece in _pieces(len(sources), tokens.shape[1]):
            factors = coefficients[piece, None].to(sums.dtype)
            products = factors * tokens[sources[piece]].to(sums.dtype)
            sums.index_add_(0, groups[piece], products.masked_fill_(factors == 0, 0))
        if places is None:
            out.copy_(sums)
        else:
            out[places] = sums.to(out.dtype)

    @staticmethod
    def squared_norm(
        coefficients: torch.Tensor, sources: torch.Tensor, starts: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """The sum of the squares of all rows that [`TorchKernels.row_gradient`] would write: float64, `()`."""
        sums = _accumulated(coefficients[:0]).new_empty(len(starts) - 1, tokens.shape[1])
        TorchKernels.row_gradient(coefficients, sources, starts, tokens, sums)
        return torch.linalg.vector_norm(sums).double().square()


def _pieces(num_tokens: int, elements_per_token: int) -> Iterator[slice]:
    step = max(PIECE_SIZE // max(elements_per_token, 1), 1)
    return (slice(start, start + step) for start in range(0, num_tokens, step))


def _accumulated(tensor: torch.Tensor) -> torch.Tensor:
    """Cast to the dtype in which sums are accumulated."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
