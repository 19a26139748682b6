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
"""Switching experts off at inference: what a text does without some of them."""

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
    Takes experts out of the competition while it lasts: what a head would have retrieved of them goes to the best of the
    others. A generation that is masked as a whole is not run. A copy of the model made meanwhile stays masked.

    Where the experts added in protected mode are masked, a model computes what it did before they were added, to the bit;
    and so does one with an open addition, if its old experts, keys and queries were not trained since.

    Args:
        model (`nn.Module`): Any module with PEER or PKM layers: a [`PeerForCausalLM`], or a model they are grafted onto.
        experts (`int`, iterable of `int`, or `torch.Tensor`, *optional*):
            Numbers of the experts to mask, or a bool mask of shape `(num_experts,)`. All that were ever added if not given.
        layers (`int` or iterable of `int`, *optional*):
            Indices of the layers in which to mask them; of layers that share a pool all or none. All if not given.

    Raises:
        `ValueError`: for an expert or a layer that does not exist, where there are none to mask, or where a head would be left with less than its k.

    ```python
    >>> with masked_experts(model):
    ...     print(model(tokens, labels=tokens).loss)  # what the model knew before it grew
    ```
    """
    numbers = expert_indices(experts)
    sets = select_expert_sets(model, layers)
    if numbers is None and not any(_added(each).any() for each in sets.values()):
        raise ValueError("No experts were added, which `masked_experts` masks if `experts` does not name any.")
    masks: dict[ProductKeyRouter, ExpertMask | None] = {}
    for each in sets.values():
        masked = _added(each) if numbers is None else mask_of_indices(each, numbers)
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
    """The experts that were added: bool, `(num_experts,)`."""
    return torch.arange(experts.num_experts) >= experts.routers[0].config.num_experts


def _mask_of_router(router, masked, experts):
    """Which experts of a router take part, `None` if all do."""
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
