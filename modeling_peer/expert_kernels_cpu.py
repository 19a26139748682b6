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
"""Experts on a CPU, in C for the processor at hand: each row that a token needs is read from where it lies, once."""

import torch

from .factored_gradient_cpu import group, row_gradient, squared_norm
from .native_calls import (
    DTYPES,
    PREAMBLE,
    call,
    check_in_memory,
    check_shape,
    check_tensor,
    for_each_dtype,
    refuse_index,
)
from .native_library import load_library, missing_library_reason
from .product_key_retrieval_cpu import retrieval_gradients, retrieve
from .quantized_kernels_cpu import quantized_down, quantized_up


SOURCE = (
    PREAMBLE
    + r"""
/* How many rows ahead of their use memory is prefetched, into the innermost cache alone: few rows of a large table are
   used again before the other caches would evict them. A row is 2 KB at d = 512 in float32. */
#define ROWS_AHEAD 12
"""
    + for_each_dtype(r"""
/* output[t, a] = hidden[t] · table[indices[t, a]]. Returns 0, or -1 if an index is out of range. */
int64_t NAME(up)(const SUM *hidden, const int64_t *indices, const ROW *table, SUM *output, int64_t num_rows,
             int64_t num_tokens, int64_t active, int64_t width, int threads) {
    int failed = 0;
    const int64_t count = num_tokens * active, unrolled = width - width % (4 * WIDTH), whole = width - width % WIDTH;
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t entry = 0; entry < count; entry++) {
        if ((uint64_t)indices[entry] >= (uint64_t)num_rows) {
            #pragma omp atomic write
            failed = -1;
            continue;
        }
        const SUM *token = hidden + entry / active * width;
        const ROW *row = table + indices[entry] * width;
        const ROW *ahead = table + indices[entry + ROWS_AHEAD < count ? entry + ROWS_AHEAD : entry] * width;
        VECTOR sums[4] = {};
        int64_t i = 0;
        for (; i < unrolled; i += 4 * WIDTH)
            for (int j = 0; j < 4; j++) {
                __builtin_prefetch(ahead + i + j * WIDTH, 0, 0);
                VECTOR x;
                memcpy(&x, token + i + j * WIDTH, sizeof x);
                sums[j] += x * LOAD(row + i + j * WIDTH);
            }
        for (; i < whole; i += WIDTH) {
            VECTOR x;
            memcpy(&x, token + i, sizeof x);
            sums[0] += x * LOAD(row + i);
        }
        VECTOR lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        SUM sum = 0;
        for (int lane = 0; lane < WIDTH; lane++) sum += lanes[lane];
        for (; i < width; i++) sum += token[i] * GET(row + i);
        output[entry] = sum;
    }
    return failed;
}

/* output[t] = Σ_a weights[t, a] table[indices[t, a]]. Where there are fewer tokens than threads, threads share the
   columns too. Returns 0, or -1 if an index is out of range. */
int64_t NAME(down)(const SUM *weights, const int64_t *indices, const ROW *table, SUM *output, int64_t num_rows,
               int64_t num_tokens, int64_t active, int64_t width, int threads) {
    int failed = 0;
    const int64_t parts = num_tokens < threads ? threads : 1;
    const int64_t step = ((width + parts - 1) / parts + WIDTH - 1) / WIDTH * WIDTH;
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < num_tokens * parts; task++) {
        const int64_t t = task / parts, first = task % parts * step;
        const int64_t columns = first + step < width ? step : width - first, whole = columns - columns % WIDTH;
        SUM *sums = output + t * width + first;
        for (int64_t i = 0; i < columns; i++) sums[i] = 0;
        for (int64_t a = 0; a < active; a++) {
            const int64_t entry = t * active + a, last = num_tokens * active - 1;
            if ((uint64_t)indices[entry] >= (uint64_t)num_rows) {
                #pragma omp atomic write
                failed = -1;
                continue;
            }
            const SUM weight = weights[entry];
            const ROW *row = table + indices[entry] * width + first;
            const ROW *ahead = table + indices[entry + ROWS_AHEAD < last ? entry + ROWS_AHEAD : last] * width + first;
            int64_t i = 0;
            for (; i < whole; i += WIDTH) {
                __builtin_prefetch(ahead + i, 0, 0);
                VECTOR sum;
                memcpy(&sum, sums + i, sizeof sum);
                sum += weight * LOAD(row + i);
                memcpy(sums + i, &sum, sizeof sum);
            }
            for (; i < columns; i++) sums[i] += weight * GET(row + i);
        }
    }
    return failed;
}
""")
)


class CpuKernels:
    """
    The experts and their gradients in C. Signatures are those of [`TorchKernels`], with product-key retrieval and its
    gradients in addition.

    Every method checks its arguments before C reads them and raises `ValueError` naming the one that C cannot read,
    and `IndexError` for an expert index that is out of range.
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
        if not table.is_cpu:
            return f"CPU kernels are for the CPU, the experts are on {table.device}."
        if table.dtype not in DTYPES:
            return f"CPU kernels support {sorted(map(str, DTYPES))}, the experts are {table.dtype}."
        return None if load_library(SOURCE) is not None else missing_library_reason()

    @staticmethod
    def up(hidden_states: torch.Tensor, indices: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """`(hidden [T, d], indices [T, A], table [N, d]) -> [T, A]`"""
        _check_experts(indices, table)
        check_shape("hidden_states", hidden_states, (indices.shape[0], table.shape[1]), "(num_tokens, hidden_size)")
        hidden, table, indices = (
            _in_memory("hidden_states", hidden_states, table.dtype),
            table.contiguous(),
            indices.contiguous(),
        )
        output = hidden.new_empty(indices.shape)
        if _call("up", table.dtype, hidden, indices, table, output, table.shape[0], *indices.shape, table.shape[1]):
            refuse_index(indices, table.shape[0])
        return output.to(hidden_states.dtype)

    @staticmethod
    def down(weights: torch.Tensor, indices: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """`(weights [T, A], indices [T, A], table [N, d]) -> [T, d]`"""
        _check_experts(indices, table)
        check_shape("weights", weights, indices.shape, "(num_tokens, num_active)")
        factors, table, indices = _in_memory("weights", weights, table.dtype), table.contiguous(), indices.contiguous()
        output = factors.new_empty(weights.shape[0], table.shape[1])
        if _call("down", table.dtype, factors, indices, table, output, table.shape[0], *indices.shape, table.shape[1]):
            refuse_index(indices, table.shape[0])
        return output.to(weights.dtype)


def _check_experts(indices, table=None):
    check_tensor("indices", indices, 2, (torch.int64,))
    if table is not None:
        check_tensor("table", table, 2, DTYPES)


def _in_memory(name, tensor, dtype):
    """
    A tensor as the kernels for a table of `dtype` read it: contiguous, in the dtype in which sums are accumulated.
    """
    check_in_memory(name, tensor)
    return tensor.to(torch.float64 if dtype == torch.float64 else torch.float32).contiguous()


def _call(name, dtype, *arguments):
    return call(SOURCE, f"{name}_{DTYPES[dtype]}", *arguments)
