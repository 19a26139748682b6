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
"""Freezing experts of a model: by layer, by expert index, or by what a corpus uses."""

from collections.abc import Iterable

import torch
from torch import nn

from ..analysis.arguments import check_integer, shown
from ..analysis.expert_background import ExpertBackground
from ..analysis.expert_sets import ExpertSet, expert_indices, mask_of_indices, select_expert_sets
from ..expert_table import refuse_quantized
from ..optim.frozen_rows import FrozenRows, freeze_rows


class FrozenExperts:
    """
    Handle of what [`freeze_experts`] froze. The model keeps the freeze, also if the handle is dropped.

    Attributes:
        num_frozen (`dict[str, int]`):
            How many experts of each set are frozen, under the path of the module that holds their tables.
    """

    def __init__(self, num_frozen: dict[str, int], handles: list[FrozenRows]):
        self.num_frozen = num_frozen
        self._handles = handles

    def remove(self) -> None:
        """Let the experts be trained again, except those that another freeze holds. A second call does nothing."""
        for handle in self._handles:
            handle.remove()


def freeze_experts(
    model: nn.Module,
    experts: Iterable[int] | torch.Tensor | int | None = None,
    *,
    layers: Iterable[int] | int | None = None,
    used_in: ExpertBackground | None = None,
    min_documents: int = 1,
) -> FrozenExperts:
    """
    Freeze experts: their up- and down-projection vectors and gates keep their values to the bit, with any optimizer
    of torch (see [`freeze_rows`]). The rest of the model, including the sub-keys by which experts are retrieved, is
    trained as before. An expert is frozen if it fulfills all conditions given; without any condition, all experts are.

    It holds in `Trainer` with clipping (which does not count frozen rows), with gradient accumulation, dense or
    row-sparse gradients, and with DistributedDataParallel and memory groups, where each process has to freeze the same
    experts, after a group has split the tables. Freezes are not saved and not copied: call `freeze_experts` again
    before resuming from a checkpoint, or for a copy of the model. A table that is frozen as a whole requires no
    gradient, so freeze before an optimizer or DistributedDataParallel gets the model.

    Args:
        model (`nn.Module`): Any module with PEER or PKM layers: a [`PeerForCausalLM`], or a model they are grafted
            onto.
        experts (`int`, iterable of `int`, or `torch.Tensor`, *optional*):
            Expert indices, or a bool mask of shape `(num_experts,)`. Added experts follow the first ones. `None`, the
            default, sets no condition: all experts of the layers, or all that `used_in` used.
        layers (`int` or iterable of `int`, *optional*):
            Indices of the layers; of layers that share a pool all or none. All layers if `None`.
        used_in ([`ExpertBackground`], *optional*): Counts of a corpus; the experts that it used are frozen.
        min_documents (`int`, *optional*, defaults to 1): In how many documents of `used_in` an expert was used at
            least.

    Returns:
        [`FrozenExperts`]: how many experts are frozen, and `remove()` to undo it.

    Raises:
        `ValueError`: for arguments of another type, layers or experts that the model does not have, a background of
            other experts, or tables that FSDP2 or tensor parallelism splits over processes. The model is left as it
            was.

    ```python
    >>> from modeling_peer import ExpertBackground, freeze_experts

    >>> frozen = freeze_experts(model, range(1000), layers=[1])  # by expert index
    >>> frozen.remove()
    >>> background = ExpertBackground.measure(model, dataset)
    >>> freeze_experts(model, used_in=background, min_documents=10)  # by usage
    >>> Trainer(model, args, train_dataset=dataset).train()
    ```
    """
    _check_usage_options(model, used_in, min_documents)
    indices = expert_indices(experts)
    sets = select_expert_sets(model, layers)
    refuse_quantized(model, "`freeze_experts`")
    masks = {
        name: torch.ones(each.num_experts, dtype=torch.bool) if indices is None else mask_of_indices(each, indices)
        for name, each in sets.items()
    }
    if used_in is not None:
        masks = {name: mask & used_in.used(name, min_documents) for name, mask in masks.items()}
    return FrozenExperts({name: int(mask.sum()) for name, mask in masks.items()}, _freeze(sets, masks))


def check_background(name: str, background: ExpertBackground, model: nn.Module) -> None:
    """Raise `ValueError` if the argument of this name is no background measured on the experts of the model."""
    if not isinstance(background, ExpertBackground):
        raise ValueError(
            f"`{name}` must be an ExpertBackground, as `ExpertBackground.measure(model, dataset)` returns it, got "
            f"{shown(background)}."
        )
    background.check(model)


def _check_usage_options(model, used_in, min_documents):
    check_integer("min_documents", min_documents)
    if used_in is not None:
        check_background("used_in", used_in, model)
    elif min_documents != 1:
        raise ValueError(f"`min_documents` counts documents of `used_in`, which is not given, got {min_documents}.")


def _freeze(sets: dict[str, ExpertSet], masks: dict[str, torch.Tensor]) -> list[FrozenRows]:
    handles: list[FrozenRows] = []
    try:
        for name, each in sets.items():
            for first, table in (pair for tables in each.tables.values() for pair in tables):
                rows = masks[name][first : first + table.num_embeddings]
                if rows.any():
                    handles.append(freeze_rows(table, "weight", rows))
    except ValueError:
        for handle in handles:
            handle.remove()
        raise
    return handles


__all__ = ["FrozenExperts", "freeze_experts"]
