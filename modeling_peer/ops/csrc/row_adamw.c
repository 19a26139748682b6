#ifndef NAME

#include "common.h"

#include <math.h>
#include <stdlib.h>

/* Number of rows by which prefetching of parameter and moments is ahead. A row is 2 KB at d = 512 in float32. */
#define ROWS_AHEAD 2

/* A hash of 32 bits (MurmurHash3's finalizer), of one number and of a vector of them. */
#define MIX(x) x ^= x >> 16; x *= 0x85ebca6bu; x ^= x >> 13; x *= 0xc2b2ae35u; x ^= x >> 16
static inline uint32_t mix(uint32_t x) { MIX(x); return x; }
static inline words mix_words(words x) { MIX(x); return x; }

/* The random bits of a row in a step, and of columns of it, as `random_bits` in stochastic_rounding.py has them. */
static inline uint32_t row_bits(uint32_t seed, int64_t row, int32_t step) {
    return mix(mix(seed + (uint32_t)row * 0x9e3779b1u) + (uint32_t)step * 0x85ebca77u);
}
static inline words column_bits(uint32_t of_row, int64_t column) {
    words columns;
    for (int lane = 0; lane < LANES; lane++) columns[lane] = column + lane;
    return mix_words(of_row + columns * 0xc2b2ae3du);
}

/* Stochastic rounding: up with the probability that makes the mean exact, down otherwise. float32 and float64, the
   dtypes of sums, are stored unrounded. */
static inline void round_float32(float *p, floats v, uint32_t of_row, int64_t column) {
    (void)of_row, (void)column;
    store_float32(p, v);
}
static inline void round_float64(double *p, doubles v, uint32_t of_row, int64_t column) {
    (void)of_row, (void)column;
    store_float64(p, v);
}
static inline void round_bfloat16(uint16_t *p, floats v, uint32_t of_row, int64_t column) {
    const words bits = (words)v, rounded = (bits + (column_bits(of_row, column) >> 16)) >> 16;
    store_halves(p, select_words(v == v, rounded, (bits >> 16) | 0x40));
}
static inline void round_float16(uint16_t *p, floats v, uint32_t of_row, int64_t column) {
    const words bits = (words)v, random = column_bits(of_row, column), sign = bits & 0x80000000;
    const words magnitude = bits ^ sign, least = magnitude * 0 + (113u << 23);
    /* Below 2^-14 numbers are 2^-24 apart. */
    const floats shifted = (floats)magnitude * 0x1p24f + __builtin_convertvector(random >> 19, floats) * 0x1p-13f;
    const words subnormal = __builtin_convertvector(shifted, words);
    const words normal = (magnitude - (112u << 23) + (random >> 19)) >> 13;
    const words finite = select_words((ints)(magnitude < least), subnormal, normal);
    const words largest = magnitude * 0 + 0x7c00;
    const words rounded = select_words((ints)(magnitude >= (143u << 23)), largest, finite);
    store_halves(p, select_words((ints)(v == v), rounded, magnitude * 0 + 0x7e00) | (sign >> 16));
}

#define TEMPLATE "row_adamw.c"
#include "for_each_dtype.h"

#else  /* once for each dtype of a table */

#include "sum_tokens.h"

struct NAME(coefficients) { SUM decay, first, first_kept, second, second_kept, eps; };

/* The square root of each lane: a loop over an array, which compiles to one instruction. */
static inline VECTOR NAME(root)(VECTOR v) {
    SUM lanes[WIDTH];
    memcpy(lanes, &v, sizeof v);
    for (int lane = 0; lane < WIDTH; lane++) lanes[lane] = sizeof(SUM) == 4 ? sqrtf(lanes[lane]) : sqrt(lanes[lane]);
    memcpy(&v, lanes, sizeof v);
    return v;
}

/* Makes the step on a vector of a row. Updates its first moment m (null without momentum) and its second moment v
   (null if the row has a single one), and returns its new elements. `divisor` is that of the whole row if v is null,
   otherwise the factor of √v. */
static inline VECTOR NAME(update)(const ROW *x, SUM *m, SUM *v, const SUM *g, SUM rate, SUM divisor,
                                  struct NAME(coefficients) c) {
    VECTOR gradient, first, divisors = divisor - (VECTOR){};
    memcpy(&gradient, g, sizeof gradient);
    first = gradient;
    if (m) {
        memcpy(&first, m, sizeof first);
        /* From the nearer end, as torch's lerp: with beta1 = 0 it is exactly the gradient, not m + (g - m) rounded. */
        first = c.first < (SUM)0.5 ? first + c.first * (gradient - first) : gradient - c.first_kept * (gradient - first);
        memcpy(m, &first, sizeof first);
    }
    if (v) {
        VECTOR second;
        memcpy(&second, v, sizeof second);
        second = c.second_kept * second + c.second * (gradient * gradient);
        memcpy(v, &second, sizeof second);
        divisors = divisors * NAME(root)(second) + c.eps;
    }
    return c.decay * NAME(load)(x) - rate * (first / divisors);
}

