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
"""Product-key retrieval on a CPU, in C: scores and selection stay in the cache, block by block."""

from collections.abc import Sequence

import torch

from .native_library import PREAMBLE, call, check_shape, check_tensor, refuse_index


SOURCE = (
    PREAMBLE
    + r"""
#include <math.h>
#include <stdlib.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

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

static inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
static inline floats larger(floats a, floats b) { return (floats)select_words(b > a, (words)b, (words)a); }

static inline ints lanes(void) {
    ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return lane;
}

/* Writes the lanes that reach a threshold, packed, to `values`, and their positions, counted from `first`, to
   `places`; returns how many they are. Up to LANES elements of both are overwritten. */
static inline int64_t keep(floats v, float threshold, int64_t first, float *values, int32_t *places) {
#if defined(__AVX512F__)
    const __mmask16 mask = _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(threshold), _CMP_GE_OQ);
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(mask, (__m512)v));
    _mm512_storeu_si512(places, _mm512_maskz_compress_epi32(mask, (__m512i)(lanes() + (int32_t)first)));
    return __builtin_popcount(mask);
#else
    int64_t count = 0;
    uint32_t bits = 0;
#if defined(__AVX__)
    bits = _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(threshold), _CMP_GE_OQ));
#else
    for (int lane = 0; lane < LANES; lane++) bits |= (uint32_t)(v[lane] >= threshold) << lane;
#endif
    for (; bits; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        values[count] = v[lane];
        places[count++] = first + lane;
    }
    return count;
#endif
}

/* Copies keys `[n, size]` to one of the panels `[n / PANEL, size, PANEL]`; the last panel is padded with zeros. */
static void pack_panel(const float *keys, float *panel, int64_t first, int64_t n, int64_t size) {
    for (int64_t j = 0; j < PANEL; j++)
        for (int64_t c = 0; c < size; c++)
            panel[c * PANEL + j] = first + j < n ? keys[(first + j) * size + c] : 0;
}

/* scores[r, j] = Σ_c queries[c, r] panel[c, j]. NaN becomes infinity, so that it is selected and seen. */
static void score_tile(const float *queries, const float *panel, float *scores, int64_t stride, int64_t size) {
    floats sums[TILE][2] = {};
    for (int64_t c = 0; c < size; c++) {
        const floats left = load_float32(panel + c * PANEL), right = load_float32(panel + c * PANEL + LANES);
        for (int r = 0; r < TILE; r++) {
            sums[r][0] += queries[c * TILE + r] * left;
            sums[r][1] += queries[c * TILE + r] * right;
        }
    }
    const words infinite = (words){} + 0x7f800000;
    for (int r = 0; r < TILE; r++)
        for (int j = 0; j < 2; j++) {
            const words ordered = select_words(sums[r][j] == sums[r][j], (words)sums[r][j], infinite);
            store_float32(scores + r * stride + j * LANES, (floats)ordered);
        }
}

/* A threshold near the k-th best score that at least k scores reach: the k-th best of the maxima of 2k groups of
   lanes. */
static float threshold_of(const float *scores, int64_t n, int64_t k, floats *maxima, ints *counts) {
    const int64_t groups = round_up(2 * k, LANES) / LANES;
    if (n <= groups * LANES) return -INFINITY;
    for (int64_t g = 0; g < groups; g++) {
        maxima[g] = load_float32(scores + g * LANES);
        counts[g] = (ints){};
    }
    for (int64_t i = groups * LANES, g = 0; i < n; i += LANES, g = g + 1 < groups ? g + 1 : 0)
        maxima[g] = larger(maxima[g], load_float32(scores + i));
    for (int64_t other = 0; other < groups * LANES; other++) {
        const float x = ((const float *)maxima)[other];
        for (int64_t g = 0; g < groups; g++) counts[g] += maxima[g] <= x;  /* true is -1 */
    }
    const words worst = (words)((floats){} - INFINITY);
    floats reached = (floats)worst;
    for (int64_t g = 0; g < groups; g++)
        reached = larger(reached, (floats)select_words(counts[g] <= (int32_t)-k, (words)maxima[g], worst));
    float threshold = reached[0];
    for (int lane = 1; lane < LANES; lane++) threshold = reached[lane] > threshold ? reached[lane] : threshold;
    return threshold;
}

/* Buffers of one thread. */
typedef struct {
    float *queries, *scores, *best[2], *values, *sorted;
    int32_t *places[2], *found, *order;
    int32_t *pair_counts, *pair_rows, *pair_columns;
    floats *maxima, *candidates;
    ints *counts, *ranks;
} workspace;

/* Selects the k best of n scores, best first; of equal scores the earlier one. n is a multiple of LANES. */
static void select_best(const float *scores, int64_t n, int64_t k, float *best, int32_t *places, const workspace *w) {
    const float threshold = threshold_of(scores, n, k, w->maxima, w->counts);
    float *candidates = (float *)w->candidates;
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += LANES)
        count += keep(load_float32(scores + i), threshold, i, candidates + count, w->found + count);
    const int64_t vectors = round_up(count, LANES) / LANES;
    for (int64_t i = count; i < vectors * LANES; i++) candidates[i] = -INFINITY;
    const ints lane = lanes();
    for (int64_t v = 0; v < vectors; v++) {
        const floats x = w->candidates[v];
        ints rank = {};
        for (int64_t j = 0; j < count; j++) {
            const float y = candidates[j];
            rank -= (x < y) | ((x == y) & (lane + (int32_t)(v * LANES) > (int32_t)j));
        }
        w->ranks[v] = rank;
    }
    for (int64_t i = 0; i < count; i++) {
        const int32_t rank = ((const int32_t *)w->ranks)[i];
        w->sorted[rank] = candidates[i];
        w->order[rank] = w->found[i];
    }
    memcpy(best, w->sorted, k * sizeof *best);
    memcpy(places, w->order, k * sizeof *places);
}

static inline int64_t expert_index(int64_t row, int64_t column) {
    const int64_t shell = row > column ? row : column;
    return shell * shell + shell + row - column;
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

/* Selects the k best experts of a query among the pairs of its best rows and columns. */
static void best_pairs(const float *rows, const int32_t *row_places, const float *columns,
                       const int32_t *column_places, int64_t k, int64_t *indices, float *scores, const workspace *w) {
    const words infinite = (words){} + 0x7f800000;
    int64_t count = 0;
    for (int64_t i = 0; i < k; count += w->pair_counts[i++])
        for (int64_t j = 0; j < w->pair_counts[i]; j += LANES) {
            const floats sums = rows[i] + load_float32(columns + j);  /* surplus lanes are overwritten */
            store_float32(w->values + count + j, (floats)select_words(sums == sums, (words)sums, infinite));
        }
    const int64_t padded = round_up(count, LANES);
    for (int64_t p = count; p < padded; p++) w->values[p] = -INFINITY;
    int32_t *pairs = w->places[0] + BLOCK * k;
    select_best(w->values, padded, k, scores, pairs, w);
    for (int64_t rank = 0; rank < k; rank++) {
        const int32_t pair = pairs[rank];
        indices[rank] = expert_index(row_places[w->pair_rows[pair]], column_places[w->pair_columns[pair]]);
    }
}

static void *take(char **memory, int64_t bytes) {
    void *start = *memory;
    if (*memory) *memory += round_up(bytes, 64);
    return start;
}

/* Divides memory among the buffers of a workspace; returns its size in bytes. Called with NULL first. */
static int64_t lay_out(workspace *w, char *memory, int64_t n, int64_t k, int64_t size, int64_t num_pairs) {
    const int64_t most = round_up(n > num_pairs ? n : num_pairs, PANEL);
    int64_t bytes = 0;
#define TAKE(field, count) \
    bytes += round_up((count) * sizeof *(field), 64); field = take(&memory, (count) * sizeof *(field))
    TAKE(w->queries, BLOCK * size);
    TAKE(w->scores, BLOCK * most);
    TAKE(w->values, most + LANES);
    TAKE(w->found, most + LANES);
    TAKE(w->candidates, most / LANES + 1);
    TAKE(w->ranks, most / LANES);
    TAKE(w->sorted, most);
    TAKE(w->order, most);
    TAKE(w->pair_counts, k);
    TAKE(w->pair_rows, num_pairs);
    TAKE(w->pair_columns, num_pairs);
    TAKE(w->maxima, round_up(2 * k, LANES) / LANES);
    TAKE(w->counts, round_up(2 * k, LANES) / LANES);
    for (int half = 0; half < 2; half++) {
        TAKE(w->best[half], BLOCK * k + LANES);
        TAKE(w->places[half], (BLOCK + 1) * k);
    }
#undef TAKE
    return bytes;
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
                for (int64_t r = 0; r < count; r++) {
                    float *row = w.scores + r * padded;
                    for (int64_t j = n; j < padded; j++) row[j] = -INFINITY;
                    select_best(row, padded, k, w.best[half] + r * k, w.places[half] + r * k, &w);
                }
            }
            for (int64_t r = 0; r < count; r++) {
                const int64_t row = (first + r) * sets + set;
                best_pairs(w.best[0] + r * k, w.places[0] + r * k, w.best[1] + r * k, w.places[1] + r * k, k,
                           indices + row * k, scores + row * k, &w);
            }
        }
    }
    free(packed);
    free(memory);
    return 0;
}

/* The cell of an expert in the key grid: the inverse of expert_index. */
static inline void cell_of(int64_t index, int64_t cell[2]) {
    const int64_t shell = sqrt((double)index), before_diagonal = index - shell * shell - shell;
    cell[0] = shell + (before_diagonal < 0 ? before_diagonal : 0);
    cell[1] = shell - (before_diagonal > 0 ? before_diagonal : 0);
}

/* to += factor * from */
static inline void add_scaled(float *restrict to, float factor, const float *restrict from, int64_t size) {
    for (int64_t c = 0; c < size; c++) to[c] += factor * from[c];
}

/* Gradients for one query. A score is the product of one half of it with a row of C plus that of the other half with a
   row of C'. NULL where one is not needed. Returns 0, or 1 if an index is out of range. */
static int gradients_of_query(const float *gradient, const int64_t *indices, const float *query, const float *keys,
                               float *of_query, float *of_keys, int64_t n, int64_t size, int64_t k) {
    if (of_query) memset(of_query, 0, 2 * size * sizeof *of_query);
    for (int64_t a = 0; a < k; a++) {
        int64_t cell[2];
        if (indices[a] < 0 || indices[a] >= n * n) return 1;
        cell_of(indices[a], cell);
        for (int half = 0; half < 2; half++) {
            const int64_t place = (half * n + cell[half]) * size;
            if (of_query) add_scaled(of_query + half * size, gradient[a], keys + place, size);
            if (of_keys) add_scaled(of_keys + place, gradient[a], query + half * size, size);
        }
    }
    return 0;
}

/* Gradients of queries `[tokens, heads, 2, size]` and keys `[sets, 2, n, size]`, given those of the scores at
   `indices` `[tokens, heads, k]`; NULL where one is not needed. Every thread sums the gradient of the keys on its own.
   Returns 0, -1 if out of memory, or 1 if an index is out of range. */
int64_t retrieval_gradients(const float *gradient, const int64_t *indices, const float *queries, const float *keys,
                            float *of_queries, float *of_keys, int64_t tokens, int64_t heads, int64_t sets, int64_t n,
                            int64_t size, int64_t k, int threads) {
    const int64_t set_size = 2 * n * size, rows = tokens * heads / sets, chunk = (rows + threads - 1) / threads;
    float *others = of_keys ? malloc((threads - 1) * set_size * sizeof *others + 1) : NULL;
    if (of_keys && !others) return -1;
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
                                       size, k)) {
                    #pragma omp atomic write
                    failed = 1;
                }
            }
        }
        #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int64_t i = 0; i < (of_keys ? set_size : 0); i++)
            for (int64_t part = 1; part < threads; part++) of_set[i] += others[(part - 1) * set_size + i];
    }
    free(others);
    return failed;
}
"""
)


