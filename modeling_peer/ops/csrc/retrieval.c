#include "common.h"
#include "selection.h"

/* Queries in a tile, and keys in a panel: their scores fill the registers, with room for one column of each. */
#if defined(__AVX512F__) || defined(__ARM_NEON)
#define TILE 12
#elif defined(__AVX__)
#define TILE 6
#else
#define TILE 4
#endif
#define PANEL (2 * LANES)
/* Queries whose scores with one set of sub-keys are in the cache at the same time: 192 KB for 1,024 sub-keys. */
#define BLOCK (4 * TILE)

/* Turns NaN into infinity, so that it is selected and seen. */
static inline floats without_nan(floats v) { return smaller(v, in_all_lanes(INFINITY)); }

/* Copies 4 elements of 4 keys. */
static inline void pack_square(const float *keys, float *panel, int64_t size) {
#if defined(__SSE2__)
    __m128 a = _mm_loadu_ps(keys), b = _mm_loadu_ps(keys + size);
    __m128 c = _mm_loadu_ps(keys + 2 * size), d = _mm_loadu_ps(keys + 3 * size);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(panel, a);
    _mm_storeu_ps(panel + PANEL, b);
    _mm_storeu_ps(panel + 2 * PANEL, c);
    _mm_storeu_ps(panel + 3 * PANEL, d);
#else
    for (int j = 0; j < 4; j++)
        for (int c = 0; c < 4; c++) panel[c * PANEL + j] = keys[j * size + c];
#endif
}

/* Copies keys `[n, size]` to one of the panels `[n / PANEL, size, PANEL]`; the last panel is padded with zeros. */
static void pack_panel(const float *keys, float *panel, int64_t first, int64_t n, int64_t size) {
    const int64_t count = n - first < PANEL ? n - first : PANEL, square = size - size % 4;
    for (int64_t j = 0; j < PANEL; j += 4) {
        const float *row = keys + (first + j) * size;
        const int64_t whole = j + 4 <= count ? square : 0;
        for (int64_t c = 0; c < whole; c += 4) pack_square(row + c, panel + c * PANEL + j, size);
        for (int64_t c = whole; c < size; c++)
            for (int64_t i = 0; i < 4; i++) panel[c * PANEL + j + i] = j + i < count ? row[i * size + c] : 0;
    }
}

/* scores[r, j] = Σ_c queries[c, r] panel[c, j] */
static void score_tile(const float *queries, const float *panel, float *scores, int64_t stride, int64_t size) {
    floats sums[TILE][2] = {};
    for (int64_t c = 0; c < size; c++) {
        const floats left = load_float32(panel + c * PANEL), right = load_float32(panel + c * PANEL + LANES);
        for (int r = 0; r < TILE; r++) {
            sums[r][0] += queries[c * TILE + r] * left;
            sums[r][1] += queries[c * TILE + r] * right;
        }
    }
    #pragma GCC unroll 12
    for (int r = 0; r < TILE; r++) {
        store_float32(scores + r * stride, without_nan(sums[r][0]));
        store_float32(scores + r * stride + LANES, without_nan(sums[r][1]));
    }
}

static inline int64_t expert_index(int64_t row, int64_t column) {
    const int64_t shell = row > column ? row : column;
    return shell * shell + shell + row - column;
}

/* Buffers of one thread. */
typedef struct {
    float *queries, *scores, *best[2], *sums, *best_sums;
    int32_t *places[2], *best_pairs, *pair_counts, *pair_rows, *pair_columns;
    selection_buffers selection;
} workspace;

/* Divides memory among the buffers of a workspace; returns its size in bytes. Called with NULL first. The size
   includes what functions overwrite or read beyond their results. */
