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
"""Experts on a CPU, in C for the processor at hand: every row that a token needs is read from where it lies, once."""

import torch

from .memory_advice import ReusedMemory
from .native_library import DTYPES, PREAMBLE, call, for_each_dtype, load_library, refuse_index
from .product_key_retrieval_cpu import retrieval_gradients, retrieve


SOURCE = (
    PREAMBLE
    + r"""
#include <stdlib.h>

/* Rows that are asked of memory before they are used, for the innermost cache alone: of a large table few come again
   before they would be out of the others. A row is 2 KB at d = 512 in float32. */
#define ROWS_AHEAD 12
/* Vectors that a sum over tokens keeps in registers. */
#define BLOCK 8

/* Sorts numbers below 2^bits, stable, by radix; `order` says where each came from. Buffers of `count`. Returns the sorted
   numbers, in `numbers` or `other_numbers`; `order` is always where the answer is. */
static uint64_t *sort_by_number(uint64_t *numbers, uint64_t *other_numbers, int64_t *order, int64_t *other_order,
                                int64_t count, int bits) {
    enum { RADIX_BITS = 11, RADIX = 1 << RADIX_BITS };
    int64_t *result = order;
    for (int shift = 0; shift < bits; shift += RADIX_BITS) {
        int64_t starts[RADIX + 1] = {0};
        for (int64_t i = 0; i < count; i++) starts[((numbers[i] >> shift) & (RADIX - 1)) + 1]++;
        for (int r = 0; r < RADIX; r++) starts[r + 1] += starts[r];
        for (int64_t i = 0; i < count; i++) {
            int64_t place = starts[(numbers[i] >> shift) & (RADIX - 1)]++;
            other_numbers[place] = numbers[i];
            other_order[place] = order[i];
        }
        uint64_t *sorted = other_numbers;
        other_numbers = numbers; numbers = sorted;
        int64_t *sorted_order = other_order;
        other_order = order; order = sorted_order;
    }
    if (order != result) memcpy(result, order, count * sizeof *order);
    return numbers;
}

/* Groups `count` indices by the row they name: `rows` each row once, ascending, `starts` where its entries start in
   `order`, the numbers of the entries. Returns the number of rows, -1 without memory. */
int64_t group_by_row(const int64_t *indices, int64_t count, int64_t num_rows, int64_t *rows, int64_t *starts,
                     int64_t *order, int threads) {
    (void)threads;
    uint64_t *buffer = malloc((3 * count + 1) * sizeof *buffer);
    if (!buffer) return -1;
    int bits = 0;
    while (bits < 63 && (num_rows - 1) >> bits) bits++;
    for (int64_t i = 0; i < count; i++) { buffer[i] = indices[i]; order[i] = i; }
    const uint64_t *sorted =
        sort_by_number(buffer, buffer + count, order, (int64_t *)buffer + 2 * count, count, bits);
    int64_t found = 0;
    for (int64_t i = 0; i < count; i++)
        if (i == 0 || sorted[i] != sorted[i - 1]) { rows[found] = sorted[i]; starts[found++] = i; }
    starts[found] = count;
    free(buffer);
    return found;
}
"""
    + for_each_dtype(r"""
/* output[t, a] = hidden[t] · table[indices[t, a]]. Returns 0, or -1 for an index that is not in the table. */
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

/* output[t] = Σ_a weights[t, a] table[indices[t, a]]; columns are shared out too, where there are fewer tokens than
   threads. Returns as up does. */
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

/* values[u] = Σ coefficients[e] tokens[e / active] over the entries e = order[starts[u]] … order[starts[u + 1] - 1], for
   every u; written to row `places[u]` where places are given. */
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
    Signatures as in [`TorchKernels`], and retrieval with its gradients. Sparse gradients lie in `gradient_memory`, which keeps
    what a step needed for the next until `CpuKernels.gradient_memory.release()`.
    """

    retrieve = staticmethod(retrieve)
    retrieval_gradients = staticmethod(retrieval_gradients)
    gradient_memory = ReusedMemory()

    @staticmethod
    def unavailable_reason(table: torch.Tensor) -> str | None:
        if table.device.type != "cpu":
            return f"CPU kernels are for the CPU, the experts are on {table.device}."
        if table.dtype not in DTYPES:
            return f"CPU kernels know {sorted(map(str, DTYPES))}, the experts are {table.dtype}."
        return None if load_library(SOURCE) is not None else "there is no C compiler that works."

    @staticmethod
    def up(hidden_states: torch.Tensor, indices: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        _check("hidden_states", hidden_states, (len(indices), table.shape[1]), indices, table)
        hidden, table, indices = _in_memory(hidden_states, table.dtype), table.contiguous(), indices.contiguous()
        output = hidden.new_empty(indices.shape)
        if _call("up", table.dtype, hidden, indices, table, output, table.shape[0], *indices.shape, table.shape[1]):
            refuse_index(indices, table.shape[0])
        return output.to(hidden_states.dtype)

    @staticmethod
    def down(weights: torch.Tensor, indices: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        _check("weights", weights, indices.shape, indices, table)
        factors, table, indices = _in_memory(weights, table.dtype), table.contiguous(), indices.contiguous()
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
        _check("coefficients", coefficients, indices.shape, indices)
        _check("tokens", tokens, (len(indices), tokens.shape[1] if out is None else out.shape[1]), indices)
        coefficients, tokens = _in_memory(coefficients, dtype), _in_memory(tokens, dtype)
        active, width = indices.shape[1], tokens.shape[1]
        rows, starts, order = _group_by_row(indices.contiguous(), None if out is None else out.shape[0])
        values = CpuKernels.gradient_memory.empty(len(rows), width, dtype=dtype) if out is None else out
        places = None if out is None else rows
        _call("row_gradient", dtype, coefficients, tokens, order, starts, places, values, len(rows), active, width)
        return (rows, values) if out is None else None


def _check(name, tensor, shape, *others):
    """Before C reads them: `tensor` of a shape, and int64 indices of two dimensions first among the others."""
    if tensor.shape != shape or others[0].ndim != 2:
        raise ValueError(
            f"`{name}` must be of shape {tuple(shape)} with `indices` of shape (num_tokens, num_active), got "
            f"{tuple(tensor.shape)} and {tuple(others[0].shape)}."
        )
    if others[0].dtype != torch.int64:
        raise ValueError(f"`indices` must be int64, got {others[0].dtype}.")
    for other in (tensor, *others):
        if other.device.type != "cpu":
            raise ValueError(f"Tokens, indices and experts must be on the CPU together, one is on {other.device}.")


def _in_memory(tensor, dtype):
    """As the kernels for a table of `dtype` read it: in the dtype that sums are taken in."""
    return tensor.to(torch.float64 if dtype == torch.float64 else torch.float32).contiguous()


def _group_by_row(indices, num_rows):
    """
    Rows named by `indices`, each once, and the entries that name each: `order[starts[u] : starts[u + 1]]`. Every row is
    below `num_rows`, if that is not `None`.
    """
    count = indices.numel()
    rows, starts, order = (torch.empty(size, dtype=torch.int64) for size in (count, count + 1, count))
    least, most = map(int, indices.aminmax()) if count else (0, -1)
    if least < 0 or (num_rows is not None and most >= num_rows):
        refuse_index(indices, "N" if num_rows is None else num_rows)
    found = call(SOURCE, "group_by_row", indices, count, most + 1, rows, starts, order)
    if found < 0:
        raise MemoryError(f"No memory to sort the {count} experts of {indices.shape[0]} tokens.")
    return rows[:found], starts[: found + 1], order


def _call(name, dtype, *arguments):
    return call(SOURCE, f"{name}_{DTYPES[dtype]}", *arguments)
