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
"""Factored gradients on a CPU, in C: entries grouped by row, rows of a gradient and their norm from its factors."""

import torch

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


# The sum of the tokens that name a row. The optimizer's C has it too.
SUM_OF_ENTRIES = r"""
/* Number of vectors that a sum over tokens keeps in registers. */
#define BLOCK 8
"""

SUM_OF_ENTRIES_BY_DTYPE = r"""
/* sums = Σ coefficients[e] tokens[sources[e]] over the entries first <= e < end. An entry whose coefficient is zero is
   passed over, whatever its token is: it may name a frozen row. */
static inline void NAME(sum_entries)(const SUM *coefficients, const int32_t *sources, const SUM *tokens, int64_t first,
                                     int64_t end, int64_t width, SUM *sums) {
    const int64_t blocks = width - width % (BLOCK * WIDTH), whole = width - width % WIDTH;
    int64_t i = 0;
    for (; i < blocks; i += BLOCK * WIDTH) {
        VECTOR parts[BLOCK] = {};
        for (int64_t e = first; e < end; e++) {
            const SUM coefficient = coefficients[e], *token = tokens + sources[e] * width + i;
            if (coefficient == 0) continue;
            for (int j = 0; j < BLOCK; j++) {
                VECTOR x;
                memcpy(&x, token + j * WIDTH, sizeof x);
                parts[j] += coefficient * x;
            }
        }
        memcpy(sums + i, parts, sizeof parts);
    }
    for (; i < whole; i += WIDTH) {
        VECTOR part = {};
        for (int64_t e = first; e < end; e++) {
            VECTOR x;
            memcpy(&x, tokens + sources[e] * width + i, sizeof x);
            if (coefficients[e] != 0) part += coefficients[e] * x;
        }
        memcpy(sums + i, &part, sizeof part);
    }
    for (; i < width; i++) {
        sums[i] = 0;
        for (int64_t e = first; e < end; e++)
            if (coefficients[e] != 0) sums[i] += coefficients[e] * tokens[sources[e] * width + i];
    }
}
"""

SOURCE = (
    PREAMBLE
    + SUM_OF_ENTRIES
    + r"""
#include <stdlib.h>

/* Groups entries by the row that they name. Writes each row once to `rows`, ascending; the entries, grouped, to
   `order`; and where each group starts in `order` to `starts`. Returns the number of groups, -1 if out of memory, or
   -2 if an index is out of range. A stable radix sort of rows and entries that share a word. */
int64_t group(const int64_t *indices, int64_t count, int64_t num_rows, int32_t *rows, int32_t *starts, int32_t *order,
              int threads) {
    (void)threads;
    enum { MOST_BITS = 11 };
    int bits = 1;
    while (bits < 32 && (num_rows - 1) >> bits) bits++;
    const int passes = (bits + MOST_BITS - 1) / MOST_BITS, digit = (bits + passes - 1) / passes;
    uint64_t *words = malloc((2 * count + 1) * sizeof *words), *others = words + count;
    if (!words) return -1;
    uint64_t *const memory = words;
    int64_t outside = 0;
    for (int64_t e = 0; e < count; e++) {
        outside |= (uint64_t)indices[e] >= (uint64_t)num_rows;
        words[e] = (uint64_t)indices[e] << 32 | (uint64_t)e;
    }
    if (outside) { free(memory); return -2; }
    for (int pass = 0; pass < passes; pass++) {
        const int shift = 32 + pass * digit, mask = (1 << digit) - 1;
        int32_t places[(1 << MOST_BITS) + 1] = {0};
        for (int64_t e = 0; e < count; e++) places[((words[e] >> shift) & mask) + 1]++;
        for (int r = 0; r < mask; r++) places[r + 1] += places[r];
        for (int64_t e = 0; e < count; e++) others[places[(words[e] >> shift) & mask]++] = words[e];
        uint64_t *sorted = others;
        others = words;
        words = sorted;
    }
    int64_t found = 0;
    for (int64_t e = 0; e < count; e++) {
        if (e == 0 || words[e] >> 32 != words[e - 1] >> 32) {
            rows[found] = words[e] >> 32;
            starts[found++] = e;
        }
        order[e] = (int32_t)words[e];
    }
    starts[found] = count;
    free(memory);
    return found;
}
"""
    + for_each_dtype(
        SUM_OF_ENTRIES_BY_DTYPE
        + r"""
/* values[places[g]] = the sum of the entries of group g; values[g] if `places` is NULL. Returns -1 if out of
   memory. */
int64_t NAME(row_gradient)(const SUM *coefficients, const int32_t *sources, const int32_t *starts, const SUM *tokens,
                           ROW *values, const int32_t *places, int64_t num_groups, int64_t width, int threads) {
    SUM *memory = malloc(threads * width * sizeof *memory + 1);
    if (!memory) return -1;
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t part = 0; part < threads; part++) {
        SUM *sums = memory + part * width;
        for (int64_t g = num_groups * part / threads; g < num_groups * (part + 1) / threads; g++) {
            NAME(sum_entries)(coefficients, sources, tokens, starts[g], starts[g + 1], width, sums);
            ROW *value = values + (places ? places[g] : g) * width;
            int64_t i = 0;
            for (; i + WIDTH <= width; i += WIDTH) {
                VECTOR x;
                memcpy(&x, sums + i, sizeof x);
                STORE(value + i, x);
            }
            for (; i < width; i++) PUT(value + i, sums[i]);
        }
    }
    free(memory);
    return 0;
}

static inline SUM NAME(square)(const SUM *values, int64_t width) {
    VECTOR squares = {};
    int64_t i = 0;
    for (; i + WIDTH <= width; i += WIDTH) {
        VECTOR x;
        memcpy(&x, values + i, sizeof x);
        squares += x * x;
    }
    SUM square = 0;
    for (int lane = 0; lane < WIDTH; lane++) square += squares[lane];
    for (; i < width; i++) square += values[i] * values[i];
    return square;
}

/* The sum of the squares of all rows, to `total`, in an order that depends on the number of threads alone. Of a row
   that one entry names it is that of the token, which is computed once. Returns -1 if out of memory. */
int64_t NAME(squared_norm)(const SUM *coefficients, const int32_t *sources, const int32_t *starts, const SUM *tokens,
                           double *total, int64_t num_groups, int64_t num_tokens, int64_t width, int threads) {
    SUM *memory = malloc((threads * width + num_tokens) * sizeof *memory + 1), *of_tokens = memory + threads * width;
    double *totals = malloc(threads * sizeof *totals);
    if (!memory || !totals) { free(memory); free(totals); return -1; }
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < num_tokens; t++) of_tokens[t] = NAME(square)(tokens + t * width, width);
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t part = 0; part < threads; part++) {
        SUM *sums = memory + part * width;
        double sum = 0;
        for (int64_t g = num_groups * part / threads; g < num_groups * (part + 1) / threads; g++) {
            const int64_t first = starts[g];
            if (starts[g + 1] == first + 1) {
                if (coefficients[first] == 0) continue;
                sum += (double)coefficients[first] * coefficients[first] * of_tokens[sources[first]];
            } else {
                NAME(sum_entries)(coefficients, sources, tokens, first, starts[g + 1], width, sums);
                sum += NAME(square)(sums, width);
            }
        }
        totals[part] = sum;
    }
    *total = 0;
    for (int part = 0; part < threads; part++) *total += totals[part];
    free(memory);
    free(totals);
    return 0;
}
"""
    )
)

