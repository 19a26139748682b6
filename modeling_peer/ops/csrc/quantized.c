#ifndef BITS

/* Experts whose tables are quantized: integers are read in place and widened in registers. In `up` the scale of a
   group multiplies the group's part of a dot product, in `down` the weight of a row. With 4 bits, bytes before
   `paired` have a column in each half. Vectors of the other bytes would reach beyond the end of the token. */

#include "common.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

/* gcc would widen a vector byte by byte, although the processor has an instruction for it. */
#if defined(__AVX512F__)
static inline ints load_bytes(const int8_t *p) { return (ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)); }
#elif defined(__AVX2__)
static inline ints load_bytes(const int8_t *p) { return (ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)); }
#else
typedef int8_t bytes __attribute__((vector_size(LANES)));
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));
static inline ints load_bytes(const int8_t *p) {
    bytes b;
    memcpy(&b, p, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(b, shorts), ints);
}
#endif
static inline floats to_floats(ints v) { return __builtin_convertvector(v, floats); }
static inline floats upper(ints v) { return to_floats(v >> 4); }
static inline floats lower(ints v) { return to_floats((v << 28) >> 28); }

/* Number of rows by which prefetching is ahead, into the second-level cache. Rows are short, and the first-level cache
   cannot wait for as many lines at a time as the full speed of memory takes. */
#define ROWS_AHEAD 32
#define LINE 64

#define WIDEN(v) (BITS == 4 ? lower(v) : to_floats(v))
#define WIDEN_ONE(b) (BITS == 4 ? (float)((int8_t)((uint8_t)(b) << 4) >> 4) : (float)(b))

#define BITS 8
#define NAME(f) f##_8
#include "quantized.c"
#undef BITS
#undef NAME
#define BITS 4
#define NAME(f) f##_4
#include "quantized.c"

#else  /* once for 8 bits, once for 4 */

/* output[t, a] = hidden[t] · table[indices[t, a]]. Returns 0, or -1 if an index is out of range. */
int64_t NAME(up)(const float *hidden, const int64_t *indices, const int8_t *integers, const uint16_t *scales,
                 float *output, int64_t num_rows, int64_t num_tokens, int64_t active, int64_t width,
                 int64_t num_bytes, int64_t span, int threads) {
    int failed = 0;
    const int64_t count = num_tokens * active, paired = BITS == 4 ? width - num_bytes : num_bytes;
    const int64_t groups = num_bytes ? (num_bytes + span - 1) / span : 0;
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t entry = 0; entry < count; entry++) {
        if ((uint64_t)indices[entry] >= (uint64_t)num_rows) {
            #pragma omp atomic write
            failed = -1;
            continue;
        }
        const float *token = hidden + entry / active * width, *behind = token + num_bytes;
        const int8_t *row = integers + indices[entry] * num_bytes;
        const uint16_t *scale = scales + indices[entry] * groups;
        const int64_t next = indices[entry + ROWS_AHEAD < count ? entry + ROWS_AHEAD : entry];
        const int8_t *ahead = integers + next * num_bytes;
        for (int64_t byte = 0; byte < 2 * groups; byte += LINE)
            __builtin_prefetch((const int8_t *)(scales + next * groups) + byte, 0, 2);
        floats total = {};
        float rest = 0;
        int64_t i = 0;
        for (int64_t group = 0; group < groups; group++) {
            const int64_t end = i + span < num_bytes ? i + span : num_bytes, whole = end < paired ? end : paired;
            floats sums[4] = {};
            for (; i + 4 * LANES <= whole; i += 4 * LANES) {
                __builtin_prefetch(ahead + i, 0, 2);
                for (int j = 0; j < 4; j++) {
                    const ints v = load_bytes(row + i + j * LANES);
                    sums[j] += load_float32(token + i + j * LANES) * WIDEN(v);
                    if (BITS == 4) sums[j] += load_float32(behind + i + j * LANES) * upper(v);
                }
            }
            __builtin_prefetch(ahead + i, 0, 2);
            for (; i + LANES <= whole; i += LANES) {
                const ints v = load_bytes(row + i);
                sums[0] += load_float32(token + i) * WIDEN(v);
                if (BITS == 4) sums[1] += load_float32(behind + i) * upper(v);
            }
            float last = 0;
            for (; i < end; i++) {
                last += token[i] * WIDEN_ONE(row[i]);
                if (BITS == 4 && i < paired) last += behind[i] * (row[i] >> 4);
            }
            const float factor = get_bfloat16(scale + group);
            total += factor * ((sums[0] + sums[1]) + (sums[2] + sums[3]));
            rest += factor * last;
        }
        for (int lane = 0; lane < LANES; lane++) rest += total[lane];
        output[entry] = rest;
    }
    return failed;
}

/* output[t] = Σ_a weights[t, a] table[indices[t, a]]. Where there are fewer tokens than threads, threads share the
   bytes of rows too. Returns 0, or -1 if an index is out of range. */
int64_t NAME(down)(const float *weights, const int64_t *indices, const int8_t *integers, const uint16_t *scales,
                   float *output, int64_t num_rows, int64_t num_tokens, int64_t active, int64_t width,
                   int64_t num_bytes, int64_t span, int threads) {
    int failed = 0;
    const int64_t count = num_tokens * active, paired = BITS == 4 ? width - num_bytes : num_bytes;
    const int64_t groups = num_bytes ? (num_bytes + span - 1) / span : 0;
    const int64_t parts = num_tokens < threads ? threads : 1;
    const int64_t step = ((num_bytes + parts - 1) / parts + LANES - 1) / LANES * LANES;
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < num_tokens * parts; task++) {
        const int64_t t = task / parts, first = task % parts * step;
        const int64_t stop = first + step < num_bytes ? first + step : num_bytes;
        float *sums = output + t * width, *behind = sums + num_bytes;
        for (int64_t i = first; i < stop; i++) {
            sums[i] = 0;
            if (BITS == 4 && i < paired) behind[i] = 0;
        }
        for (int64_t entry = t * active; entry < (t + 1) * active; entry++) {
            if ((uint64_t)indices[entry] >= (uint64_t)num_rows) {
                #pragma omp atomic write
                failed = -1;
                continue;
            }
            const int8_t *row = integers + indices[entry] * num_bytes;
            const uint16_t *scale = scales + indices[entry] * groups;
            const int64_t next = indices[entry + ROWS_AHEAD < count ? entry + ROWS_AHEAD : entry];
            const int8_t *ahead = integers + next * num_bytes;
            for (int64_t byte = 0; byte < 2 * groups; byte += LINE)
                __builtin_prefetch((const int8_t *)(scales + next * groups) + byte, 0, 2);
            for (int64_t i = first; i < stop;) {
                const int64_t group = i / span, after = (group + 1) * span;
                const int64_t end = after < stop ? after : stop, whole = end < paired ? end : paired;
                const float factor = weights[entry] * get_bfloat16(scale + group);
                for (int64_t line = i; line < end; line += LINE) __builtin_prefetch(ahead + line, 0, 2);
                for (; i + LANES <= whole; i += LANES) {
                    const ints v = load_bytes(row + i);
                    store_float32(sums + i, load_float32(sums + i) + factor * WIDEN(v));
                    if (BITS == 4) store_float32(behind + i, load_float32(behind + i) + factor * upper(v));
                }
                for (; i < end; i++) {
                    sums[i] += factor * WIDEN_ONE(row[i]);
                    if (BITS == 4 && i < paired) behind[i] += factor * (row[i] >> 4);
                }
            }
        }
    }
    return failed;
}

#endif
