# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Experts in PyTorch operations for any device, on pieces of `[T, A, d]` that fit into a cache."""

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional as F

from ..experts import PIECE_SIZE
from .quantized_rows import QuantizedRows, dequantize


class TorchKernels:
    """
    PyTorch operations on pieces of the tokens. Every implementation has these signatures.

    Sums are accumulated in float32, or in float64 for a float64 table. Indices are rows of the table, int64. Tokens
    and table may differ in dtype; `up` and `down` return the dtype of their first argument.
    """

    @staticmethod
    def unavailable_reason(table: torch.Tensor) -> str | None:
        """Return a sentence that says why this implementation cannot run on a table, or `None` if it can."""
        return None

    @staticmethod
    def up(hidden_states: torch.Tensor, indices: torch.Tensor, table: torch.Tensor | QuantizedRows) -> torch.Tensor:
        """`(hidden [T, d], indices [T, A], table [N, d]) -> [T, A]`"""
        output = hidden_states.new_empty(indices.shape)
        for piece in _pieces(indices.shape[0], indices.shape[1] * _width(table)):
            rows = _rows(table, indices[piece], hidden_states.dtype)  # [piece, A, d]
            output[piece] = torch.einsum("td,tad->ta", hidden_states[piece].to(rows.dtype), rows)
        return output

    @staticmethod
    def down(weights: torch.Tensor, indices: torch.Tensor, table: torch.Tensor | QuantizedRows) -> torch.Tensor:
        """`(weights [T, A], indices [T, A], table [N, d]) -> [T, d]`"""
        output = weights.new_empty(weights.shape[0], _width(table))
        for piece in _pieces(indices.shape[0], indices.shape[1] * _width(table)):
            rows = _rows(table, indices[piece], weights.dtype)
            output[piece] = torch.einsum("ta,tad->td", weights[piece].to(rows.dtype), rows)
        return output

    @staticmethod
    def group(indices: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Group assignments by the row of a table that they name, int64. Returns `rows`, `starts` and `order` of
        [`SortedAssignments`] in int32, where the last groups may be empty.
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
        Write a row of a table's gradient for each group of assignments: `Σ coefficients[a] · tokens[sources[a]]`. An
        assignment whose coefficient is zero adds nothing, even if its token is infinite or NaN: it may name a frozen
        row. An empty group, which only Triton has, writes zeros, or nothing with `places`.

        Args:
            coefficients, sources (`torch.Tensor` of shape `(num_assignments,)`): By group; sources are int32 tokens.
            starts (`torch.Tensor` of shape `(num_groups + 1,)`): int32, where groups start.
            tokens (`torch.Tensor` of shape `(num_tokens, width)`)
            out (`torch.Tensor` of shape `(num_rows, width)`): Contiguous. Rows without a group are left as they are.
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


def check_num_retrieved(k: int, size: int) -> None:
    if not 1 <= k <= size:
        raise ValueError(f"`num_experts_per_head` must be from 1 to √num_experts = {size}, got {k}.")


def empty_gradients(
    queries: torch.Tensor, sub_keys: torch.Tensor, wanted: Sequence[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate the gradients of a retrieval, without elements where one is not wanted."""
    of_queries, of_sub_keys = (
        torch.empty_like(each) if is_wanted else each.new_empty(0)
        for each, is_wanted in zip((queries, sub_keys), wanted, strict=True)
    )
    return of_queries, of_sub_keys


def _pieces(num_tokens: int, elements_per_token: int) -> Iterator[slice]:
    step = max(PIECE_SIZE // max(elements_per_token, 1), 1)
    return (slice(start, start + step) for start in range(0, num_tokens, step))


def _accumulated(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _rows(table: torch.Tensor | QuantizedRows, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(table, QuantizedRows):
        return dequantize(table.select(indices), torch.promote_types(dtype, torch.float32))
    return _accumulated(table[indices])


def _width(table: torch.Tensor | QuantizedRows) -> int:
    return table.width if isinstance(table, QuantizedRows) else table.shape[1]
