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

from .memory_advice import ReusedMemory
from .native_library import (
    DTYPES,
    PREAMBLE,
    call,
    check_in_memory,
    check_shape,
    check_tensor,
    for_each_dtype,
    load_library,
    missing_library_reason,
    refuse_index,
)
from .product_key_retrieval_cpu import retrieval_gradients, retrieve


SOURCE = (
    PREAMBLE
    + r"""
#include <stdlib.h>

/* How many rows ahead of their use memory is prefetched, into the innermost cache alone: few rows of a large table are
   used again before the other caches would evict them. A row is 2 KB at d = 512 in float32. */
#define ROWS_AHEAD 12
/* Number of vectors that a sum over tokens keeps in registers. */
#define BLOCK 8

/* Stable radix sort of `count` keys below 2^bits; `order` is permuted with them. The other two are buffers of `count`.
   Returns the sorted keys, in `keys` or `other_keys`; the permutation always ends up in `order`. */
static uint64_t *radix_sort(uint64_t *keys, uint64_t *other_keys, int64_t *order, int64_t *other_order, int64_t count,
                            int bits) {
    enum { RADIX_BITS = 11, RADIX = 1 << RADIX_BITS };
    int64_t *result = order;
    for (int shift = 0; shift < bits; shift += RADIX_BITS) {
        int64_t starts[RADIX + 1] = {0};
        for (int64_t i = 0; i < count; i++) starts[((keys[i] >> shift) & (RADIX - 1)) + 1]++;
        for (int r = 0; r < RADIX; r++) starts[r + 1] += starts[r];
        for (int64_t i = 0; i < count; i++) {
            int64_t place = starts[(keys[i] >> shift) & (RADIX - 1)]++;
            other_keys[place] = keys[i];
            other_order[place] = order[i];
        }
        uint64_t *sorted = other_keys;
        other_keys = keys; keys = sorted;
        int64_t *sorted_order = other_order;
        other_order = order; order = sorted_order;
    }
    if (order != result) memcpy(result, order, count * sizeof *order);
    return keys;
}

/* Groups `count` entries by the row that their index names. Writes each row once to `rows`, ascending; the positions
   of the entries, grouped, to `order`; and where each group starts in `order` to `starts`. Returns the number of rows,
   or -1 if out of memory. */
int64_t group_by_row(const int64_t *indices, int64_t count, int64_t num_rows, int64_t *rows, int64_t *starts,
                     int64_t *order, int threads) {
    (void)threads;
    uint64_t *buffer = malloc((3 * count + 1) * sizeof *buffer);
    if (!buffer) return -1;
    int bits = 0;
    while (bits < 63 && (num_rows - 1) >> bits) bits++;
    for (int64_t i = 0; i < count; i++) { buffer[i] = indices[i]; order[i] = i; }
    const uint64_t *sorted =
        radix_sort(buffer, buffer + count, order, (int64_t *)buffer + 2 * count, count, bits);
    int64_t found = 0;
    for (int64_t i = 0; i < count; i++)
        if (i == 0 || sorted[i] != sorted[i - 1]) { rows[found] = sorted[i]; starts[found++] = i; }
    starts[found] = count;
    free(buffer);
    return found;
}
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

/* values[u] = Σ coefficients[e] tokens[e / active] over the entries e = order[starts[u]] … order[starts[u + 1] - 1],
   for every u; written to row `places[u]` unless `places` is NULL. */
void NAME(row_gradient)(const SUM *coefficients, const SUM *tokens, const int64_t *order, const int64_t *starts,
                        const int64_t *places, ROW *values, int64_t num_rows, int64_t active, int64_t width,
                        int threads) {
    const int64_t blocks = width - width % (BLOCK * WIDTH), whole = width - width % WIDTH;
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t u = 0; u < num_rows; u++) {
        ROW *value = values + (places ? places[u] : u) * width;
        const int64_t first = starts[u], end = starts[u + 1];
        int64_t i = 0;
        for (; i < blocks; i += BLOCK * WIDTH) {
            VECTOR sums[BLOCK] = {};
            for (int64_t e = first; e < end; e++) {
                const SUM coefficient = coefficients[order[e]], *token = tokens + order[e] / active * width + i;
                for (int j = 0; j < BLOCK; j++) {
                    VECTOR x;
                    memcpy(&x, token + j * WIDTH, sizeof x);
                    sums[j] += coefficient * x;
                }
            }
            for (int j = 0; j < BLOCK; j++) STORE(value + i + j * WIDTH, sums[j]);
        }
        for (; i < whole; i += WIDTH) {
            VECTOR sum = {};
            for (int64_t e = first; e < end; e++) {
                VECTOR x;
                memcpy(&x, tokens + order[e] / active * width + i, sizeof x);
                sum += coefficients[order[e]] * x;
            }
            STORE(value + i, sum);
        }
        for (; i < width; i++) {
            SUM sum = 0;
            for (int64_t e = first; e < end; e++)
                sum += coefficients[order[e]] * tokens[order[e] / active * width + i];
            PUT(value + i, sum);
        }
    }
}
""")
)