static int64_t lay_out(workspace *w, char *memory, int64_t n, int64_t k, int64_t size, int64_t num_pairs) {
    int64_t bytes = 0;
    TAKE(w->queries, BLOCK * size);
    TAKE(w->scores, BLOCK * round_up(n, PANEL) + 64);
    TAKE(w->sums, GROUP * round_up(num_pairs, LANES) + 64);
    TAKE(w->best_sums, GROUP * k + 1);
    TAKE(w->best_pairs, GROUP * k + 1);
    TAKE(w->pair_counts, k);
    TAKE(w->pair_rows, num_pairs);
    TAKE(w->pair_columns, num_pairs);
    for (int half = 0; half < 2; half++) {
        TAKE(w->best[half], BLOCK * k + LANES);
        TAKE(w->places[half], BLOCK * k + 1);
    }
    return bytes + lay_out_selection(&w->selection, memory, n > num_pairs ? n : num_pairs, k);
}

/* Lists the pairs of ranks (i, j) that can be among the k best sums, those with (i + 1) (j + 1) <= k: their number for
   each i, and the ranks of each pair. */
static void list_pairs(int64_t k, const workspace *w) {
    for (int64_t i = 0, pair = 0; i < k; i++) {
        w->pair_counts[i] = k / (i + 1);
        for (int64_t j = 0; j < w->pair_counts[i]; j++, pair++) {
            w->pair_rows[pair] = i;
            w->pair_columns[pair] = j;
        }
    }
}

/* Writes the sums of the pairs of a query, padded with -∞. The next row overwrites excess elements of a row. */
static void sum_pairs(const float *rows, const float *columns, int64_t k, int64_t padded, float *sums,
                      const int32_t *pair_counts) {
    const int64_t single = k / 2;  /* rows from here on have one pair, with the best column */
    const float *end = sums + padded;
    for (int64_t i = 0; i < single; sums += pair_counts[i++])
        for (int64_t j = 0; j < pair_counts[i]; j += LANES)
            store_float32(sums + j, without_nan(rows[i] + load_float32(columns + j)));
    for (int64_t i = single; i < k; i += LANES)
        store_float32(sums + i - single, without_nan(load_float32(rows + i) + columns[0]));
    for (sums += k - single; sums < end; sums++) *sums = -INFINITY;
}

/* Selects the k best experts of each of at most GROUP queries of a block, from query `first` on, among the pairs of
   their best rows and columns. Results of successive queries are `step` elements apart. */
static void select_experts(int64_t first, int64_t queries, int64_t k, int64_t num_pairs, int64_t step,
                           int64_t *indices, float *scores, const workspace *w) {
    const int64_t padded = round_up(num_pairs, LANES);
    for (int64_t q = 0; q < queries; q++)
        sum_pairs(w->best[0] + (first + q) * k, w->best[1] + (first + q) * k, k, padded, w->sums + q * padded,
                  w->pair_counts);
    select_best(w->sums, queries, padded, num_pairs, k, w->best_sums, w->best_pairs, &w->selection);
    for (int64_t q = 0; q < queries; q++) {
        const int32_t *rows = w->places[0] + (first + q) * k, *columns = w->places[1] + (first + q) * k;
        for (int64_t rank = 0; rank < k; rank++) {
            const int32_t pair = w->best_pairs[q * k + rank];
            indices[q * step + rank] = expert_index(rows[w->pair_rows[pair]], columns[w->pair_columns[pair]]);
            scores[q * step + rank] = w->best_sums[q * k + rank];
        }
    }
}

/* queries [tokens, heads, 2, size], keys [sets, 2, n, size] with one set or one per head
   -> indices and scores [tokens, heads, k]. Returns 0, or -1 if out of memory. */
