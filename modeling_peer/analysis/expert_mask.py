# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Masking experts at inference: what a model computes without some of them."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..arguments.check_types import check_types
from ..experts import expert_cell
from .expert_sets import ExpertSet, expert_indices, mask_of_indices, select_expert_sets


# Maximum number of scores of single experts that a retrieval with a mask holds at a time.
MASKED_SCORES = 2**22


def retrieve_others(
    takes_part: torch.Tensor,
    retrieve: Callable,
    smaller_grid: int,
    num_masked: int,
    queries: torch.Tensor,
    sub_keys: torch.Tensor,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Retrieve exactly among the experts that take part. If they form a smaller key grid with a side of at least k, this
    is the retrieval in that grid, bit for bit. If at most k experts are masked, the best of the others are among the
    `k + num_masked` best of all. Any other mask cuts through rows and columns, and costs a score for every expert.
    `takes_part` is a bool for each expert, and `retrieve` retrieves among all. `smaller_grid` is the side of the key
    grid that has only the experts that take part, 0 if there is no such grid.
    """
    if smaller_grid >= k:
        return retrieve(queries, sub_keys[:, :, :smaller_grid].contiguous(), k)
    is_masked = ~takes_part.to(queries.device)
    # Not for more: kernels hold all pairs of `k + num_masked` ranks, and Triton compiles a kernel for each number.
    if num_masked <= k and k + num_masked <= sub_keys.shape[2]:
        indices, scores = retrieve(queries, sub_keys, k + num_masked)
        top = scores.masked_fill(is_masked[indices], -torch.inf).topk(k, dim=-1)
        return indices.gather(-1, top.indices), top.values
    row, column = expert_cell(torch.arange(len(is_masked), device=queries.device))
    indices, scores = [], []
    for piece in queries.split(max(1, MASKED_SCORES // (queries.shape[1] * len(is_masked)))):
        halves = torch.einsum("thpc,hpnc->thpn", piece, sub_keys.expand(queries.shape[1], -1, -1, -1))
        all_scores = halves[..., 0, :][..., row] + halves[..., 1, :][..., column]
        top = all_scores.masked_fill(is_masked, -torch.inf).topk(k, dim=-1)
        indices.append(top.indices)
        scores.append(top.values)
    return torch.cat(indices), torch.cat(scores)


def _masked_retrieval(router, masked):
    """Make a function that replaces the `retrieve` of a router and leaves out the masked experts of its set."""
    generation, retrieve = router.generation, router.retrieve
    takes_part = ~masked[generation.first_expert : generation.first_expert + generation.num_experts]
    if isinstance(retrieve, partial) and retrieve.func is retrieve_others:  # from an outer context
        takes_part, retrieve = takes_part & retrieve.args[0], retrieve.args[1]
    num_left, k = int(takes_part.sum()), router.num_experts_per_head
    if 0 < num_left < k:
        raise ValueError(
            f"`experts` leave {num_left} of {generation} to a router whose heads retrieve {k}: mask fewer, or all."
        )
    num_left = num_left or len(takes_part)  # if none is left, a hook makes the weights zero
    side, is_first = math.isqrt(num_left), takes_part[:num_left].all() or not takes_part.any()
    # No closure and no object of a class: a copy of the router gets its own, and `torch.compile` can trace it.
    smaller_grid = side if side * side == num_left and is_first else 0
    return partial(retrieve_others, takes_part, retrieve, smaller_grid, len(takes_part) - num_left)


@check_types
@contextmanager
def masked_experts(
    model: nn.Module,
    experts: Iterable[int | bool] | torch.Tensor | int | None = None,
    *,
    layers: Iterable[int] | int | None = None,
) -> Iterator[None]:
    """
    Exclude experts from retrieval within the context: heads retrieve the best of the other experts instead. If all
    experts of a generation are masked, their router weights are zero, so the experts have to be finite. A copy of the
    model that is made within the context stays masked. Other threads see the same mask.

    With the experts of protected additions masked, a model computes exactly what it did before they were added. With
    an open addition it does so too, if its old experts, keys and queries were not trained since.

    Args:
        model (`nn.Module`): Any module with PEER or PKM layers: a [`PeerForCausalLM`], or a model with grafts.
        experts (`int`, iterable of `int`, or `torch.Tensor`, *optional*):
            Indices of the experts to mask, or a bool mask of shape `(num_experts,)`. Defaults to all added experts.
        layers (`int` or iterable of `int`, *optional*):
            Indices of the layers in which to mask them, all or none of those that share a pool. Defaults to all.

    Raises:
        `ValueError`: for an expert or a layer of experts that does not exist, if there are no added experts and none
            are named, or if a head would be left with 1 to k - 1 experts.

    ```python
    >>> with masked_experts(model):
    ...     print(model(tokens, labels=tokens).loss)  # without the added experts
    ```
    """
    sets = select_expert_sets(model, layers).values()
    if experts is None and all(each.num_experts == each.routers[0].config.num_experts for each in sets):
        raise ValueError("`experts` must name the experts to mask, as the model has no added experts.")
    with masked_sets(sets, expert_indices(experts)):
        yield


@contextmanager
def masked_sets(sets: Iterable[ExpertSet], indices: torch.Tensor | None) -> Iterator[None]:
    """Mask experts as [`masked_experts`] does, in these sets, given the result of [`expert_indices`]."""
    masked: dict[Any, partial] = {}
    for each in sets:
        if indices is None:
            mask = torch.arange(each.num_experts) >= each.routers[0].config.num_experts
        else:
            mask = mask_of_indices(each, indices)
        masked |= {router: _masked_retrieval(router, mask) for router in each.routers}
    before = {router: vars(router).get("retrieve") for router in masked}
    hooks = []
    try:
        for router, retrieve in masked.items():
            if not retrieve.args[0].all():
                router.retrieve = retrieve
            if not retrieve.args[0].any():
                # Prepended, so that hooks that observe the router see the zeros.
                hooks.append(router.register_forward_hook(_zero_weights, prepend=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for router, outer in before.items():
            vars(router).pop("retrieve", None)
            if outer is not None:
                router.retrieve = outer


def _zero_weights(router, args, output):
    return output[0], torch.zeros_like(output[1])
