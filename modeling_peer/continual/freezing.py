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
"""Freezing experts of a model, by layer, by number, by what a corpus used."""

from collections.abc import Iterable

import torch
from torch import nn

from ..analysis.expert_background import ExpertBackground
from ..analysis.expert_sets import ExpertSet, expert_indices, mask_of_indices, select_expert_sets
from ..optim.frozen_rows import FrozenRows, freeze_rows


class FrozenExperts:
    """
    What [`freeze_experts`] froze.

    Attributes:
        num_frozen (`dict[str, int]`): How many experts of each set, under the path of the module that holds their tables.
    """

    def __init__(self, num_frozen: dict[str, int], causes: list[FrozenRows]):
        self.num_frozen = num_frozen
        self._causes = causes

    def remove(self) -> None:
        """Lets them be trained again, unless another freeze holds them."""
        for cause in self._causes:
            cause.remove()


def freeze_experts(
    model: nn.Module,
    experts: Iterable[int] | torch.Tensor | int | None = None,
    *,
    layers: Iterable[int] | int | None = None,
    used_in: ExpertBackground | None = None,
    min_documents: int = 1,
) -> FrozenExperts:
    """
    Freezes experts: their rows of u, v and gates stay as they are to the bit, with any optimizer of torch, see
    [`freeze_rows`]. The rest of the model, the sub-keys by which experts are retrieved among it, is trained as before. If
    all conditions given hold for an expert it is frozen; without any, all are.

    It holds in `Trainer` with clipping, in which frozen rows do not count, with accumulation, dense or row-sparse gradients
    and DistributedDataParallel, where each process has to freeze the same. It is of this model object: a training that
    goes on from a checkpoint, or a copy, has to freeze anew. A table that is frozen as a whole requires no gradient, so
    freeze before an optimizer or DistributedDataParallel gets the model.

    Args:
        model (`nn.Module`): Any module with PEER or PKM layers: a [`PeerForCausalLM`], or a model they are grafted onto.
        experts (`int`, iterable of `int`, or `torch.Tensor`, *optional*):
            Numbers of experts, or a bool mask of shape `(num_experts,)`. Added experts follow those of before.
        layers (`int` or iterable of `int`, *optional*):
            Indices of the layers; of layers that share a pool all or none.
        used_in ([`ExpertBackground`], *optional*): Of a corpus whose experts are to be frozen.
        min_documents (`int`, *optional*, defaults to 1): In how many documents of `used_in` they were used at least.

    Returns:
        [`FrozenExperts`]: how many, and `remove()` to undo it.

    Raises:
        `ValueError`: for layers or experts that the model does not have, a background of other experts, or tables that are
            split over processes. The model is left as it was.

    ```python
    >>> from modeling_peer import ExpertBackground, freeze_experts

    >>> frozen = freeze_experts(model, range(1000), layers=[1])  # by number
    >>> frozen.remove()
    >>> background = ExpertBackground.measure(model, dataset)
    >>> freeze_experts(model, used_in=background, min_documents=10)  # by usage
    >>> Trainer(model, args, train_dataset=dataset).train()
    ```
    """
    _check_usage_options(model, used_in, min_documents)
    sets = select_expert_sets(model, layers)
    numbers = expert_indices(experts)
    masks = {
        name: torch.ones(each.num_experts, dtype=torch.bool) if numbers is None else mask_of_indices(each, numbers)
        for name, each in sets.items()
    }
    if used_in is not None:
        masks = {name: mask & used_in.used(name, min_documents) for name, mask in masks.items()}
    return FrozenExperts({name: int(mask.sum()) for name, mask in masks.items()}, _freeze(sets, masks))


def _check_usage_options(model, used_in, min_documents):
    if not isinstance(min_documents, int) or min_documents < 1:
        raise ValueError(f"`min_documents` must be a whole number, at least 1, got {min_documents!r}.")
    if used_in is not None:
        if not isinstance(used_in, ExpertBackground):
            raise ValueError(f"`used_in` must be an ExpertBackground, got a {type(used_in).__name__}.")
        used_in.check(model)
    elif min_documents != 1:
        raise ValueError(f"`min_documents` is of the documents of `used_in`, got {min_documents} without it.")


def _freeze(sets: dict[str, ExpertSet], masks: dict[str, torch.Tensor]) -> list[FrozenRows]:
    causes: list[FrozenRows] = []
    try:
        for name, each in sets.items():
            for first, table in (pair for tables in each.tables.values() for pair in tables):
                rows = masks[name][first : first + table.num_embeddings]
                if rows.any():
                    causes.append(freeze_rows(table.weight, rows, owner=table))
    except ValueError:
        for cause in causes:
            cause.remove()
        raise
    return causes


__all__ = ["FrozenExperts", "freeze_experts"]