# Entries are numbered in 32 bits.
MOST_ENTRIES = 2**31 - 1


def group(indices: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See [`TorchKernels.group`]. Raises `IndexError` for an index that is out of range."""
    check_tensor("indices", indices, 1, (torch.int64,))
    count = indices.numel()
    if max(count, num_rows) > MOST_ENTRIES:
        raise ValueError(f"At most {MOST_ENTRIES:,} entries and rows can be grouped, got {count:,} and {num_rows:,}.")
    sizes = (count, count + 1, count)
    rows, starts, order = (torch.empty(size, dtype=torch.int32, device="cpu") for size in sizes)
    found = call(SOURCE, "group", indices.contiguous(), count, num_rows, rows, starts, order)
    if found == -2:
        refuse_index(indices, num_rows)
    _check_memory(found, f"grouping {count} expert indices")
    return rows[:found], starts[: found + 1], order


def row_gradient(
    coefficients: torch.Tensor,
    sources: torch.Tensor,
    starts: torch.Tensor,
    tokens: torch.Tensor,
    out: torch.Tensor,
    places: torch.Tensor | None = None,
) -> None:
    """See [`TorchKernels.row_gradient`]. `out` must be contiguous."""
    check_tensor("out", out, 2, DTYPES)
    if not out.is_contiguous():
        raise ValueError(f"`out` must be contiguous, got strides {out.stride()} of shape {tuple(out.shape)}.")
    factors = _checked_factors(coefficients, sources, starts, tokens, out.dtype)
    num_groups, width = len(starts) - 1, out.shape[1]
    check_shape("tokens", tokens, (len(tokens), width), "(num_tokens, width)")
    if places is not None:
        check_tensor("places", places, 1, (torch.int32,))
        check_shape("places", places, (num_groups,), "(num_groups,)")
        places = places.contiguous()
    status = call(SOURCE, f"row_gradient_{DTYPES[out.dtype]}", *factors, out, places, num_groups, width)
    _check_memory(status, f"summing {num_groups} rows")


def squared_norm(
    coefficients: torch.Tensor, sources: torch.Tensor, starts: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """See [`TorchKernels.squared_norm`]."""
    dtype = torch.float64 if coefficients.dtype == torch.float64 else torch.float32
    factors = _checked_factors(coefficients, sources, starts, tokens, dtype)
    total = torch.empty((), dtype=torch.float64, device="cpu")
    sizes = (len(starts) - 1, *tokens.shape)
    status = call(SOURCE, f"squared_norm_{DTYPES[dtype]}", *factors, total, *sizes)
    _check_memory(status, f"summing {sizes[0]} rows")
    return total


def _checked_factors(coefficients, sources, starts, tokens, dtype):
    """The factors as C reads them, for rows of `dtype`."""
    for name, tensor in (("sources", sources), ("starts", starts)):
        check_tensor(name, tensor, 1, (torch.int32,))
    check_shape("coefficients", coefficients, sources.shape, "(num_entries,)")
    sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for name, tensor in (("coefficients", coefficients), ("tokens", tokens)):
        check_in_memory(name, tensor)
    return (
        coefficients.to(sum_dtype).contiguous(),
        sources.contiguous(),
        starts.contiguous(),
        tokens.to(sum_dtype).contiguous(),
    )


def _check_memory(status, doing):
    if status < 0:
        raise MemoryError(f"Out of memory while {doing}.")
