# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Factored gradients on a GPU, in Triton: group assignments by row, and compute the rows of a gradient and their norm
from its factors.

No function waits for the GPU: shapes do not depend on how many rows are named. The order of additions is the same in
every run.
"""

import torch
from torch.nn import functional as F

from .triton_launch import check_indices, launch, row_blocks, tl, triton


# A row that very many assignments name must not be one chain of additions. If all assignments of a chunk name the same
# row, a program of its own sums the chunk first.
CHUNK = 256

# Assignments whose tokens a program reads at the same time.
ASSIGNMENTS = 4


if triton is not None:

    @triton.jit
    def _sum_assignments(
        coefficients,
        sources,
        tokens,
        first,
        end,
        gap_start,
        gap,
        columns,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """
        Compute `Σ coefficients[e] tokens[sources[e]]` over `first <= e < end`, except for `gap` assignments from
        `gap_start` on. Assignments with a zero coefficient are skipped.
        """
        sums = tl.zeros([COLUMNS], dtype=tl.float32)
        for start in range(first, end - gap, ROWS):
            assignments = start + tl.arange(0, ROWS)
            assignments += tl.where(assignments < gap_start, 0, gap)
            present = assignments < end
            coefficient = tl.load(coefficients + assignments, mask=present, other=0.0).to(tl.float32)
            source = tl.load(sources + assignments, mask=present, other=0).to(tl.int64)
            mask = (coefficient != 0)[:, None] & (columns < WIDTH)[None, :]
            token = tl.load(tokens + source[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)
            sums += tl.sum(coefficient[:, None] * token.to(tl.float32), axis=0)
        return sums

    @triton.jit
    def sum_group(
        coefficients,
        sources,
        starts,
        tokens,
        partial_sums,
        group,
        columns,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        CHUNK: tl.constexpr,
    ):
        """Sum a group's assignments in some columns. Chunks that belong to this group alone are already summed."""
        first = tl.load(starts + group)
        end = tl.load(starts + group + 1)
        chunks_start = tl.minimum((first + CHUNK - 1) // CHUNK * CHUNK, end)
        in_chunks = tl.maximum(end // CHUNK * CHUNK - chunks_start, 0)
        sums = _sum_assignments(
            coefficients, sources, tokens, first, end, chunks_start, in_chunks, columns, WIDTH, ROWS, COLUMNS
        )
        chunk_sums = partial_sums + (chunks_start // CHUNK).to(tl.int64) * WIDTH + columns
        for _ in range(in_chunks // CHUNK):
            sums += tl.load(chunk_sums, mask=columns < WIDTH, other=0.0)
            chunk_sums += WIDTH
        return sums

    @triton.jit(do_not_specialize=["num_groups"])
    def _sum_chunk(
        coefficients,
        sources,
        starts,
        tokens,
        partial_sums,
        num_groups,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        CHUNK: tl.constexpr,
    ):
        """Write a block of columns of `partial_sums[c]`, the sum of chunk c, if its assignments are of one group."""
        chunk = tl.program_id(0)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        first = chunk * CHUNK
        # The last group that starts at the first assignment or before it.
        group = 0
        above = num_groups
        while group + 1 < above:
            middle = (group + above) // 2
            is_before = tl.load(starts + middle) <= first
            group = tl.where(is_before, middle, group)
            above = tl.where(is_before, above, middle)
        if tl.load(starts + group + 1) >= first + CHUNK:
            sums = _sum_assignments(
                coefficients, sources, tokens, first, first + CHUNK, 0, 0, columns, WIDTH, ROWS, COLUMNS
            )
            tl.store(partial_sums + chunk.to(tl.int64) * WIDTH + columns, sums, mask=columns < WIDTH)

    @triton.jit
    def _row_gradient(
        coefficients,
        sources,
        starts,
        tokens,
        partial_sums,
        out,
        places,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        CHUNK: tl.constexpr,
    ):
        """Write a block of columns of the sum of group g to `out[places[g]]`, or to `out[g]` if `places` is None."""
        group = tl.program_id(0)
        place = group
        if places is not None:
            place = tl.load(places + group)
            if tl.load(starts + group) == tl.load(starts + group + 1):
                return
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        sums = sum_group(
            coefficients, sources, starts, tokens, partial_sums, group, columns, WIDTH, ROWS, COLUMNS, CHUNK
        )
        tl.store(out + place.to(tl.int64) * WIDTH + columns, sums, mask=columns < WIDTH)

    @triton.jit
    def _squared_norm(
        coefficients,
        sources,
        starts,
        tokens,
        partial_sums,
        of_tokens,
        squares,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        CHUNK: tl.constexpr,
    ):
        """Write `squares[b, g]` of the columns b of row g. If one assignment names the row, b = 0 has all columns."""
        group = tl.program_id(0)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        first = tl.load(starts + group)
        output = squares + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + group
        if tl.load(starts + group + 1) == first + 1:
            coefficient = tl.load(coefficients + first).to(tl.float32)
            used = (coefficient != 0) & (tl.program_id(1) == 0)
            of_token = tl.load(of_tokens + tl.load(sources + first), mask=used, other=0.0)
            tl.store(output, tl.where(used, coefficient * coefficient * of_token, 0.0))
        else:
            sums = sum_group(
                coefficients, sources, starts, tokens, partial_sums, group, columns, WIDTH, ROWS, COLUMNS, CHUNK
            )
            tl.store(output, tl.sum(tl.where(columns < WIDTH, sums * sums, 0.0)))


def group(indices: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See [`TorchKernels.group`]. Returns the largest possible number of groups: the last ones may be empty."""
    check_indices(indices, num_rows)
    count = len(indices)
    named, order = torch.sort(indices.int(), stable=True)
    group_of = F.pad(named[1:] != named[:-1], (1, 0)).cumsum(0, dtype=torch.int32)
    numbers = torch.arange(min(count, num_rows) + 1, dtype=torch.int32, device=indices.device)
    starts = torch.searchsorted(group_of, numbers, out_int32=True)
    rows = named.index_select(0, starts[:-1].clamp(max=max(count - 1, 0)))
    return rows, starts, order.int()


def row_gradient(coefficients, sources, starts, tokens, out, places=None) -> None:
    """See [`TorchKernels.row_gradient`]."""
    factors, options = with_partial_sums(coefficients, sources, starts, tokens)
    launch(_row_gradient, _grid(starts, options), *factors, out, places, **options)


def squared_norm(coefficients, sources, starts, tokens) -> torch.Tensor:
    """See [`TorchKernels.squared_norm`]. Squares of a row are summed in float32."""
    factors, options = with_partial_sums(coefficients, sources, starts, tokens)
    grid = _grid(starts, options)
    of_tokens = torch.linalg.vector_norm(tokens, dim=1, dtype=torch.float32).square()
    squares = torch.empty(grid[::-1], dtype=torch.float32, device=tokens.device)
    launch(_squared_norm, grid, *factors, of_tokens, squares, **options)
    return squares.sum(dtype=torch.float64)


def with_partial_sums(*factors: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], dict[str, int]]:
    """
    Sum the chunks of assignments that name a single row. Returns the first arguments of [`sum_group`], in its order,
    and the options of a kernel that calls it.
    """
    coefficients, sources, starts, tokens = (each.contiguous() for each in factors)
    options = {**row_blocks(tokens.shape[1], ASSIGNMENTS), "CHUNK": CHUNK}
    chunks = len(sources) // CHUNK
    partial_sums = torch.empty(chunks, tokens.shape[1], dtype=torch.float32, device=tokens.device)
    factors = coefficients, sources, starts, tokens, partial_sums
    grid = chunks, triton.cdiv(tokens.shape[1], options["COLUMNS"])
    launch(_sum_chunk, grid, *factors, len(starts) - 1, **options)
    return factors, options


def _grid(starts, options):
    return len(starts) - 1, triton.cdiv(options["WIDTH"], options["COLUMNS"])
