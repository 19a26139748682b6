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
"""Experts whose tables are quantized, on a GPU in Triton: integers are read as they are stored, as in C."""

import torch

from .quantized_rows import QuantizedRows
from .triton_launch import check_indices, launch, row_blocks, tl, triton


# Rows that a program reads at the same time.
ROWS = 4

# Of fewer tokens, `quantized_down` divides the columns among more programs.
MANY_TOKENS = 512


if triton is not None:

    @triton.jit
    def _quantized_up(
        hidden,
        indices,
        integers,
        scales,
        output,
        active,
        width,
        SPAN: tl.constexpr,
        GROUPS: tl.constexpr,
        BITS: tl.constexpr,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """`output[t, a] = hidden[t] · table[indices[t, a]]`, one t and a block of a. WIDTH is in bytes."""
        token = tl.program_id(0).to(tl.int64)
        places = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        present = places < active
        rows = tl.load(indices + token * active + places, mask=present, other=0)
        products = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for first in range(0, WIDTH, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            inside = columns < WIDTH
            mask = present[:, None] & inside[None, :]
            values = tl.load(integers + rows[:, None] * WIDTH + columns[None, :], mask=mask, other=0)
            scale = tl.load(scales + rows[:, None] * GROUPS + (columns // SPAN)[None, :], mask=mask, other=0.0)
            state = tl.load(hidden + token * width + columns, mask=inside, other=0.0).to(tl.float32)
            if BITS == 8:
                sums = state[None, :] * values.to(tl.float32)
            else:
                behind = tl.load(hidden + token * width + WIDTH + columns, mask=columns < width - WIDTH, other=0.0)
                signed = values.to(tl.int32)
                sums = state[None, :] * ((signed << 28) >> 28).to(tl.float32)
                sums += behind.to(tl.float32)[None, :] * ((signed << 24) >> 28).to(tl.float32)
            products += scale.to(tl.float32) * sums
        tl.store(output + token * active + places, tl.sum(products, axis=1), mask=present)

    @triton.jit
    def _quantized_down(
        weights,
        indices,
        integers,
        scales,
        output,
        active,
        width,
        SPAN: tl.constexpr,
        GROUPS: tl.constexpr,
        BITS: tl.constexpr,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """`output[t] = Σ_a weights[t, a] table[indices[t, a]]`, one t and a block of bytes of the rows."""
        token = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < WIDTH
        sums = tl.zeros([COLUMNS], dtype=tl.float32)
        behind = tl.zeros([COLUMNS], dtype=tl.float32)
        for first in range(0, active, ROWS):
            places = first + tl.arange(0, ROWS)
            present = places < active
            weight = tl.load(weights + token * active + places, mask=present, other=0.0).to(tl.float32)
            rows = tl.load(indices + token * active + places, mask=present, other=0)
            mask = present[:, None] & inside[None, :]
            values = tl.load(integers + rows[:, None] * WIDTH + columns[None, :], mask=mask, other=0)
            scale = tl.load(scales + rows[:, None] * GROUPS + (columns // SPAN)[None, :], mask=mask, other=0.0)
            factors = weight[:, None] * scale.to(tl.float32)
            if BITS == 8:
                sums += tl.sum(factors * values.to(tl.float32), axis=0)
            else:
                signed = values.to(tl.int32)
                sums += tl.sum(factors * ((signed << 28) >> 28).to(tl.float32), axis=0)
                behind += tl.sum(factors * ((signed << 24) >> 28).to(tl.float32), axis=0)
        tl.store(output + token * width + columns, sums, mask=inside)
        if BITS == 4:
            tl.store(output + token * width + WIDTH + columns, behind, mask=columns < width - WIDTH)


def quantized_up(hidden_states: torch.Tensor, indices: torch.Tensor, table: QuantizedRows) -> torch.Tensor:
    """See [`TorchKernels.quantized_up`]. Sums are in float32."""
    check_indices(indices, len(table.integers))
    hidden, indices = hidden_states.contiguous(), indices.contiguous()
    output = hidden.new_empty(indices.shape)
    num_tokens, active = indices.shape
    blocks = row_blocks(table.integers.shape[1], ROWS)
    grid = num_tokens, triton.cdiv(active, blocks["ROWS"])
    _launch(_quantized_up, grid, hidden, indices, table, output, blocks)
    return output


def quantized_down(weights: torch.Tensor, indices: torch.Tensor, table: QuantizedRows) -> torch.Tensor:
    """See [`TorchKernels.quantized_down`]. Sums are in float32."""
    check_indices(indices, len(table.integers))
    weights, indices = weights.contiguous(), indices.contiguous()
    num_tokens, num_bytes = len(indices), table.integers.shape[1]
    output = weights.new_empty(num_tokens, table.width)
    many = num_tokens >= MANY_TOKENS
    blocks = row_blocks(num_bytes, ROWS) if many else row_blocks(num_bytes, 128, most_columns=64)
    grid = num_tokens, triton.cdiv(num_bytes, blocks["COLUMNS"])
    _launch(_quantized_down, grid, weights, indices, table, output, blocks)
    return output


def _launch(kernel, grid, tokens, indices, table, output, blocks):
    integers, scales = table.integers.contiguous(), table.scales.contiguous()
    options = {"SPAN": table.bytes_per_scale, "GROUPS": scales.shape[1], "BITS": table.bits, **blocks}
    launch(kernel, grid, tokens, indices, integers, scales, output, indices.shape[1], table.width, **options)
