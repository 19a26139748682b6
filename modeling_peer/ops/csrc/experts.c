#ifndef NAME

#include "common.h"

/* Number of rows by which prefetching is ahead, into the innermost cache alone: few rows of a large table are used
   again before the other caches would evict them. A row is 2 KB at d = 512 in float32. */
#define ROWS_AHEAD 12

#define TEMPLATE "experts.c"
#include "for_each_dtype.h"

#else  /* once for each dtype of a table */

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
                sums[j] += x * NAME(load)(row + i + j * WIDTH);
            }
        for (; i < whole; i += WIDTH) {
            VECTOR x;
            memcpy(&x, token + i, sizeof x);
            sums[0] += x * NAME(load)(row + i);
        }
        VECTOR lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        SUM sum = 0;
        for (int lane = 0; lane < WIDTH; lane++) sum += lanes[lane];
        for (; i < width; i++) sum += token[i] * NAME(get)(row + i);
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
                sum += weight * NAME(load)(row + i);
                memcpy(sums + i, &sum, sizeof sum);
            }
            for (; i < columns; i++) sums[i] += weight * NAME(get)(row + i);
        }
    }
    return failed;
}

#endif