int64_t retrieve(const float *queries, const float *keys, int64_t *indices, float *scores, int64_t num_tokens,
             int64_t heads, int64_t sets, int64_t n, int64_t size, int64_t k, int threads) {
    const int64_t rows = num_tokens * heads / sets, panels = round_up(n, PANEL) / PANEL;
    const int64_t padded = panels * PANEL, blocks = (rows + BLOCK - 1) / BLOCK;
    int64_t num_pairs = 0;
    for (int64_t i = 0; i < k; i++) num_pairs += k / (i + 1);
    workspace sizes;
    const int64_t bytes = lay_out(&sizes, NULL, n, k, size, num_pairs);
    float *packed = NULL;
    char *memory = NULL;
    if (posix_memalign((void **)&packed, 64, sets * 2 * padded * size * sizeof(float))) return -1;
    if (posix_memalign((void **)&memory, 64, threads * bytes)) { free(packed); return -1; }

    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t panel = 0; panel < sets * 2 * panels; panel++)
        pack_panel(keys + panel / panels * n * size, packed + panel * PANEL * size, panel % panels * PANEL, n, size);

    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t part = 0; part < threads; part++) {
        workspace w;
        lay_out(&w, memory + part * bytes, n, k, size, num_pairs);
        list_pairs(k, &w);
        for (int64_t task = part; task < sets * blocks; task += threads) {
            const int64_t set = task / blocks, first = task % blocks * BLOCK;
            const int64_t count = rows - first < BLOCK ? rows - first : BLOCK;
            for (int half = 0; half < 2; half++) {
                for (int64_t r = 0; r < round_up(count, TILE); r++) {
                    const int64_t row = (first + (r < count ? r : 0)) * sets + set;
                    const float *query = queries + (row * 2 + half) * size;
                    float *tile = w.queries + r / TILE * TILE * size + r % TILE;
                    for (int64_t c = 0; c < size; c++) tile[c * TILE] = query[c];
                }
                for (int64_t panel = 0; panel < panels; panel++)
                    for (int64_t r = 0; r < count; r += TILE)
                        score_tile(w.queries + r * size, packed + ((set * 2 + half) * panels + panel) * PANEL * size,
                                   w.scores + r * padded + panel * PANEL, padded, size);
                for (int64_t r = 0; r < count; r++)
                    for (int64_t j = n; j < padded; j++) w.scores[r * padded + j] = -INFINITY;
                select_best(w.scores, count, padded, n, k, w.best[half], w.places[half], &w.selection);
            }
            for (int64_t r = 0; r < count; r += GROUP) {
                const int64_t start = ((first + r) * sets + set) * k;
                select_experts(r, count - r < GROUP ? count - r : GROUP, k, num_pairs, sets * k, indices + start,
                               scores + start, &w);
            }
        }
    }
    free(packed);
    free(memory);
    return 0;
}

/* Where the sub-keys of experts are in memory, among the rows of C and of C': the inverse of expert_index. Returns
   whether an index is out of range. */
static int find_keys(const int64_t *restrict indices, int64_t k, int64_t n, int64_t size, int64_t *restrict rows,
                     int64_t *restrict columns) {
    int64_t outside = 0;
    for (int64_t a = 0; a < k; a++) {
        const int64_t index = indices[a], shell = sqrt((double)index), before_diagonal = index - shell * shell - shell;
        rows[a] = (shell + (before_diagonal < 0 ? before_diagonal : 0)) * size;
        columns[a] = (shell - (before_diagonal > 0 ? before_diagonal : 0)) * size;
        outside |= (index < 0) | (index >= n * n);
    }
    return outside;
}

/* Writes `vectors` vectors, a constant number, of Σ_a gradient[a] keys[places[a]]. */
static inline __attribute__((always_inline)) void sum_vectors(const float *gradient, const int64_t *places, int64_t k,
                                                              const float *keys, float *sum, const int vectors) {
    floats sums[2] = {};
    for (int64_t a = 0; a < k; a++)
        for (int v = 0; v < vectors; v++) sums[v] += gradient[a] * load_float32(keys + places[a] + v * LANES);
    for (int v = 0; v < vectors; v++) store_float32(sum + v * LANES, sums[v]);
}

/* sum = Σ_a gradient[a] keys[places[a]] */
static void sum_keys(const float *gradient, const int64_t *places, int64_t k, const float *keys, float *sum,
                     int64_t size) {
    int64_t c = 0;
    for (; c + 2 * LANES <= size; c += 2 * LANES) sum_vectors(gradient, places, k, keys + c, sum + c, 2);
    for (; c + LANES <= size; c += LANES) sum_vectors(gradient, places, k, keys + c, sum + c, 1);
    for (; c < size; c++) {
        sum[c] = 0;
        for (int64_t a = 0; a < k; a++) sum[c] += gradient[a] * keys[places[a] + c];
    }
}

