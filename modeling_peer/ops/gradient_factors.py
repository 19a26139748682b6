# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Factors of the gradient of an expert table, and their sums.

Row n of the gradient is `Σ coefficients[t, a] · tokens[t]` over the assignments of tokens t to experts whose row is n.
The factors take `T · (d + 2 A)` elements for T tokens with A experts each, of width d; the rows that they sum to take
up to `T · A · d`, and a dense gradient `N · d`.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch

from .kernels import KERNELS, resolve_kernels


class SortedAssignments(NamedTuple):
    """
    Assignments grouped by row. The last groups may be empty, because only the GPU knows how many rows are named.

    Args:
        rows (`torch.Tensor` of shape `(num_groups,)`):
            int32, the distinct rows, ascending. The row of an empty group is arbitrary.
        starts (`torch.Tensor` of shape `(num_groups + 1,)`): int32, where the assignments of each row start.
        order (`torch.Tensor` of shape `(num_assignments,)`): int32, the assignments by group, ascending in each.
        sources (`torch.Tensor` of shape `(num_assignments,)`): int32, the token of each assignment in `order`.
    """

    rows: torch.Tensor
    starts: torch.Tensor
    order: torch.Tensor
    sources: torch.Tensor


class Assignments:
    """
    Assignments of tokens to experts, as rows of one table or of several tables of a pool that share them. They are
    sorted by row on first use, once for all these tables.

    Args:
        rows (`torch.Tensor` of shape `(num_tokens, num_active)`): int64, rows of the tables.
        num_rows (`int`): Number of rows of a table.
        kernels (`str`): Name of the kernels that group and sum, see [`resolve_kernels`].
        sources (`torch.Tensor` of shape `(num_assignments,)`, *optional*):
            int32, the token of each assignment, if `rows` does not have one row for each token.
        num_tokens (`int`, *optional*): Number of tokens, given together with `sources`.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        num_rows: int,
        kernels: str,
        sources: torch.Tensor | None = None,
        num_tokens: int | None = None,
    ):
        self.rows, self.num_rows, self.kernels = rows, num_rows, kernels
        self.num_tokens = len(rows) if num_tokens is None else num_tokens
        if sources is not None:
            self.sources = sources
        self._joined: tuple[tuple[Assignments, ...], Assignments] | None = None

    @property
    def run(self) -> Any:
        """The kernels that group and sum."""
        return KERNELS[self.kernels]

    @cached_property
    def sources(self) -> torch.Tensor:
        """The token of each assignment: int32, `(num_assignments,)`."""
        tokens = torch.arange(self.num_tokens, dtype=torch.int32, device=self.rows.device)
        return tokens[:, None].expand(-1, self.rows.shape[1]).reshape(-1)

    @cached_property
    def by_row(self) -> SortedAssignments:
        rows, starts, order = self.run.group(self.rows.reshape(-1), self.num_rows)
        return SortedAssignments(rows, starts, order, self.sources.index_select(0, order))

    @cached_property
    def summed(self) -> "Assignments":
        """One assignment for each row, to a token that is the weighted sum of all tokens assigned to the row."""
        rows = self.by_row.rows
        places = torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device)
        summed = Assignments(rows.long()[:, None], self.num_rows, self.kernels, places[:-1], len(rows))
        # The last assignments, those of empty groups, belong to no group.
        starts = torch.minimum(places, (self.by_row.starts.diff() > 0).sum(dtype=torch.int32))
        summed.by_row = SortedAssignments(rows, starts, places[:-1], places[:-1])
        return summed

    @staticmethod
    def joined(several: Sequence["Assignments"]) -> "Assignments":
        """Join the assignments of several forward passes. Tables that share assignments share the result."""
        *others, last = several
        if last._joined is None or last._joined[0] != tuple(others):
            rows = [each.rows.reshape(-1, 1) for each in several]
            sources, num_tokens = [each.sources for each in several], [each.num_tokens for each in several]
            last._joined = tuple(others), last._of_parts(rows, sources, num_tokens)
        return last._joined[1]

    def of_processes(self, parts: Sequence[torch.Tensor], num_tokens: Sequence[int]) -> "Assignments":
        """
        Join the assignments of several processes to tables like these. `parts` are the row and token of each
        assignment of a process, `(num_assignments, 2)`, int32. `num_tokens` has the number of tokens of each process.
        """
        return self._of_parts([part[:, :1].long() for part in parts], [part[:, 1] for part in parts], num_tokens)

    def _of_parts(self, rows, sources, num_tokens):
        offsets = [sum(num_tokens[:place]) for place in range(len(num_tokens))]
        sources = torch.cat([each + offset for each, offset in zip(sources, offsets, strict=True)])
        return Assignments(torch.cat(rows), self.num_rows, self.kernels, sources, sum(num_tokens))


class Factors:
    """
    The factors of one backward pass. They may share memory with the layer's input, router indices and gradient of the
    output. If one of these is written in place before the optimizer's step, the factors raise `RuntimeError`. Writes
    through `.data` change the gradient unnoticed, as they do in autograd itself.

    Args:
        coefficients (`torch.Tensor` of shape `(num_tokens, num_active)`): Kept at least in float32.
        tokens (`torch.Tensor` of shape `(num_tokens, width)`)
        assignments ([`Assignments`]): The rows that the coefficients belong to.
    """

    def __init__(self, coefficients: torch.Tensor, tokens: torch.Tensor, assignments: Assignments):
        coefficients = coefficients.to(torch.promote_types(coefficients.dtype, torch.float32))
        self._tensors = coefficients, tokens, assignments.rows
        self._versions = [each._version for each in self._tensors]
        self.assignments = assignments

    @classmethod
    def empty(cls, table: torch.Tensor) -> "Factors":
        """Make factors of a zero gradient. `table` is the table or another gradient of it."""
        rows = torch.empty(0, 1, dtype=torch.int64, device=table.device)
        dtype = torch.promote_types(table.dtype, torch.float32)
        tokens = torch.empty(0, table.shape[1], dtype=dtype, device=table.device)
        return cls(tokens[:, :1], tokens, Assignments(rows, len(table), resolve_kernels(None, table)))

    @classmethod
    def of_rows(cls, rows: torch.Tensor) -> "Factors":
        """The factors of a dense gradient, `(num_rows, width)`: each row is a token with one assignment."""
        every = torch.arange(len(rows), device=rows.device)[:, None]
        ones = rows.new_ones(len(rows), 1, dtype=torch.promote_types(rows.dtype, torch.float32))
        return cls(ones, rows, Assignments(every, len(rows), resolve_kernels(None, rows)))

    coefficients = property(lambda self: self._unchanged(0))
    tokens = property(lambda self: self._unchanged(1))

    def _unchanged(self, place):
        if [each._version for each in self._tensors] != self._versions:
            raise RuntimeError(
                "The gradient of an expert table needs the input of the layer, its router indices and the gradient of "
                "its output until the optimizer's step, and one was written in place: write to a clone instead."
            )
        return self._tensors[place]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self._tensors)

    @property
    def rows(self) -> torch.Tensor:
        """The rows of the groups of [`Factors.in_groups`]: int32, `(num_groups,)`."""
        return self.assignments.by_row.rows

    def scaled(self, factor: float | torch.Tensor) -> "Factors":
        return Factors(self.coefficients * factor, self.tokens, self.assignments)

    def without(self, rows: torch.Tensor) -> "Factors":
        """Return factors with zero coefficients for the assignments to `rows`: bool, `(num_rows,)`."""
        named = rows[self.assignments.rows].view_as(self.coefficients)
        return Factors(self.coefficients.masked_fill(named, 0), self.tokens, self.assignments)

    def in_groups(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what kernels read: coefficients and sources of the assignments by row, starts of groups, tokens."""
        groups = self.assignments.by_row
        return self.coefficients.reshape(-1).index_select(0, groups.order), groups.sources, groups.starts, self.tokens

    def to_rows(self, dtype: torch.dtype) -> torch.Tensor:
        """The dense gradient, `(num_rows, width)`."""
        rows = torch.zeros(self.assignments.num_rows, self.tokens.shape[1], dtype=dtype, device=self.tokens.device)
        if self.coefficients.numel():
            self.assignments.run.row_gradient(*self.in_groups(), rows, self.rows)
        return rows

    def sums(self) -> torch.Tensor:
        """The row of the gradient of each group, `(num_groups, width)`, in the dtype of the coefficients."""
        sums = self.coefficients.new_empty(len(self.rows), self.tokens.shape[1])
        self.assignments.run.row_gradient(*self.in_groups(), sums)
        return sums

    def summed(self) -> "Factors":
        """The same gradient with one assignment for each row, whose token is the row's gradient."""
        sums = self.sums()
        return Factors(sums.new_ones(len(sums), 1), sums, self.assignments.summed)

    @staticmethod
    def joined(several: Sequence["Factors"]) -> "Factors":
        """Join several gradients of a table into their sum."""
        if len(several) == 1:
            return several[0]
        coefficients = torch.cat([each.coefficients.reshape(-1, 1) for each in several])
        tokens = torch.cat([each.tokens for each in several])
        return Factors(coefficients, tokens, Assignments.joined([each.assignments for each in several]))
