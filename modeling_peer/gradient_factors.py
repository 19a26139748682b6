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
The factors of which the gradient of an expert table is the sum, and their sums.

Row n of the gradient is `Σ coefficients[t, a] · tokens[t]` over the entries, pairs of a token t and a place a, whose
index names row n. The factors take `T · (d + 2 A)` elements for T tokens with A experts each, of width d; the rows
that they sum to take up to `T · A · d`, and a dense gradient `N · d`.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from .expert_kernels import ALL_EXPERT_KERNELS, resolve_kernels


class Entries:
    """
    Which rows each token names, of one table or several of a pool. The entries are grouped by row on first use, once
    for all these tables.

    Args:
        indices (`torch.Tensor` of shape `(num_tokens, num_active)`): int64, rows of the tables.
        num_rows (`int`): Number of rows of a table.
        kernels (`str`): Name of the implementation that groups and sums, see [`resolve_kernels`].
    """

    def __init__(self, indices: torch.Tensor, num_rows: int, kernels: str):
        self.indices = indices
        self.num_tokens = len(indices)
        self.num_rows = num_rows
        self.kernels = ALL_EXPERT_KERNELS[kernels]
        self._join: tuple[tuple[Entries, ...], Entries] | None = None

    @cached_property
    def sources(self) -> torch.Tensor:
        """The token of each entry: int32, `(num_entries,)`."""
        num_tokens, num_active = self.indices.shape
        tokens = torch.arange(num_tokens, dtype=torch.int32, device=self.indices.device)
        return tokens[:, None].expand(-1, num_active).reshape(-1)

    @cached_property
    def groups(self) -> "EntryGroups":
        """The entries grouped by row."""
        rows, starts, order = self.kernels.group(self.indices.reshape(-1), self.num_rows)
        return EntryGroups(rows, starts, order, self.sources.index_select(0, order))

    @cached_property
    def summed(self) -> "Entries":
        """One entry for each row, whose token is the sum of all tokens that name it."""
        rows = self.groups.rows
        summed = _JoinedEntries([self])
        summed.indices = rows.long()[:, None]
        summed.num_tokens = len(rows)
        places = torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device)
        summed.sources = places[:-1]
        # Of empty groups, the last ones, the entries are in no group.
        starts = torch.minimum(places, self.groups.are_present.sum(dtype=torch.int32))
        summed.groups = EntryGroups(rows, starts, places[:-1], places[:-1])
        return summed

    @staticmethod
    def joined(several: Sequence["Entries"]) -> "Entries":
        """The entries of several forwards as if it had been one. Tables with the same entries share the result."""
        *others, last = several
        if not others:
            return last
        if last._join is None or last._join[0] != tuple(others):
            last._join = tuple(others), _JoinedEntries(several)
        return last._join[1]

    @staticmethod
    def of_parts(parts: Sequence[torch.Tensor], num_tokens: Sequence[int], like: "Entries") -> "Entries":
        """
        The entries of several processes as if they had been one.

        Args:
            parts (`Sequence[torch.Tensor]` of shape `(num_entries, 2)`): int32, the row and the token of each entry.
            num_tokens (`Sequence[int]`): Number of tokens of each process.
            like ([`Entries`]): Of the same tables.
        """
        offsets = [sum(num_tokens[:place]) for place in range(len(parts))]
        entries = _JoinedEntries([like])
        entries.indices = torch.cat([part[:, :1] for part in parts]).long()
        entries.num_tokens = sum(num_tokens)
        entries.sources = torch.cat([part[:, 1] + offset for part, offset in zip(parts, offsets, strict=True)])
        return entries


class _JoinedEntries(Entries):
    def __init__(self, several: Sequence[Entries]):
        first = several[0]
        self.indices = torch.cat([each.indices.reshape(-1) for each in several])[:, None]
        self.num_rows, self.kernels = first.num_rows, first.kernels
        self._join = None
        counts = [each.num_tokens for each in several]
        self.num_tokens = sum(counts)
        offsets = [sum(counts[:place]) for place in range(len(counts))]
        self.sources = torch.cat([each.sources + offset for each, offset in zip(several, offsets, strict=True)])


