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
"""Exact product-key retrieval: the k best of N experts from scores of 2 √N sub-keys (paper, section 2.1)."""

import math
from collections.abc import Sequence

import torch

from .expert_kernels import ALL_EXPERT_KERNELS, NAMESPACE, are_operators_observed, refuse_double_backward
from .key_grid import expert_cell, expert_index, winning_pairs
from .product_key_retrieval_cpu import check_num_retrieved, empty_gradients


# Scores of single experts that `retrieve_unmasked` holds at a time.
MASKED_SCORES = 2**22


def product_key_topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Retrieve the k best experts of every query, exactly.

    Args:
        scores (`torch.Tensor` of shape `(..., 2, √N)`):
            Scores of the two halves of a query with the two sets of sub-keys; an expert's score is the sum of two.
        k (`int`):
            Number of experts to retrieve, at most √N.

    Returns:
        `tuple(torch.Tensor)`: expert indices (int64) and scores, both of shape `(..., k)`, best first.
    """
    half_scores, half_ranks = scores.topk(k, dim=-1)
    row_rank, column_rank = winning_pairs(k, scores.device)
    pair_scores = half_scores[..., 0, :][..., row_rank] + half_scores[..., 1, :][..., column_rank]
    top_scores, pairs = pair_scores.topk(k, dim=-1)
    rows = half_ranks[..., 0, :].gather(-1, row_rank[pairs])
    columns = half_ranks[..., 1, :].gather(-1, column_rank[pairs])
    return expert_index(rows, columns), top_scores


def retrieve(queries: torch.Tensor, sub_keys: torch.Tensor, k: int, kernels: str) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Retrieve the k best experts of every query, exactly.

    Args:
        queries (`torch.Tensor` of shape `(num_tokens, num_heads, 2, d_k / 2)`):
            The two halves of every query.
        sub_keys (`torch.Tensor` of shape `(num_heads or 1, 2, √N, d_k / 2)`):
            The two sets of sub-keys, for each head or for all.
        k (`int`):
            Number of experts to retrieve, at most √N.
        kernels (`str`):
            Implementation, see [`resolve_kernels`]. Its own `retrieve` and `retrieval_gradients` run where it has them
            and the queries are float32; otherwise a matrix product, and [`product_key_topk`] on its result.

    Returns:
        `tuple(torch.Tensor)`: expert indices (int64) and scores, both of shape `(num_tokens, num_heads, k)`, best
        first.

    Raises:
        `ValueError`: if k is no integer, or not between 1 and √N.
    """
    check_num_retrieved(k, sub_keys.shape[2])
    if queries.dtype == torch.float32 and hasattr(ALL_EXPERT_KERNELS[kernels], "retrieve"):
        if are_operators_observed(queries, sub_keys):
            scores, indices = product_key_retrieval(queries, sub_keys, k, kernels)
        elif torch.is_grad_enabled():
            scores, indices = _PlainRetrieval.apply(queries, sub_keys, k, kernels)
        else:
            indices, scores = ALL_EXPERT_KERNELS[kernels].retrieve(queries, sub_keys, k)
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
        experts (`torch.Tensor` of shape `(num_experts,)`): bool, True where an expert takes part.

    Attributes:
        num_experts (`int`): Number of experts that take part.
        grid_size (`int`, *optional*): Side of the smaller key grid that has just these experts; `None` if there is
            none.
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
    [`retrieve`] among the experts of a mask.

    If they are the experts of a smaller key grid, this is the retrieval of that grid, bit for bit. Any other mask cuts
    through rows and columns, and costs a score for every expert.

    Raises:
        `ValueError`: if fewer than k experts take part.
    """
    if k > expert_mask.num_experts:
        raise ValueError(
            f"`num_experts_per_head` must be at most the number of experts that are not masked, "
            f"{expert_mask.num_experts}, got {k}."
        )
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
    [`retrieve`] by an implementation's own function, with a backward that reads selected sub-keys only. Returns scores
    and expert indices.
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
    Gradients of the queries and sub-keys of [`product_key_retrieval`], given that of its scores; without elements
    where one is not wanted.
    """
    return ALL_EXPERT_KERNELS[kernels].retrieval_gradients(gradient, indices, queries, sub_keys, wanted)


@product_key_retrieval_gradients.register_fake
def _(gradient, indices, queries, sub_keys, wanted, kernels):
    return empty_gradients(queries, sub_keys, wanted)


def _retrieval_backward(ctx, gradient, _):
    refuse_double_backward()
    queries, sub_keys, indices = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    arguments = (gradient, indices, queries, sub_keys, wanted)
    if are_operators_observed(gradient, sub_keys):
        found = product_key_retrieval_gradients(*arguments, ctx.kernels)
    else:
        found = ALL_EXPERT_KERNELS[ctx.kernels].retrieval_gradients(*arguments)
    of_queries, of_sub_keys = (each if is_wanted else None for each, is_wanted in zip(found, wanted, strict=True))
    return of_queries, of_sub_keys, None, None


product_key_retrieval.register_autograd(_retrieval_backward, setup_context=_save_for_backward)


class _PlainRetrieval(torch.autograd.Function):
    """[`product_key_retrieval`] where only autograd observes it: not through the dispatcher, which takes 0.1 ms."""

    @staticmethod
    def forward(ctx, queries, sub_keys, k, kernels):
        indices, scores = ALL_EXPERT_KERNELS[kernels].retrieve(queries, sub_keys, k)
        _save_for_backward(ctx, (queries, sub_keys, k, kernels), (scores, indices))
        ctx.set_materialize_grads(False)  # there is none of the indices
        return scores, indices

    backward = staticmethod(_retrieval_backward)
