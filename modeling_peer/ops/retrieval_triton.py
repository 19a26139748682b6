# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Product-key retrieval on a GPU, in Triton, for some tokens at a time. It selects the k best scores of a row by sorting
pairs of a score and its place, packed into integers. This is exact, and takes the earlier of two equal scores.
"""

import functools
from collections.abc import Sequence

import torch

from ..experts import expert_cell, winning_pairs
from .gradient_triton import group, row_gradient
from .kernels_torch import check_num_retrieved, empty_gradients
from .triton_launch import check_indices, launch, tl, triton


# Number of scores held at a time: 32 MB, which fit into the cache of a large GPU.
PIECE_SIZE = 2**23

# Number of scores in the registers of each warp of a program that selects the best.
SCORES_PER_WARP = 2**10


if triton is not None:

    @triton.jit(do_not_specialize=["num_rows"])
    def _score(
        queries,
        sub_keys,
        scores,
        num_rows,
        size,
        sets,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
        KEYS: tl.constexpr,
        DEPTH: tl.constexpr,
    ):
        """
        Compute `scores[r, p, n] = queries[r, p] · sub_keys[s, p, n]` for a block of rows r = s, s + sets, … and of
        sub-keys n. Three passes of TensorFloat-32 give products that have two bits less than in float32.
        """
        blocks = tl.cdiv(size, KEYS)
        half = tl.program_id(1) % 2
        key_set = tl.program_id(1) // 2
        rows = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
        keys = tl.program_id(0) % blocks * KEYS + tl.arange(0, KEYS)
        row_starts = (rows.to(tl.int64) * sets + key_set) * 2 + half
        key_starts = (key_set * 2 + half) * size + keys
        sums = tl.zeros([ROWS, KEYS], dtype=tl.float32)
        for first in range(0, WIDTH, DEPTH):
            columns = first + tl.arange(0, DEPTH)
            inside = columns < WIDTH
            query = tl.load(
                queries + row_starts[:, None] * WIDTH + columns[None, :],
                mask=(rows < num_rows)[:, None] & inside[None, :],
                other=0.0,
            )
            key = tl.load(
                sub_keys + key_starts[None, :] * WIDTH + columns[:, None],
                mask=(keys < size)[None, :] & inside[:, None],
                other=0.0,
            )
            sums = tl.dot(query, key, sums, input_precision="tf32x3")
        mask = (rows < num_rows)[:, None] & (keys < size)[None, :]
        tl.store(scores + row_starts[:, None] * size + keys[None, :], sums, mask=mask)

    @triton.jit
    def _pack(values, places, present):
        """
        Pack scores and their places into integers that sort like the scores, where the earlier of equal ones is
        larger. NaN becomes infinity, so that it is selected and noticed. Absent scores come last.
        """
        values = tl.where(values == values, values, float("inf"))
        bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        packed = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - places).to(tl.int64)
        return tl.where(present, packed, -0x8000000000000000)

    @triton.jit
    def _scores_of(packed):
        ordered = (packed >> 32).to(tl.int32)
        return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)

    @triton.jit
    def _places_of(packed):
        return 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)

    @triton.jit
    def _select(scores, best, places, size, k, GROUPS: tl.constexpr, GROUP: tl.constexpr, KEPT: tl.constexpr):
        """
        Write `best[r]` and `places[r]`, the k best of `scores[r]` and their places, best first. They are in the groups
        of neighbors that have the k largest maxima.
        """
        row = tl.program_id(0).to(tl.int64)
        starts = tl.arange(0, GROUPS) * GROUP
        columns = starts[:, None] + tl.arange(0, GROUP)[None, :]
        values = tl.load(scores + row * size + columns, mask=columns < size, other=-float("inf"))
        maxima = tl.max(tl.where(values == values, values, float("inf")), axis=1)
        groups = tl.topk(_pack(maxima, starts, starts < size), KEPT)
        columns = _places_of(groups)[:, None] + tl.arange(0, GROUP)[None, :]
        present = (columns >= 0) & (columns < size)
        values = tl.load(scores + row * size + columns, mask=present, other=0.0)
        found = tl.topk(tl.reshape(_pack(values, columns, present), [KEPT * GROUP]), KEPT)
        ranks = tl.arange(0, KEPT)
        tl.store(best + row * k + ranks, _scores_of(found), mask=ranks < k)
        tl.store(places + row * k + ranks, _places_of(found), mask=ranks < k)

    @triton.jit
    def _select_pairs(
        best, places, row_ranks, column_ranks, indices, scores, num_pairs, k, PAIRS: tl.constexpr, KEPT: tl.constexpr
    ):
        """Write `indices[r]` and `scores[r]`, the k best experts of query r, from the best of its two halves."""
        query = tl.program_id(0).to(tl.int64)
        rows = query * 2 * k
        columns = rows + k
        pairs = tl.arange(0, PAIRS)
        present = pairs < num_pairs
        of_rows = tl.load(best + rows + tl.load(row_ranks + pairs, mask=present, other=0), mask=present, other=0.0)
        of_columns = tl.load(
            best + columns + tl.load(column_ranks + pairs, mask=present, other=0), mask=present, other=0.0
        )
        found = tl.topk(_pack(of_rows + of_columns, pairs, present), KEPT)
        ranks = tl.arange(0, KEPT)
        kept = ranks < k
        pair = _places_of(found)
        row = tl.load(places + rows + tl.load(row_ranks + pair, mask=kept, other=0), mask=kept, other=0).to(tl.int64)
        column = tl.load(places + columns + tl.load(column_ranks + pair, mask=kept, other=0), mask=kept, other=0)
        # As `expert_index` in experts.py.
        shell = tl.maximum(row, column)
        tl.store(indices + query * k + ranks, shell * shell + shell + row - column, mask=kept)
        tl.store(scores + query * k + ranks, _scores_of(found), mask=kept)


def retrieve(queries: torch.Tensor, sub_keys: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See [`CpuKernels.retrieve`]."""
    check_num_retrieved(k, sub_keys.shape[2])
    queries, sub_keys = queries.contiguous(), sub_keys.contiguous()
    num_tokens, num_heads = queries.shape[:2]
    scores = queries.new_empty(num_tokens, num_heads, k)
    indices = torch.empty_like(scores, dtype=torch.int64)
    step = max(PIECE_SIZE // (num_heads * 2 * sub_keys.shape[2]), 1)
    for start in range(0, num_tokens, step):
        piece = slice(start, start + step)
        half_scores = score_halves(queries[piece], sub_keys)
        _select_pairs_of(*select(half_scores, k), indices[piece], scores[piece])
    return indices, scores


def score_halves(queries: torch.Tensor, sub_keys: torch.Tensor) -> torch.Tensor:
    """Scores of the halves of queries with their sub-keys, `(num_tokens, num_heads, 2, √N)`."""
    (num_tokens, num_heads, _, width), (sets, _, size, _) = queries.shape, sub_keys.shape
    scores = queries.new_empty(num_tokens, num_heads, 2, size)
    num_rows = num_tokens * num_heads // sets
    blocks = {"ROWS": 128, "KEYS": 64, "DEPTH": 16 if width <= 16 else 32, "num_warps": 8}
    grid = triton.cdiv(num_rows, blocks["ROWS"]) * triton.cdiv(size, blocks["KEYS"]), 2 * sets
    launch(_score, grid, queries, sub_keys, scores, num_rows, size, sets, WIDTH=width, **blocks)
    return scores


def select(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Select the k best of the last dimension and their places (int32), `(..., k)`, best first, ties in order."""
    size = scores.shape[-1]
    best = scores.new_empty(*scores.shape[:-1], k)
    places = torch.empty_like(best, dtype=torch.int32)
    kept = _power_of_2(k)
    columns = max(_power_of_2(size), kept)
    # About as many groups as candidates in the groups that are kept.
    group_size = 2 ** ((columns // kept).bit_length() // 2)
    blocks = {"GROUPS": columns // group_size, "GROUP": group_size, "KEPT": kept}
    warps = min(triton.cdiv(columns, SCORES_PER_WARP), 16)
    launch(_select, (best.numel() // k,), scores, best, places, size, k, **blocks, num_warps=warps)
    return best, places


def _select_pairs_of(best, places, indices, scores):
    k = scores.shape[-1]
    pairs = _pairs(k, scores.device)
    blocks = {"PAIRS": _power_of_2(len(pairs[0])), "KEPT": _power_of_2(k), "num_warps": 1}
    grid = (scores.numel() // k,)
    launch(_select_pairs, grid, best, places, *pairs, indices, scores, len(pairs[0]), k, **blocks)


@functools.cache  # because a copy to a GPU waits for it
def _pairs(k, device):
    with torch.inference_mode(False):  # so that training can use them even if inference comes first
        return [each.contiguous() for each in winning_pairs(k, device)]


def _power_of_2(number):
    """Return the next power of 2, at least 2 for Triton's selection."""
    return max(triton.next_power_of_2(number), 2)


def retrieval_gradients(
    gradient, indices, queries, sub_keys, wanted: Sequence[bool] = (True, True)
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    See [`CpuKernels.retrieval_gradients`]. Each gradient is a sum of rows of the other input, times the gradients of
    scores. Only the selected sub-keys are read.
    """
    check_indices(indices, sub_keys.shape[2] ** 2)
    of_queries, of_sub_keys = empty_gradients(queries.contiguous(), sub_keys.contiguous(), wanted)
    (sets, halves, size, width), k = sub_keys.shape, indices.shape[-1]
    # The rows of the sub-keys of each query's experts: `(num_tokens, num_heads, 2, k)`.
    first = torch.arange(sets * halves, device=indices.device).view(sets, halves, 1) * size
    key_rows = torch.stack(expert_cell(indices), -2) + first
    coefficients = gradient[:, :, None].expand_as(key_rows).reshape(-1)
    key_rows, tokens, table = key_rows.reshape(-1), queries.reshape(-1, width), sub_keys.reshape(-1, width)
    sources = torch.arange(len(tokens) + 1, dtype=torch.int32, device=tokens.device)
    if wanted[0]:
        row_gradient(coefficients, key_rows.int(), sources * k, table, of_queries.view_as(tokens))
    if wanted[1]:
        rows, starts, order = group(key_rows, len(table))
        sources = sources[:-1, None].expand(-1, k).reshape(-1)
        of_table = of_sub_keys.zero_().view_as(table)
        row_gradient(coefficients[order], sources[order], starts, tokens, of_table, rows)
    return of_queries, of_sub_keys
