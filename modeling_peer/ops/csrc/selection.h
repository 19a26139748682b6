/* Selects the k best of many scores. A threshold leaves few candidates, whose ranks are counted. There are no branches
   that the processor could not predict. */

#include <math.h>
#include <stdlib.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

/* Rows of scores that are selected from at the same time. */
#define GROUP 4
/* Candidates whose ranks are counted at the same time, in registers. */
#define BATCH 32

static inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

static inline ints lanes(void) {
    ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return lane;
}

/* Comparisons. The larger or smaller of NaN and b is b. `at_least` gives a bit for each lane in which a >= b. */
#if defined(__AVX512F__)
static inline floats in_all_lanes(float x) { return (floats)_mm512_set1_ps(x); }
static inline floats larger(floats a, floats b) { return (floats)_mm512_max_ps((__m512)a, (__m512)b); }
static inline floats smaller(floats a, floats b) { return (floats)_mm512_min_ps((__m512)a, (__m512)b); }
static inline float largest(floats v) { return _mm512_reduce_max_ps((__m512)v); }
static inline uint32_t at_least(floats a, floats b) {
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
}
static inline ints add_one_where_at_least(ints counts, floats a, floats b) {
    return (ints)_mm512_mask_add_epi32((__m512i)counts, at_least(a, b), (__m512i)counts, _mm512_set1_epi32(1));
}
#else
#if defined(__AVX__)
static inline floats in_all_lanes(float x) { return (floats)_mm256_set1_ps(x); }
static inline floats larger(floats a, floats b) { return (floats)_mm256_max_ps((__m256)a, (__m256)b); }
static inline floats smaller(floats a, floats b) { return (floats)_mm256_min_ps((__m256)a, (__m256)b); }
static inline uint32_t at_least(floats a, floats b) {
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ));
}
#elif defined(__SSE2__)
static inline floats in_all_lanes(float x) { return (floats)_mm_set1_ps(x); }
static inline floats larger(floats a, floats b) { return (floats)_mm_max_ps((__m128)a, (__m128)b); }
static inline floats smaller(floats a, floats b) { return (floats)_mm_min_ps((__m128)a, (__m128)b); }
static inline uint32_t at_least(floats a, floats b) { return _mm_movemask_ps(_mm_cmpge_ps((__m128)a, (__m128)b)); }
#else
static inline floats in_all_lanes(float x) { return (floats){x, x, x, x}; }
static inline floats larger(floats a, floats b) { return (floats)select_words(a > b, (words)a, (words)b); }
static inline floats smaller(floats a, floats b) { return (floats)select_words(a < b, (words)a, (words)b); }
static inline uint32_t at_least(floats a, floats b) {
    const words bits = (words)(a >= b) & (words){1, 2, 4, 8};
    return bits[0] | bits[1] | bits[2] | bits[3];
}
#endif
static inline float largest(floats v) {
    float most = v[0];
    for (int lane = 1; lane < LANES; lane++) most = v[lane] > most ? v[lane] : most;
    return most;
}
static inline ints add_one_where_at_least(ints counts, floats a, floats b) {
    return counts - (ints)(a >= b);  /* true is -1 */
}
#endif
static inline float smallest(floats v) { return -largest(-v); }

/* Buffers of one thread: candidates, their positions, and the leaders of the scores, of each row in a group. */
typedef struct {
    float *candidates;
    int32_t *positions, *ranks;
    floats (*leaders)[2];
    int64_t capacity;  /* for candidates of a row */
} selection_buffers;

static void *take(char **memory, int64_t bytes) {
    void *start = *memory;
    if (*memory) *memory += round_up(bytes, 64);
    return start;
}
#define TAKE(field, count) \
    bytes += round_up((count) * sizeof *(field), 64); field = take(&memory, (count) * sizeof *(field))

/* Divides memory among the buffers for at most n scores; returns its size in bytes. Called with NULL first. */
static int64_t lay_out_selection(selection_buffers *b, char *memory, int64_t n, int64_t k) {
    int64_t bytes = 0;
    b->capacity = round_up(n, 64) + 128;
    TAKE(b->candidates, GROUP * b->capacity);
    TAKE(b->positions, GROUP * b->capacity);
    TAKE(b->ranks, b->capacity);
    TAKE(b->leaders, GROUP * round_up(k, LANES) / LANES);
    return bytes;
}

/* Finds for each of at most GROUP rows a threshold near the k-th best score that at least k reach; n is a multiple of
   LANES. Scores are divided into at least k groups, one in a lane, whose leaders are the best and the second best. The
   threshold lies between the worst best and the best second; bisection counts the leaders that reach it. */
