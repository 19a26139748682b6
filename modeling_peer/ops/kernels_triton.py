# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Experts on a GPU, in Triton. A program reads several rows at a time, with loads of 16 bytes if the width allows.

Without Triton the module can be imported, and `TritonKernels.unavailable_reason` says what is missing.
"""

import torch

from .gradient_triton import group, row_gradient, squared_norm
from .quantized_rows import QuantizedRows
from .retrieval_triton import retrieval_gradients, retrieve
from .triton_launch import DTYPES, can_run_on, check_indices, gpu_problem, launch, row_blocks, tl, triton


# Rows that a program reads at the same time.
ROWS = 4

# With fewer tokens, `down` divides the columns among more programs, each of which reads more rows at a time.
MANY_TOKENS = 512


if triton is not None:

    @triton.jit
    def _up(
        hidden,
        indices,
        table,
        scales,
        output,
        active,
        SPAN: tl.constexpr,
        GROUPS: tl.constexpr,
        BITS: tl.constexpr,
        ELEMENTS: tl.constexpr,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """
        Compute `output[t, a] = hidden[t] · table[indices[t, a]]` for one t and a block of a. A token has ELEMENTS, and
        a row of the table has WIDTH, two elements each if BITS = 4.
        """
        token = tl.program_id(0).to(tl.int64)
        places = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        present = places < active
        rows = tl.load(indices + token * active + places, mask=present, other=0)
        products = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for first in range(0, WIDTH, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            inside = columns < WIDTH
            mask = present[:, None] & inside[None, :]
            values = tl.load(table + rows[:, None] * WIDTH + columns[None, :], mask=mask, other=0)
            state = tl.load(hidden + token * ELEMENTS + columns, mask=inside, other=0.0).to(tl.float32)
            if BITS == 4:
                behind = tl.load(
                    hidden + token * ELEMENTS + WIDTH + columns, mask=columns < ELEMENTS - WIDTH, other=0.0
                )
                signed = values.to(tl.int32)
                sums = state[None, :] * ((signed << 28) >> 28).to(tl.float32)
                sums += behind.to(tl.float32)[None, :] * ((signed << 24) >> 28).to(tl.float32)
            else:
                sums = state[None, :] * values.to(tl.float32)
            if scales is not None:
                scale = tl.load(scales + rows[:, None] * GROUPS + (columns // SPAN)[None, :], mask=mask, other=0.0)
                sums *= scale.to(tl.float32)
            products += sums
        tl.store(output + token * active + places, tl.sum(products, axis=1), mask=present)

    @triton.jit
    def _down(
        weights,
        indices,
        table,
        scales,
        output,
        active,
        SPAN: tl.constexpr,
        GROUPS: tl.constexpr,
        BITS: tl.constexpr,
        ELEMENTS: tl.constexpr,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """Compute `output[t] = Σ_a weights[t, a] table[indices[t, a]]` for one t and a block of columns. See `_up`."""
        token = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < WIDTH
        sums = tl.zeros([COLUMNS], dtype=tl.float32)
        behind = tl.zeros([COLUMNS], dtype=tl.float32)
        for first in range(0, active, ROWS):
            places = first + tl.arange(0, ROWS)
            present = places < active
            factors = tl.load(weights + token * active + places, mask=present, other=0.0).to(tl.float32)[:, None]
            rows = tl.load(indices + token * active + places, mask=present, other=0)
            mask = present[:, None] & inside[None, :]
            values = tl.load(table + rows[:, None] * WIDTH + columns[None, :], mask=mask, other=0)
            if scales is not None:
                scale = tl.load(scales + rows[:, None] * GROUPS + (columns // SPAN)[None, :], mask=mask, other=0.0)
                factors = factors * scale.to(tl.float32)
            if BITS == 4:
                signed = values.to(tl.int32)
                sums += tl.sum(factors * ((signed << 28) >> 28).to(tl.float32), axis=0)
                behind += tl.sum(factors * ((signed << 24) >> 28).to(tl.float32), axis=0)
            else:
                sums += tl.sum(factors * values.to(tl.float32), axis=0)
        tl.store(output + token * ELEMENTS + columns, sums, mask=inside)
        if BITS == 4:
            tl.store(output + token * ELEMENTS + WIDTH + columns, behind, mask=columns < ELEMENTS - WIDTH)


class TritonKernels:
    """
    The experts and their gradients in Triton. Signatures are those of [`TorchKernels`], with product-key retrieval and
    its gradients in addition; sums are accumulated in float32 whatever the dtypes.

    No method waits for the GPU, unless the environment variable `MODELING_PEER_CHECK_INDICES` is 1: an index that is
    out of range then raises `IndexError`.
    """

    group = staticmethod(group)
    row_gradient = staticmethod(row_gradient)
    squared_norm = staticmethod(squared_norm)
    retrieve = staticmethod(retrieve)
    retrieval_gradients = staticmethod(retrieval_gradients)

    @staticmethod
    def unavailable_reason(table: torch.Tensor) -> str | None:
        """Return a sentence that says why these kernels cannot run on a table, or `None` if they can."""
        if table.is_cuda and gpu_problem() is not None:
            return gpu_problem()
        if triton is None:
            return "Triton is not installed."
        if not can_run_on(table.device):
            return f"Triton kernels are for a GPU, the experts are on {table.device}."
        if table.dtype not in DTYPES:
            return f"Triton kernels support {sorted(map(str, DTYPES))}, the experts are {table.dtype}."
        return None

    @staticmethod
    def up(hidden_states: torch.Tensor, rows: torch.Tensor, table: torch.Tensor | QuantizedRows) -> torch.Tensor:
        """`(hidden [T, d], rows [T, A], table [N, d]) -> [T, A]`"""
        output = hidden_states.new_empty(rows.shape)
        blocks = row_blocks(_elements(table).shape[1], ROWS)
        grid = len(rows), triton.cdiv(rows.shape[1], blocks["ROWS"])
        _launch(_up, grid, hidden_states, rows, table, output, blocks)
        return output

    @staticmethod
    def down(weights: torch.Tensor, rows: torch.Tensor, table: torch.Tensor | QuantizedRows) -> torch.Tensor:
        """`(weights [T, A], rows [T, A], table [N, d]) -> [T, d]`"""
        width = _elements(table).shape[1]
        output = weights.new_empty(len(rows), table.width if isinstance(table, QuantizedRows) else width)
        many = len(rows) >= MANY_TOKENS
        blocks = row_blocks(width, ROWS) if many else row_blocks(width, 128, most_columns=64)
        grid = len(rows), triton.cdiv(width, blocks["COLUMNS"])
        _launch(_down, grid, weights, rows, table, output, blocks)
        return output


def _elements(table):
    return table.integers if isinstance(table, QuantizedRows) else table


def _launch(kernel, grid, tokens, rows, table, output, blocks):
    """Launch a kernel for a plain table or for a quantized one."""
    elements, scales = _elements(table).contiguous(), None
    check_indices(rows, len(elements))
    options = {"SPAN": 1, "GROUPS": 1, "BITS": 0, "ELEMENTS": elements.shape[1], **blocks}
    if isinstance(table, QuantizedRows):
        scales = table.scales.contiguous()
        of_groups = {"SPAN": table.bytes_per_scale, "GROUPS": scales.shape[1], "BITS": table.bits}
        options |= {**of_groups, "ELEMENTS": table.width}
    launch(kernel, grid, tokens.contiguous(), rows.contiguous(), elements, scales, output, rows.shape[1], **options)
