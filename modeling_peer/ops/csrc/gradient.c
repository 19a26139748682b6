#ifndef NAME

#include "common.h"

#include <stdlib.h>

/* Groups assignments by the row that they name. Writes each row once to `rows`, ascending; the assignments, grouped,
   to `order`; and where each group starts in `order` to `starts`. Returns the number of groups, -1 if out of memory,
   or -2 if an index is out of range. It is a stable radix sort of words that hold a row and an assignment. */
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

#define TEMPLATE "gradient.c"
#include "for_each_dtype.h"

#else  /* once for each dtype of a table */

#include "sum_tokens.h"

/* values[places[g]] = the sum of the assignments of group g; values[g] if `places` is NULL. Returns -1 if out of
   memory. */
int64_t NAME(row_gradient)(const SUM *coefficients, const int32_t *sources, const int32_t *starts, const SUM *tokens,
                           ROW *values, const int32_t *places, int64_t num_groups, int64_t width, int threads) {
    SUM *memory = malloc(threads * width * sizeof *memory + 1);
    if (!memory) return -1;
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t part = 0; part < threads; part++) {
        SUM *sums = memory + part * width;
        for (int64_t g = num_groups * part / threads; g < num_groups * (part + 1) / threads; g++) {
            NAME(sum_tokens)(coefficients, sources, tokens, starts[g], starts[g + 1], width, sums);
            ROW *value = values + (places ? places[g] : g) * width;
            int64_t i = 0;
            for (; i + WIDTH <= width; i += WIDTH) {
                VECTOR x;
                memcpy(&x, sums + i, sizeof x);
                NAME(store)(value + i, x);
            }
            for (; i < width; i++) NAME(put)(value + i, sums[i]);
        }
    }
    free(memory);
    return 0;
}

/* Writes the sum of the squares of all rows to `total`, in an order that depends on the number of threads alone. For a
   row that one assignment names, it uses the token's square, which is computed once. Returns -1 if out of memory. */
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
                NAME(sum_tokens)(coefficients, sources, tokens, first, starts[g + 1], width, sums);
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

#endif
