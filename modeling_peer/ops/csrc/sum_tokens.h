/* Included once for each dtype. */

/* Number of vectors that a sum over tokens keeps in registers. */
#undef BLOCK
#define BLOCK 8

/* sums = Σ coefficients[e] tokens[sources[e]] over the assignments first <= e < end. Those with a zero coefficient are
   skipped, whatever their token is: they may name a frozen row. */
static inline void NAME(sum_tokens)(const SUM *coefficients, const int32_t *sources, const SUM *tokens, int64_t first,
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