/* Updates `vectors` vectors, a constant number, of of_keys[places[a]] += gradient[a] query. */
static inline __attribute__((always_inline)) void add_vectors(const float *gradient, const int64_t *places, int64_t k,
                                                              const float *query, float *of_keys, const int vectors) {
    floats part[2];
    for (int v = 0; v < vectors; v++) part[v] = load_float32(query + v * LANES);
    for (int64_t a = 0; a < k; a++)
        for (int v = 0; v < vectors; v++) {
            float *of_key = of_keys + places[a] + v * LANES;
            store_float32(of_key, load_float32(of_key) + gradient[a] * part[v]);
        }
}

/* of_keys[places[a]] += gradient[a] query */
static void add_query(const float *gradient, const int64_t *places, int64_t k, const float *query, float *of_keys,
                      int64_t size) {
    int64_t c = 0;
    for (; c + 2 * LANES <= size; c += 2 * LANES) add_vectors(gradient, places, k, query + c, of_keys + c, 2);
    for (; c + LANES <= size; c += LANES) add_vectors(gradient, places, k, query + c, of_keys + c, 1);
    for (; c < size; c++)
        for (int64_t a = 0; a < k; a++) of_keys[places[a] + c] += gradient[a] * query[c];
}

/* Computes gradients for one query, NULL where not needed. A score is the product of one half of the query with a row
   of C plus that of the other half with a row of C'. `places` is a buffer for 2k. Returns 0, or 1 if an index is out
   of range. */
static int gradients_of_query(const float *gradient, const int64_t *indices, const float *query, const float *keys,
                              float *of_query, float *of_keys, int64_t n, int64_t size, int64_t k, int64_t *places) {
    if (find_keys(indices, k, n, size, places, places + k)) return 1;
    for (int half = 0; half < 2; half++, places += k) {
        const int64_t first = half * n * size;
        if (of_query) sum_keys(gradient, places, k, keys + first, of_query + half * size, size);
        if (of_keys) add_query(gradient, places, k, query + half * size, of_keys + first, size);
    }
    return 0;
}

/* Computes the gradients of queries `[tokens, heads, 2, size]` and keys `[sets, 2, n, size]` from those of the scores
   at `indices` `[tokens, heads, k]`; NULL where not needed. Every thread has its own sum for the keys.
   Returns 0, -1 if out of memory, or 1 if an index is out of range. */
int64_t retrieval_gradients(const float *gradient, const int64_t *indices, const float *queries, const float *keys,
                            float *of_queries, float *of_keys, int64_t tokens, int64_t heads, int64_t sets, int64_t n,
                            int64_t size, int64_t k, int threads) {
    const int64_t set_size = 2 * n * size, rows = tokens * heads / sets, chunk = (rows + threads - 1) / threads;
    int64_t *places = malloc(threads * 2 * k * sizeof *places + 1);
    float *others = of_keys ? malloc((threads - 1) * set_size * sizeof *others + 1) : NULL;
    if (!places || (of_keys && !others)) { free(places); free(others); return -1; }
    int failed = 0;
    for (int64_t set = 0; set < sets; set++) {
        float *of_set = of_keys ? of_keys + set * set_size : NULL;
        #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int64_t part = 0; part < threads; part++) {
            float *own = part && of_keys ? others + (part - 1) * set_size : of_set;
            if (own) memset(own, 0, set_size * sizeof *own);
            for (int64_t r = part * chunk; r < rows && r < (part + 1) * chunk; r++) {
                const int64_t row = r * sets + set;
                if (gradients_of_query(gradient + row * k, indices + row * k, queries + row * 2 * size,
                                       keys + set * set_size, of_queries ? of_queries + row * 2 * size : NULL, own, n,
                                       size, k, places + part * 2 * k)) {
                    #pragma omp atomic write
                    failed = 1;
                }
            }
        }
        #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int64_t i = 0; i < (of_keys ? set_size : 0); i++)
            for (int64_t part = 1; part < threads; part++) of_set[i] += others[(part - 1) * set_size + i];
    }
    free(places);
    free(others);
    return failed;
}
