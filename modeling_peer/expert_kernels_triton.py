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
Experts on a GPU, in Triton. A program reads whole rows, several at a time, 16 bytes a load where the width allows.

Without Triton the module can be imported, and `TritonKernels.unavailable_reason` says what is missing.
"""

import torch

from .factored_gradient_triton import group, row_gradient, squared_norm
from .product_key_retrieval_triton import retrieval_gradients, retrieve
from .quantized_kernels_triton import quantized_down, quantized_up
from .triton_launch import DTYPES, can_run_on, check_indices, launch, row_blocks, tl, triton


# Rows that a program reads at the same time.
ROWS = 4

# Of fewer tokens, `down` divides the columns among more programs, each of which reads more rows at the same time.
MANY_TOKENS = 512


if triton is not None:

    @triton.jit
    def _up(
        hidden,
        indices,
        table,
        output,
        active,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """`output[t, a] = hidden[t] · table[indices[t, a]]`, one t and a block of a."""
        token = tl.program_id(0).to(tl.int64)
        places = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        present = places < active
        row_starts = tl.load(indices + token * active + places, mask=present, other=0) * WIDTH
        products = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for first in range(0, WIDTH, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            mask = present[:, None] & (columns < WIDTH)[None, :]
            row = tl.load(table + row_starts[:, None] + columns[None, :], mask=mask, other=0.0)
            state = tl.load(hidden + token * WIDTH + columns, mask=columns < WIDTH, other=0.0)
            products += state.to(tl.float32)[None, :] * row.to(tl.float32)
        tl.store(output + token * active + places, tl.sum(products, axis=1), mask=present)

    @triton.jit
    def _down(
        weights,
        indices,
        table,
        output,
        active,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """`output[t] = Σ_a weights[t, a] table[indices[t, a]]`, one t and a block of columns."""
        token = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        sums = tl.zeros([COLUMNS], dtype=tl.float32)
        for first in range(0, active, ROWS):
            places = first + tl.arange(0, ROWS)
            present = places < active
            weight = tl.load(weights + token * active + places, mask=present, other=0.0).to(tl.float32)
            row_starts = tl.load(indices + token * active + places, mask=present, other=0) * WIDTH
            mask = present[:, None] & (columns < WIDTH)[None, :]
            row = tl.load(table + row_starts[:, None] + columns[None, :], mask=mask, other=0.0)
            sums += tl.sum(weight[:, None] * row.to(tl.float32), axis=0)
        tl.store(output + token * WIDTH + columns, sums, mask=columns < WIDTH)


class TritonKernels:
    """
    The experts and their gradients in Triton. Signatures are those of [`TorchKernels`], with product-key retrieval and
    its gradients in addition; sums are accumulated in float32 whatever the dtypes.

    No method waits for the GPU, unless the environment variable `MODELING_PEER_CHECK_INDICES` is 1: an index that is
    out of range then raises `IndexError`.
    """

    quantized_up = staticmethod(quantized_up)
    quantized_down = staticmethod(quantized_down)
    group = staticmethod(group)
    row_gradient = staticmethod(row_gradient)
    squared_norm = staticmethod(squared_norm)
    retrieve = staticmethod(retrieve)
    retrieval_gradients = staticmethod(retrieval_gradients)

    @staticmethod
    def unavailable_reason(table: torch.Tensor) -> str | None:
        """Why these kernels cannot run on a table, a sentence, or `None` if they can."""
        if triton is None:
            return "Triton is not installed."
        if not can_run_on(table.device):
            return f"Triton kernels are for a GPU, the experts are on {table.device}."
        if table.dtype not in DTYPES:
            return f"Triton kernels support {sorted(map(str, DTYPES))}, the experts are {table.dtype}."
        return None

    @staticmethod
    def up(hidden_states: torch.Tensor, indices: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """`(hidden [T, d], indices [T, A], table [N, d]) -> [T, A]`"""
        check_indices(indices, len(table))
        hidden, indices, table = hidden_states.contiguous(), indices.contiguous(), table.contiguous()
        output = hidden.new_empty(indices.shape)
        num_tokens, active = indices.shape
        blocks = row_blocks(table.shape[1], ROWS)
        grid = num_tokens, triton.cdiv(active, blocks["ROWS"])
        launch(_up, grid, hidden, indices, table, output, active, **blocks)
        return output

    @staticmethod
    def down(weights: torch.Tensor, indices: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """`(weights [T, A], indices [T, A], table [N, d]) -> [T, d]`"""
        check_indices(indices, len(table))
        weights, indices, table = weights.contiguous(), indices.contiguous(), table.contiguous()
        (num_tokens, active), width = indices.shape, table.shape[1]
        output = weights.new_empty(num_tokens, width)
        blocks = row_blocks(width, ROWS) if num_tokens >= MANY_TOKENS else row_blocks(width, 128, most_columns=64)
        grid = num_tokens, triton.cdiv(width, blocks["COLUMNS"])
        launch(_down, grid, weights, indices, table, output, active, **blocks)
        return output
