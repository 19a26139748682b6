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
Experts on a GPU, in Triton. An entry is a pair of a token and one of its experts; entries are processed in one of two
orders:

- by token, as they come. Every row of the table is read once for each entry that names it.
- by expert, sorted. Entries that name the same row are neighbors, and the row is read from memory once.

Without Triton the module can be imported, and `TritonKernels.unavailable_reason` says what is missing.
"""

import os

import torch
from torch.nn import functional as F


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


# Triton's decorator reads the variable too, when this module is imported: kernels run either on a GPU, or in Python on
# a CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# When to sort by expert, see `_by_expert`. Estimated from the number of bytes read, not measured.
CACHE_SIZE = 2**25
ENTRIES_PER_ROW = 4


if triton is not None:

    @triton.jit
    def _up(
        hidden, rows, order, table, output, num_entries, active, width, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr
    ):
        """`output[e] = hidden[e // active] · table[rows[p]]`, e = order[p], or p if `order` is None. A block of p."""
        positions = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
        present = positions < num_entries
        entries = positions
        if order is not None:
            entries = tl.load(order + positions, mask=present, other=0)
        token_starts = entries // active * width
        row_starts = tl.load(rows + positions, mask=present, other=0) * width
        sums = tl.zeros([ENTRIES, COLUMNS], dtype=tl.float32)
        for first in range(0, width, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            mask = present[:, None] & (columns < width)[None, :]
            token = tl.load(hidden + token_starts[:, None] + columns[None, :], mask=mask, other=0.0)
            row = tl.load(table + row_starts[:, None] + columns[None, :], mask=mask, other=0.0)
            sums += token.to(tl.float32) * row.to(tl.float32)
        tl.store(output + entries, tl.sum(sums, axis=1), mask=present)

    @triton.jit
    def _down_by_token(weights, indices, table, output, active, width, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
        """`output[t] = Σ_a weights[t, a] table[indices[t, a]]`, one t and a block of columns."""
        blocks = tl.cdiv(width, COLUMNS)
        token = (tl.program_id(0) // blocks).to(tl.int64)
        columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
        sums = tl.zeros([ENTRIES, COLUMNS], dtype=tl.float32)
        for first in range(0, active, ENTRIES):
            positions = first + tl.arange(0, ENTRIES)
            present = positions < active
            weight = tl.load(weights + token * active + positions, mask=present, other=0.0).to(tl.float32)
            row_starts = tl.load(indices + token * active + positions, mask=present, other=0) * width
            mask = present[:, None] & (columns < width)[None, :]
            row = tl.load(table + row_starts[:, None] + columns[None, :], mask=mask, other=0.0)
            sums += weight[:, None] * row.to(tl.float32)
        tl.store(output + token * width + columns, tl.sum(sums, axis=0), mask=columns < width)

    @triton.jit
    def _down_by_expert(
        weights, rows, order, table, output, num_entries, active, width, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr
    ):
        """`output[e // active] += weights[e] table[rows[p]]`, e = order[p]. A block of p and of columns."""
        blocks = tl.cdiv(width, COLUMNS)
        positions = (tl.program_id(0) // blocks).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
        columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
        present = positions < num_entries
        entries = tl.load(order + positions, mask=present, other=0)
        weight = tl.load(weights + entries, mask=present, other=0.0).to(tl.float32)
        row_starts = tl.load(rows + positions, mask=present, other=0) * width
        mask = present[:, None] & (columns < width)[None, :]
        row = tl.load(table + row_starts[:, None] + columns[None, :], mask=mask, other=0.0)
        token_starts = entries // active * width
        # Other programs add to the same token.
        tl.atomic_add(
            output + token_starts[:, None] + columns[None, :],
            weight[:, None] * row.to(tl.float32),
            mask=mask,
            sem="relaxed",
        )

    @triton.jit
    def _row_gradient(
        coefficients,
        tokens,
        order,
        starts,
        places,
        values,
        active,
        width,
        ENTRIES: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """
        `values[u] = Σ coefficients[e] tokens[e // active]`, e = order[starts[u]] … order[starts[u + 1] - 1], in row
        `places[u]` unless `places` is None. One u and a block of columns.
        """
        blocks = tl.cdiv(width, COLUMNS)
        group = (tl.program_id(0) // blocks).to(tl.int64)
        columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
        end = tl.load(starts + group + 1)
        sums = tl.zeros([ENTRIES, COLUMNS], dtype=tl.float32)
        for first in range(tl.load(starts + group), end, ENTRIES):
            positions = first + tl.arange(0, ENTRIES)
            present = positions < end
            entries = tl.load(order + positions, mask=present, other=0)
            coefficient = tl.load(coefficients + entries, mask=present, other=0.0).to(tl.float32)
            token_starts = entries // active * width
            mask = present[:, None] & (columns < width)[None, :]
            token = tl.load(tokens + token_starts[:, None] + columns[None, :], mask=mask, other=0.0)
            sums += coefficient[:, None] * token.to(tl.float32)
        place = group
        if places is not None:
            place = tl.load(places + group)
        tl.store(values + place * width + columns, tl.sum(sums, axis=0), mask=columns < width)


class TritonKernels:
    """
    The experts in Triton. Signatures are those of [`TorchKernels`]; sums are accumulated in float32 whatever the
    dtypes.
    """

    @staticmethod
    def unavailable_reason(table: torch.Tensor) -> str | None:
        if triton is None:
            return "Triton is not installed."
        if table.device.type != "cuda" and not (INTERPRETED and table.device.type == "cpu"):
            return f"Triton kernels are for a GPU, the experts are on {table.device}."
        if table.dtype not in DTYPES:
            return f"Triton kernels support {sorted(map(str, DTYPES))}, the experts are {table.dtype}."
        return None

    @staticmethod
    def up(hidden_states: torch.Tensor, indices: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        hidden, indices, table = hidden_states.contiguous(), indices.contiguous(), table.contiguous()
        output = hidden.new_empty(indices.shape)
        rows, order = _sorted(indices) if _by_expert(indices, table) else (indices, None)
        count, active, width = indices.numel(), indices.shape[1], table.shape[1]
        blocks = _blocks(width, entries=4, columns=256)
        programs = triton.cdiv(count, blocks["ENTRIES"])
        _launch(_up, programs, hidden, rows, order, table, output, count, active, width, **blocks)
        return output

    @staticmethod
    def down(weights: torch.Tensor, indices: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        weights, indices, table = weights.contiguous(), indices.contiguous(), table.contiguous()
        # The order in which programs add to a token changes from run to run, and the rounding with it.
        if _by_expert(indices, table) and not torch.are_deterministic_algorithms_enabled():
            return _down_sorted(weights, indices, table)
        (num_tokens, active), width = indices.shape, table.shape[1]
        output = weights.new_empty(num_tokens, width)
        blocks = _blocks(width, entries=32, columns=64)
        programs = num_tokens * triton.cdiv(width, blocks["COLUMNS"])
        _launch(_down_by_token, programs, weights, indices, table, output, active, width, **blocks)
        return output

    @staticmethod
    def row_gradient(
        coefficients: torch.Tensor,
        tokens: torch.Tensor,
        indices: torch.Tensor,
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        coefficients, tokens = coefficients.contiguous(), tokens.contiguous()
        named, order = _sorted(indices)
        rows, counts = torch.unique_consecutive(named, return_counts=True)
        starts = F.pad(counts.cumsum(0), (1, 0))
        active, width = indices.shape[1], tokens.shape[1]
        places, values = (None, tokens.new_empty(len(rows), width, dtype=dtype)) if out is None else (rows, out)
        blocks = _blocks(width, entries=8, columns=128)
        programs = len(rows) * triton.cdiv(width, blocks["COLUMNS"])
        _launch(_row_gradient, programs, coefficients, tokens, order, starts, places, values, active, width, **blocks)
        return (rows, values) if out is None else None


def _by_expert(indices: torch.Tensor, table: torch.Tensor) -> bool:
    """
    Whether to process entries by expert. That moves the reads of rows from memory to the cache, and is worth a sort if
    rows are needed several times, the cache cannot hold the table, and it can hold all tokens, in float32.
    """
    num_rows, width = table.shape
    return 4 * indices.shape[0] * width <= CACHE_SIZE < table.nbytes and indices.numel() >= ENTRIES_PER_ROW * num_rows


def _sorted(indices):
    """The rows that entries name, ascending, and the position of the entry that names each."""
    return torch.sort(indices.flatten(), stable=True)


def _down_sorted(weights, indices, table):
    rows, order = _sorted(indices)
    count, active, width = indices.numel(), indices.shape[1], table.shape[1]
    output = weights.new_zeros(len(indices), width, dtype=torch.float32)
    blocks = _blocks(width, entries=16, columns=128)
    programs = triton.cdiv(count, blocks["ENTRIES"]) * triton.cdiv(width, blocks["COLUMNS"])
    _launch(_down_by_expert, programs, weights, rows, order, table, output, count, active, width, **blocks)
    return output.to(weights.dtype)


def _blocks(width, entries, columns):
    """How many entries and columns a program processes at a time. Powers of two."""
    return {"ENTRIES": entries, "COLUMNS": min(triton.next_power_of_2(width), columns)}


def _launch(kernel, programs, *arguments, **blocks):
    # Triton launches on the current device, and a model may be spread over several.
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, **blocks)
