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
"""Masking experts at inference: what a model computes without some of them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..product_key_retrieval import ExpertMask
from ..product_key_router import ProductKeyRouter
from .expert_sets import ExpertSet, expert_indices, mask_of_indices, select_expert_sets


@contextmanager
def masked_experts(
    model: nn.Module,
    experts: Iterable[int] | torch.Tensor | int | None = None,
    *,
    layers: Iterable[int] | int | None = None,
) -> Iterator[None]:
    """
    Exclude experts from retrieval within the context: heads retrieve the best of the other experts instead. A
    generation that is masked completely is not run. A copy of the model that is made within the context stays masked.

    With the experts of protected additions masked, a model computes exactly what it did before they were added. So
    does a model with an open addition, if its first experts, keys and queries were not trained since.

    Args:
        model (`nn.Module`): Any module with PEER or PKM layers: a [`PeerForCausalLM`], or a model with grafts.
        experts (`int`, iterable of `int`, or `torch.Tensor`, *optional*):
            Indices of the experts to mask, or a bool mask of shape `(num_experts,)`. Defaults to all added experts.
        layers (`int` or iterable of `int`, *optional*):
            Indices of the layers in which to mask them, all or none of those that share a pool. Defaults to all.

    Raises:
        `ValueError`: for an expert or a layer that does not exist, if there are no experts to mask, or if a head would
            be left with less than its k experts.

    ```python
    >>> with masked_experts(model):
    ...     print(model(tokens, labels=tokens).loss)  # without the added experts
    ```
    """
    indices = expert_indices(experts)
    sets = select_expert_sets(model, layers)
    if indices is None and not any(_added(each).any() for each in sets.values()):
        raise ValueError(
            "No experts were added, which `masked_experts` masks if `experts` is None: pass the indices of others."
        )
    with masked_sets(sets.values(), indices):
        yield


@contextmanager
def masked_sets(sets: Iterable[ExpertSet], indices: torch.Tensor | None) -> Iterator[None]:
    """
    Exclude experts of some sets from retrieval within the context, and of no others of the same layers, see
    [`masked_experts`].

    Args:
        sets (iterable of [`ExpertSet`])
        indices (`torch.Tensor`, *optional*): As [`expert_indices`] returns them. All added experts if `None`.

    Raises:
        `ValueError`: for an expert that does not exist, or if a head would be left with less than its k experts.
    """
    masks: dict[ProductKeyRouter, ExpertMask | None] = {}
    for each in sets:
        masked = _added(each) if indices is None else mask_of_indices(each, indices)
        masks |= {router: _mask_of_router(router, masked, each) for router in each.routers}
    before = {router: router.expert_mask for router in masks}
    try:
        for router, mask in masks.items():
            router.expert_mask = mask
        yield
    finally:
        for router, mask in before.items():
            router.expert_mask = mask


def _added(experts: ExpertSet) -> torch.Tensor:
    """Which experts were added: bool, `(num_experts,)`."""
    return torch.arange(experts.num_experts) >= experts.routers[0].config.num_experts


def _mask_of_router(router, masked, experts):
    """Which experts of a router take part in retrieval; `None` if all do."""
    generation = router.generation
    takes_part = ~masked[generation.first_expert : generation.experts.stop]
    if router.expert_mask is not None:
        takes_part &= router.expert_mask.experts
    mask = ExpertMask(takes_part)
    if 0 < mask.num_experts < router.num_experts_per_head:
        raise ValueError(
            f"`experts` leave {mask.num_experts} of {experts.name} to a router whose heads retrieve "
            f"{router.num_experts_per_head}: mask fewer, or all of its {generation.num_experts}."
        )
    return None if mask.num_experts == generation.num_experts else mask


__all__ = ["masked_experts"]