class EntryGroups(NamedTuple):
    """
    Entries sorted by the row that they name. The last groups may be empty: how many rows are named is known to a GPU
    alone, and the shapes must not depend on it.

    Args:
        rows (`torch.Tensor` of shape `(num_groups,)`):
            int32, the rows, each once and ascending. That of an empty group is any row.
        starts (`torch.Tensor` of shape `(num_groups + 1,)`): int32, where the entries of each row start.
        order (`torch.Tensor` of shape `(num_entries,)`): int32, the entries, grouped, and ascending in each group.
        sources (`torch.Tensor` of shape `(num_entries,)`): int32, the token of each, in this order.
    """

    rows: torch.Tensor
    starts: torch.Tensor
    order: torch.Tensor
    sources: torch.Tensor

    @property
    def are_present(self) -> torch.Tensor:
        """Whether groups have entries: bool, `(num_groups,)`."""
        return self.starts[1:] > self.starts[:-1]


class Factors(NamedTuple):
    """
    The factors of one backward.

    Args:
        coefficients (`torch.Tensor` of shape `(num_tokens, num_active)`): At least in float32.
        tokens (`torch.Tensor` of shape `(num_tokens, width)`)
        entries ([`Entries`]): The rows that the coefficients belong to.
    """

    coefficients: torch.Tensor
    tokens: torch.Tensor
    entries: Entries

    @classmethod
    def of(cls, coefficients: torch.Tensor, tokens: torch.Tensor, entries: Entries) -> "Factors":
        """Factors with coefficients in the dtype in which sums are accumulated."""
        return cls(coefficients.to(torch.promote_types(coefficients.dtype, torch.float32)), tokens, entries)

    @classmethod
    def empty(cls, table: torch.Tensor) -> "Factors":
        """A gradient without entries, of a table or like another gradient of it."""
        indices = torch.empty(0, 1, dtype=torch.int64, device=table.device)
        dtype = torch.promote_types(table.dtype, torch.float32)
        tokens = torch.empty(0, table.shape[1], dtype=dtype, device=table.device)
        return cls(tokens[:, :1], tokens, Entries(indices, len(table), resolve_kernels("auto", table)))

    @property
    def nbytes(self) -> int:
        return self.coefficients.nbytes + self.tokens.nbytes + self.entries.indices.nbytes

    def scaled(self, factor: float | torch.Tensor) -> "Factors":
        return self._replace(coefficients=self.coefficients * factor)

    def without(self, rows: torch.Tensor) -> "Factors":
        """With zero coefficients for the entries that name some rows: bool, `(num_rows,)`."""
        named = rows[self.entries.indices].view_as(self.coefficients)
        return self._replace(coefficients=self.coefficients.masked_fill(named, 0))

    def in_groups(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the kernels read: coefficients and tokens of the entries by group, where groups start, and tokens."""
        groups = self.entries.groups
        return self.coefficients.reshape(-1).index_select(0, groups.order), groups.sources, groups.starts, self.tokens

    def to_rows(self, dtype: torch.dtype) -> torch.Tensor:
        """The dense gradient, `(num_rows, width)`."""
        rows = torch.zeros(self.entries.num_rows, self.tokens.shape[1], dtype=dtype, device=self.tokens.device)
        if self.coefficients.numel():
            self.entries.kernels.row_gradient(*self.in_groups(), rows, self.entries.groups.rows)
        return rows

    def sums(self) -> torch.Tensor:
        """The row of the gradient of each group, `(num_groups, width)`, in the dtype of the coefficients."""
        sums = self.coefficients.new_empty(len(self.entries.groups.rows), self.tokens.shape[1])
        self.entries.kernels.row_gradient(*self.in_groups(), sums)
        return sums

    def summed(self) -> "Factors":
        """The same gradient with one entry for each row, whose token is the row's gradient."""
        sums = self.sums()
        return Factors(sums.new_ones(len(sums), 1), sums, self.entries.summed)

    @staticmethod
    def joined(several: Sequence["Factors"]) -> "Factors":
        """The sum of several gradients of a table as one."""
        if len(several) == 1:
            return several[0]
        return Factors(
            torch.cat([each.coefficients.reshape(-1) for each in several])[:, None],
            torch.cat([each.tokens for each in several]),
            Entries.joined([each.entries for each in several]),
        )


def factors_of_rows(rows: torch.Tensor) -> Factors:
    """The factors of a dense gradient, `(num_rows, width)`, as it is: each row is a token that one entry names."""
    every = torch.arange(len(rows), device=rows.device)[:, None]
    ones = rows.new_ones(len(rows), 1, dtype=torch.promote_types(rows.dtype, torch.float32))
    return Factors(ones, rows, Entries(every, len(rows), resolve_kernels("auto", rows)))