class CpuKernels:
    """
    The experts in C. Signatures are those of [`TorchKernels`], with product-key retrieval and its gradients in
    addition.

    Every method checks its arguments before C reads them and raises `ValueError` naming the one that C cannot read,
    and `IndexError` for an expert index that is out of range.

    Attributes:
        gradient_memory (`ReusedMemory`): Holds the sparse gradients of all models of the process. It keeps what one
            step needed for the next, until `CpuKernels.gradient_memory.release()`.
    """

    retrieve = staticmethod(retrieve)
    retrieval_gradients = staticmethod(retrieval_gradients)

    # Of the process: autograd computes gradients with no model at hand that could hold it. It goes by reference
    # counts, as nothing else tells when a gradient is no longer in use, and a wrong count would corrupt one: see
    # `ReusedMemory`.
    gradient_memory = ReusedMemory()

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

    @staticmethod
    def row_gradient(
        coefficients: torch.Tensor,
        tokens: torch.Tensor,
        indices: torch.Tensor,
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See [`TorchKernels`]. `out` must be contiguous, it is written in place."""
        _check_experts(indices)
        check_shape("coefficients", coefficients, indices.shape, "(num_tokens, num_active)")
        if dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {sorted(map(str, DTYPES))}, got {dtype}.")
        if out is not None:
            check_tensor("out", out, 2, (dtype,))
            if not out.is_contiguous():
                raise ValueError(f"`out` must be contiguous, got strides {out.stride()} of shape {tuple(out.shape)}.")
        width = tokens.shape[-1] if out is None else out.shape[1]
        check_shape("tokens", tokens, (len(indices), width), "(num_tokens, hidden_size)")
        coefficients, tokens = _in_memory("coefficients", coefficients, dtype), _in_memory("tokens", tokens, dtype)
        rows, starts, order = _group_by_row(indices.contiguous(), None if out is None else out.shape[0])
        values = CpuKernels.gradient_memory.empty(len(rows), width, dtype=dtype) if out is None else out
        places = None if out is None else rows
        sizes = (len(rows), indices.shape[1], width)
        _call("row_gradient", dtype, coefficients, tokens, order, starts, places, values, *sizes)
        return (rows, values) if out is None else None


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


def _group_by_row(indices, num_rows):
    """
    Group the entries of `indices` by the row they name: the rows, each once and ascending, `starts`, and `order`,
    where `order[starts[u] : starts[u + 1]]` are the entries of row u. Every row must be below `num_rows` unless that
    is `None`.
    """
    count = indices.numel()
    rows, starts, order = (torch.empty(size, dtype=torch.int64) for size in (count, count + 1, count))
    least, most = map(int, indices.aminmax()) if count else (0, -1)
    if least < 0 or (num_rows is not None and most >= num_rows):
        refuse_index(indices, "N" if num_rows is None else num_rows)
    found = call(SOURCE, "group_by_row", indices, count, most + 1, rows, starts, order)
    if found < 0:
        raise MemoryError(f"Out of memory while sorting {count} expert indices.")
    return rows[:found], starts[: found + 1], order


def _call(name, dtype, *arguments):
    return call(SOURCE, f"{name}_{DTYPES[dtype]}", *arguments)