static void find_thresholds(const float *scores, int64_t rows, int64_t n, int64_t k, float *thresholds,
                            const selection_buffers *b) {
    const int64_t groups = round_up(k, LANES), vectors = groups / LANES;
    float steps[GROUP];
    for (int64_t r = 0; r < rows; r++) thresholds[r] = -INFINITY;
    if (n <= 2 * groups) return;
    for (int64_t r = 0; r < rows; r++) {
        floats worst_best = in_all_lanes(INFINITY), best_second = in_all_lanes(-INFINITY);
        for (int64_t v = 0; v < vectors; v++) {
            floats best = in_all_lanes(-INFINITY), second = best;
            for (int64_t i = v * LANES; i < n; i += groups) {
                const floats x = load_float32(scores + r * n + i);
                second = larger(second, smaller(best, x));
                best = larger(best, x);
            }
            b->leaders[r * vectors + v][0] = best;
            b->leaders[r * vectors + v][1] = second;
            worst_best = smaller(worst_best, best);
            best_second = larger(best_second, second);
        }
        thresholds[r] = smallest(worst_best);
        steps[r] = 0.5f * largest(best_second) - 0.5f * thresholds[r];
    }
    for (int bisection = 0; bisection < 5; bisection++)
        for (int64_t r = 0; r < rows; r++, steps[r - 1] *= 0.5f) {
            const float higher = thresholds[r] + steps[r];
            int64_t reached = 0;
            for (int64_t v = 0; v < vectors; v++) {
                const floats *leaders = b->leaders[r * vectors + v];
                reached += __builtin_popcount(at_least(leaders[0], in_all_lanes(higher)) |
                                              at_least(leaders[1], in_all_lanes(higher)) << LANES);
            }
            /* without a branch */
            const uint32_t take_it = -(uint32_t)(reached >= k);
            thresholds[r] =
                bits_to_float((float_to_bits(higher) & take_it) | (float_to_bits(thresholds[r]) & ~take_it));
        }
}

/* Writes those of n scores that reach a threshold, and their positions; returns their number. Of every 64 scores,
   `usual` are written without checking that as many reach it. So up to `usual` elements more are overwritten, and up
   to 64 scores more read. */
static inline int64_t keep(const float *scores, int64_t n, float threshold, int64_t usual, float *candidates,
                           int32_t *positions) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += 64) {
        uint64_t bits = 0;
        for (int64_t j = 0; j < 64 && i + j < n; j += LANES)
            bits |= (uint64_t)at_least(load_float32(scores + i + j), in_all_lanes(threshold)) << j;
        if (n - i < 64) bits &= (1ull << (n - i)) - 1;
        const int64_t found = __builtin_popcountll(bits);
        for (int64_t j = 0; j < usual || bits; j++, bits &= bits - 1) {
            const int64_t position = i + __builtin_ctzll(bits | 1ull << 63);
            candidates[count + j] = scores[position];
            positions[count + j] = position;
        }
        count += found;
    }
    return count;
}

/* ranks[i] = number of candidates that are better than candidate i, or equal and, with `ties`, earlier. */
static inline __attribute__((always_inline)) void count_better(const float *candidates, int64_t count, int32_t *ranks,
                                                               const int ties) {
    for (int64_t first = 0; first < count; first += BATCH) {
        floats own[BATCH / LANES];
        ints better[BATCH / LANES], position[BATCH / LANES];
        for (int v = 0; v < BATCH / LANES; v++) {
            own[v] = load_float32(candidates + first + v * LANES);
            better[v] = (ints){} - !ties;  /* a candidate does not count itself */
            position[v] = lanes() + (int32_t)(first + v * LANES);
        }
        for (int64_t j = 0; j < count; j++) {
            const floats x = in_all_lanes(candidates[j]);
            for (int v = 0; v < BATCH / LANES; v++)
                if (ties)
                    better[v] -= (x > own[v]) | ((x == own[v]) & (position[v] > (int32_t)j));
                else
                    better[v] = add_one_where_at_least(better[v], x, own[v]);
        }
        memcpy(ranks + first, better, sizeof better);
    }
}

/* Writes the k best candidates in order, and overwrites one element more; returns the sum of all ranks. */
static inline int64_t put_in_order(const float *restrict candidates, const int32_t *restrict positions,
                                   const int32_t *restrict ranks, int64_t count, int64_t k, float *restrict best,
                                   int32_t *restrict places) {
    int64_t sum = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t place = ranks[i] < k ? ranks[i] : k;
        best[place] = candidates[i];
        places[place] = positions[i];
        sum += ranks[i];
    }
    return sum;
}

/* Sorts the k best of some candidates, of equal ones the earlier first. */
static void sort_candidates(const float *candidates, const int32_t *positions, int64_t count, int64_t k, float *best,
                            int32_t *places, int32_t *ranks) {
    count_better(candidates, count, ranks, 0);
    const int64_t sum = put_in_order(candidates, positions, ranks, count, k, best, places);
    if (sum == count * (count - 1) / 2) return;
    /* Equal candidates, which are rare, were counted as better than one another. */
    count_better(candidates, count, ranks, 1);
    put_in_order(candidates, positions, ranks, count, k, best, places);
}

/* Selects the k best of n scores of each of some rows, best first, of equal scores the earlier one: `best` and their
   `places` [rows, k]; one element more of each is overwritten. Rows start every `stride` scores, a multiple of LANES,
   and are padded with -∞. Each step is done for all rows of a group, as the next step would wait for its result. */
static void select_best(const float *scores, int64_t rows, int64_t stride, int64_t n, int64_t k, float *best,
                        int32_t *places, const selection_buffers *b) {
    const int64_t usual = 80 * k / n + 2;  /* a quarter more than are expected, and some */
    for (int64_t first = 0; first < rows; first += GROUP) {
        const int64_t count = rows - first < GROUP ? rows - first : GROUP;
        float thresholds[GROUP];
        int64_t kept[GROUP];
        find_thresholds(scores + first * stride, count, stride, k, thresholds, b);
        for (int64_t r = 0; r < count; r++)
            kept[r] = keep(scores + (first + r) * stride, n, thresholds[r], usual, b->candidates + r * b->capacity,
                           b->positions + r * b->capacity);
        for (int64_t r = 0; r < count; r++)
            sort_candidates(b->candidates + r * b->capacity, b->positions + r * b->capacity, kept[r], k,
                            best + (first + r) * k, places + (first + r) * k, b->ranks);
    }
}