def retrieve(queries: torch.Tensor, sub_keys: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Retrieve the k best experts of every query, exactly.

    Args:
        queries (`torch.Tensor` of shape `(num_tokens, num_heads, 2, d_k / 2)`): float32, on the CPU.
        sub_keys (`torch.Tensor` of shape `(num_heads or 1, 2, √N, d_k / 2)`): float32, on the CPU.
        k (`int`): Number of experts to retrieve, at most √N.

    Returns:
        `tuple(torch.Tensor)`: expert indices (int64) and scores, both of shape `(num_tokens, num_heads, k)`, best
        first.

    Raises:
        `ValueError`: if an argument is not as described.
    """
    num_tokens, num_heads, num_sets, size, half_size = _checked_sizes(queries, sub_keys)
    check_num_retrieved(k, size)
    queries, sub_keys = queries.contiguous(), sub_keys.contiguous()
    scores = queries.new_empty(num_tokens, num_heads, k)
    indices = torch.empty_like(scores, dtype=torch.int64)
    sizes = (num_tokens, num_heads, num_sets, size, half_size, k)
    if call(SOURCE, "retrieve", queries, sub_keys, indices, scores, *sizes):
        raise MemoryError(f"Out of memory while retrieving the experts of {num_tokens} tokens.")
    return indices, scores


def check_num_retrieved(k: int, size: int) -> None:
    """Raise `ValueError` if k experts of a head cannot be retrieved with `size` = √N sub-keys of each half."""
    if type(k) is not int:
        raise ValueError(f"`k`, the number of experts that a head retrieves, must be an integer, got {k!r}.")
    if not 1 <= k <= size:
        raise ValueError(
            f"`num_experts_per_head` must be at least 1 and at most √num_experts = {size}, the number of sub-keys of "
            f"a half, got {k}."
        )


def _checked_sizes(queries, sub_keys):
    """Number of tokens, heads and sets, √N and d_k / 2."""
    # Inline, and repeated in `_refuse`: for a single token, calls cost as much as the scores.
    are_on_cpu = queries.is_cpu and sub_keys.is_cpu
    if not (are_on_cpu and queries.dtype == sub_keys.dtype == torch.float32 and queries.dim() == sub_keys.dim() == 4):
        _refuse(queries, sub_keys)
    num_tokens, num_heads, halves, half_size = queries.shape
    num_sets, key_halves, size, key_size = sub_keys.shape
    if halves != 2 or key_halves != 2 or half_size != key_size or not 0 < num_sets in (1, num_heads):
        _refuse(queries, sub_keys)
    return num_tokens, num_heads, num_sets, size, half_size


def _refuse(queries, sub_keys):
    check_tensor("queries", queries, 4, (torch.float32,))
    check_tensor("sub_keys", sub_keys, 4, (torch.float32,))
    num_tokens, num_heads, _, half_size = queries.shape
    num_sets, _, size, _ = sub_keys.shape
    check_shape("queries", queries, (num_tokens, num_heads, 2, half_size), "(num_tokens, num_heads, 2, d_k / 2)")
    check_shape("sub_keys", sub_keys, (num_sets, 2, size, half_size), "(num_heads or 1, 2, √N, d_k / 2)")
    raise ValueError(f"`sub_keys` must be 1 set, or one for each of {num_heads} heads, got {num_sets} sets.")


def empty_gradients(
    queries: torch.Tensor, sub_keys: torch.Tensor, wanted: Sequence[bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate what [`retrieval_gradients`] returns."""
    of_queries, of_sub_keys = (
        torch.empty_like(each) if is_wanted else each.new_empty(0)
        for each, is_wanted in zip((queries, sub_keys), wanted, strict=True)
    )
    return of_queries, of_sub_keys


def retrieval_gradients(
    gradient: torch.Tensor,
    indices: torch.Tensor,
    queries: torch.Tensor,
    sub_keys: torch.Tensor,
    wanted: Sequence[bool] = (True, True),
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Compute the gradients of the queries and sub-keys of [`retrieve`], given that of its scores.

    Args:
        gradient (`torch.Tensor` of shape `(num_tokens, num_heads, k)`): float32, on the CPU.
        indices (`torch.Tensor` of shape `(num_tokens, num_heads, k)`): Expert indices, as retrieved.
        queries, sub_keys: See [`retrieve`].
        wanted (`Sequence[bool]`, *optional*, defaults to both): Whether the gradient of `queries` and that of
            `sub_keys` are to be computed.

    Returns:
        `tuple(torch.Tensor)`: gradients of `queries` and of `sub_keys`; without elements where one is not wanted.

    Raises:
        `ValueError`: if an argument is not as described.
        `IndexError`: if an expert index is out of range.
    """
    num_tokens, num_heads, num_sets, size, half_size = _checked_sizes(queries, sub_keys)
    check_tensor("gradient", gradient, 3, (torch.float32,))
    check_tensor("indices", indices, 3, (torch.int64,))
    check_shape("indices", indices, (num_tokens, num_heads, indices.shape[2]), "(num_tokens, num_heads, k)")
    check_shape("gradient", gradient, indices.shape, "(num_tokens, num_heads, k)")
    gradient, indices, queries, sub_keys = (each.contiguous() for each in (gradient, indices, queries, sub_keys))
    of_queries, of_sub_keys = empty_gradients(queries, sub_keys, wanted)
    tensors = (gradient, indices, queries, sub_keys, of_queries, of_sub_keys)
    sizes = (num_tokens, num_heads, num_sets, size, half_size, indices.shape[2])
    failed = call(SOURCE, "retrieval_gradients", *tensors, *sizes)
    if failed > 0:
        refuse_index(indices, size**2)
    if failed:
        raise MemoryError(
            f"Out of memory: every thread needs {sub_keys.numel():,} elements for the gradient of the sub-keys."
        )
    return of_queries, of_sub_keys
