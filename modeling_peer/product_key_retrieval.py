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
"""Exact product-key retrieval: the best k of N experts by looking at 2 √N sub-keys (paper, section 2.1)."""

import math
from collections.abc import Sequence

import torch

from .expert_kernels import (
    ALL_EXPERT_KERNELS,
    NAMESPACE,
    needs_operator,
    refuse_double_backward,
)
from .key_grid import expert_cell, expert_index
from .product_key_retrieval_cpu import empty_gradients


MASKED_SCORES = 2**22  # of a piece of the tokens


def _winning_pairs(k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Ranks (i, j) of the pairs that can be among the best k sums: whatever is before (i, j) in both lists,
    (i + 1) (j + 1) - 1 pairs, is at least as good. 50 of 256 pairs for k = 16.
    """
    rows, columns = zip(*((i, j) for i in range(k) for j in range(k // (i + 1))), strict=True)
    return torch.tensor(rows, device=device), torch.tensor(columns, device=device)


def product_key_topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The k best experts of every query, exactly.

    Args:
        scores (`torch.Tensor` of shape `(..., 2, √N)`):
            Scores of the two halves of a query against the two sets of sub-keys; an expert's score is their sum.
        k (`int`):
            Number of experts to retrieve, at most √N.

    Returns:
        `tuple(torch.Tensor)`: expert numbers (int64) and scores, both of shape `(..., k)`, best first.
    """
    half_scores, half_ranks = scores.topk(k, dim=-1)
    row_rank, column_rank = _winning_pairs(k, scores.device)
    pair_scores = half_scores[..., 0, :][..., row_rank] + half_scores[..., 1, :][..., column_rank]
    top_scores, pairs = pair_scores.topk(k, dim=-1)
    rows = half_ranks[..., 0, :].gather(-1, row_rank[pairs])
    columns = half_ranks[..., 1, :].gather(-1, column_rank[pairs])
    return expert_index(rows, columns), top_scores


def retrieve(queries: torch.Tensor, sub_keys: torch.Tensor, k: int, kernels: str) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The k best experts of every query, exactly.

    Args:
        queries (`torch.Tensor` of shape `(num_tokens, num_heads, 2, d_k / 2)`):
            The two halves of every query.
        sub_keys (`torch.Tensor` of shape `(num_heads or 1, 2, √N, d_k / 2)`):
            The two sets of sub-keys, of each head or of all.
        k (`int`):
            Number of experts to retrieve, at most √N.
        kernels (`str`):
            What retrieves them, see [`resolve_kernels`]: a product of matrices and [`product_key_topk`] on its result, or
            where an implementation has `retrieve` and `retrieval_gradients` for float32, these.

    Returns:
        `tuple(torch.Tensor)`: expert numbers (int64) and scores, both of shape `(num_tokens, num_heads, k)`, best first.
    """
    if queries.dtype == torch.float32 and hasattr(ALL_EXPERT_KERNELS[kernels], "retrieve"):
        if not needs_operator(queries, sub_keys):
            return ALL_EXPERT_KERNELS[kernels].retrieve(queries, sub_keys, k)
        scores, indices = product_key_retrieval(queries, sub_keys, k, kernels)
        return indices, scores
    if sub_keys.shape[0] == 1:
        scores = torch.einsum("thpc,pnc->thpn", queries, sub_keys[0])
    else:
        scores = torch.einsum("thpc,hpnc->thpn", queries, sub_keys)
    return product_key_topk(scores, k)


class ExpertMask:
    """
    Which experts of a key grid take part in a retrieval.

    Args:
        experts (`torch.Tensor` of shape `(num_experts,)`): bool, True where one does.

    Attributes:
        num_experts (`int`): How many do.
        grid_size (`int`, *optional*): Side of the smaller grid whose experts they are; `None` if they are none's.
    """

    def __init__(self, experts: torch.Tensor):
        self.experts = experts
        self.num_experts = int(experts.sum())
        side = math.isqrt(self.num_experts)
        is_grid = side * side == self.num_experts and bool(experts[: self.num_experts].all())
        self.grid_size = side if is_grid else None


def retrieve_unmasked(
    queries: torch.Tensor, sub_keys: torch.Tensor, k: int, kernels: str, expert_mask: ExpertMask
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    [`retrieve`] among the experts of a mask, of which there must be k.

    Where those are the experts that a smaller grid had, it is the retrieval of that grid, to the bit. Any other mask cuts
    through rows and columns, and costs a score of every expert.
    """
    if expert_mask.grid_size is not None and expert_mask.grid_size >= k:
        return retrieve(queries, sub_keys[:, :, : expert_mask.grid_size].contiguous(), k, kernels)
    is_masked = ~expert_mask.experts.to(queries.device)
    row, column = expert_cell(torch.arange(len(is_masked), device=queries.device))
    indices, scores = [], []
    for some_queries in queries.split(max(1, MASKED_SCORES // (queries.shape[1] * len(is_masked)))):
        halves = torch.einsum("thpc,hpnc->thpn", some_queries, sub_keys.expand(queries.shape[1], -1, -1, -1))
        all_scores = halves[..., 0, :][..., row] + halves[..., 1, :][..., column]
        top = all_scores.masked_fill(is_masked, -torch.inf).topk(k, dim=-1)
        indices.append(top.indices)
        scores.append(top.values)
    return torch.cat(indices), torch.cat(scores)


@torch.library.custom_op(f"{NAMESPACE}::product_key_retrieval", mutates_args=())
def product_key_retrieval(
    queries: torch.Tensor, sub_keys: torch.Tensor, k: int, kernels: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    [`retrieve`] by an implementation's own function; its backward looks at no sub-key that was not selected. Returns scores
    and expert numbers.
    """
    indices, scores = ALL_EXPERT_KERNELS[kernels].retrieve(queries, sub_keys, k)
    return scores, indices


@product_key_retrieval.register_fake
def _(queries, sub_keys, k, kernels):
    scores = queries.new_empty(*queries.shape[:2], k)
    return scores, torch.empty_like(scores, dtype=torch.int64)


def _save_for_backward(ctx, inputs, output):
    queries, sub_keys, _, ctx.kernels = inputs
    ctx.save_for_backward(queries, sub_keys, output[1])
    ctx.mark_non_differentiable(output[1])


@torch.library.custom_op(f"{NAMESPACE}::product_key_retrieval_gradients", mutates_args=())
def product_key_retrieval_gradients(
    gradient: torch.Tensor,
    indices: torch.Tensor,
    queries: torch.Tensor,
    sub_keys: torch.Tensor,
    wanted: Sequence[bool],
    kernels: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Gradients of the queries and sub-keys of [`product_key_retrieval`], from that of its scores and what it found; without
    elements where one is not wanted.
    """
    return ALL_EXPERT_KERNELS[kernels].retrieval_gradients(gradient, indices, queries, sub_keys, wanted)


@product_key_retrieval_gradients.register_fake
def _(gradient, indices, queries, sub_keys, wanted, kernels):
    return empty_gradients(queries, sub_keys, wanted)


def _retrieval_backward(ctx, gradient, _):
    refuse_double_backward()
    queries, sub_keys, indices = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    found = product_key_retrieval_gradients(gradient, indices, queries, sub_keys, wanted, ctx.kernels)
    of_queries, of_sub_keys = (each if is_wanted else None for each, is_wanted in zip(found, wanted, strict=True))
    return of_queries, of_sub_keys, None, None


product_key_retrieval.register_autograd(_retrieval_backward, setup_context=_save_for_backward)