static inline int NAME(is_zero)(const SUM *g, int64_t width) {
    for (int64_t i = 0; i < width; i++)
        if (g[i] != 0) return 0;
    return 1;
}

typedef struct {
    ROW *parameter;
    SUM *exp_avg, *exp_avg_sq;
    int32_t *row_steps;
    int64_t width, shared;
    double lr, log_beta1, log_beta2;
    struct NAME(coefficients) c;
    uint32_t seed;
} NAME(table);

/* AdamW's step on a row, whose gradient is g. */
static inline void NAME(step_row)(const NAME(table) *t, int64_t row, int64_t ahead, const SUM *g) {
    const int64_t width = t->width, vectors = width - width % WIDTH;
    ROW *x = t->parameter + row * width;
    SUM *m = t->exp_avg ? t->exp_avg + row * width : 0, *v = t->shared ? 0 : t->exp_avg_sq + row * width;
    const ROW *next_x = t->parameter + ahead * width;
    const SUM *next_m = m ? t->exp_avg + ahead * width : 0, *next_v = t->exp_avg_sq + ahead * width;
    const int32_t step = ++t->row_steps[row];
    const uint32_t random = row_bits(t->seed, row, step);
    const SUM rate = t->lr / -expm1(step * t->log_beta1), root_correction = sqrt(-expm1(step * t->log_beta2));
    SUM divisor = 1 / root_correction;
    if (t->shared) {
        const SUM second = t->c.second_kept * t->exp_avg_sq[row] + t->c.second * (NAME(square)(g, width) / width);
        t->exp_avg_sq[row] = second;
        divisor = (SUM)sqrt(second) * divisor + t->c.eps;
    }
    for (int64_t i = 0; i < vectors; i += WIDTH) {
        __builtin_prefetch(next_x + i, 1, 3);
        if (m) __builtin_prefetch(next_m + i, 1, 3);
        if (v) __builtin_prefetch(next_v + i, 1, 3);
        NAME(round)(x + i, NAME(update)(x + i, m ? m + i : 0, v ? v + i : 0, g + i, rate, divisor, t->c), random, i);
    }
    if (vectors < width) {
        const size_t rest = width - vectors;
        ROW last_x[WIDTH] = {};
        SUM last_g[WIDTH] = {}, last_m[WIDTH] = {}, last_v[WIDTH] = {};
        memcpy(last_x, x + vectors, rest * sizeof *x);
        memcpy(last_g, g + vectors, rest * sizeof *g);
        if (m) memcpy(last_m, m + vectors, rest * sizeof *m);
        if (v) memcpy(last_v, v + vectors, rest * sizeof *v);
        const VECTOR moved = NAME(update)(last_x, m ? last_m : 0, v ? last_v : 0, last_g, rate, divisor, t->c);
        NAME(round)(last_x, moved, random, vectors);
        memcpy(x + vectors, last_x, rest * sizeof *x);
        if (m) memcpy(m + vectors, last_m, rest * sizeof *m);
        if (v) memcpy(v + vectors, last_v, rest * sizeof *v);
    }
}

/* AdamW's step on `count` distinct rows of a table. The gradient of row rows[u] is either row places[u] of `gradient`,
   or the sum of the assignments of group u; then a row whose sum is zero is left as it is. Each element has its own
   second moment, or each row a single one if it is `shared`; there is no momentum if `exp_avg` is null. Returns -1 if
   out of memory. */
int64_t NAME(adamw)(ROW *parameter, SUM *exp_avg, SUM *exp_avg_sq, int32_t *row_steps, const int32_t *rows,
                    const ROW *gradient, const int64_t *places, const SUM *coefficients, const int32_t *sources,
                    const int32_t *starts, const SUM *tokens, int64_t count, int64_t width, int64_t shared, double lr,
                    double beta1, double beta2, double eps, double weight_decay, int64_t seed, int threads) {
    const NAME(table) table = {parameter, exp_avg, exp_avg_sq, row_steps, width, shared, lr, log(beta1), log(beta2),
                               {1 - lr * weight_decay, 1 - beta1, beta1, 1 - beta2, beta2, eps}, (uint32_t)seed};
    SUM *memory = malloc(threads * width * sizeof *memory + 1);
    if (!memory) return -1;
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t part = 0; part < threads; part++) {
        SUM *g = memory + part * width;
        for (int64_t u = count * part / threads; u < count * (part + 1) / threads; u++) {
            if (starts) {
                NAME(sum_tokens)(coefficients, sources, tokens, starts[u], starts[u + 1], width, g);
                if (NAME(is_zero)(g, width)) continue;
            } else {
                for (int64_t i = 0; i < width; i++) g[i] = NAME(get)(gradient + places[u] * width + i);
            }
            NAME(step_row)(&table, rows[u], rows[u + ROWS_AHEAD < count ? u + ROWS_AHEAD : u], g);
        }
    }
    free(memory);
    return 0;
}

#endif
