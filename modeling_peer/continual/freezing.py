# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Freezing experts of a model: by layer, by expert index, or by what a corpus uses."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..analysis.expert_background import ExpertBackground
from ..analysis.expert_sets import expert_indices, mask_of_indices, select_expert_sets
from ..arguments.check_types import check_types
from ..optim.frozen_rows import FrozenRows, freeze_rows


@dataclass(eq=False)
class FrozenExperts:
    """
    Handle of a freeze by [`freeze_experts`]. The experts stay frozen even if the handle is dropped.

    Args:
        num_frozen (`dict[str, int]`):
            Number of frozen experts of each set, under the path of the module that holds their tables. For
            [`train_added_experts_only`] it is under `"layer_0"` and so on.
        handles (`list[FrozenRows]`): The handles of the frozen rows of each parameter.
    """

    num_frozen: dict[str, int]
    handles: list[FrozenRows]

    def remove(self) -> None:
        """Let the experts be trained again, except those that another freeze holds. A second call does nothing."""
        for handle in self.handles:
            handle.remove()


@check_types
def freeze_experts(
    model: nn.Module,
    experts: Iterable[int | bool] | torch.Tensor | int | None = None,
    *,
    layers: Iterable[int] | int | None = None,
    used_in: ExpertBackground | None = None,
    min_documents: int = 1,
) -> FrozenExperts:
    """
    Freeze experts: their up- and down-projection and gate vectors keep their values to the bit, with any optimizer of
    torch (see [`freeze_rows`]). The rest of the model, including the sub-keys by which experts are retrieved, is
    trained as before. An expert is frozen if it fulfills all conditions given; without any condition, all experts are.

    With DistributedDataParallel and memory groups, every process has to freeze the same experts, after a memory group
    has split the tables. Freezes are not saved and not copied: call `freeze_experts` again before resuming from a
    checkpoint, or for a copy of the model. A table that is frozen as a whole requires no gradient, so freeze before an
    optimizer or DistributedDataParallel gets the model.

    Args:
        model (`nn.Module`): Any module with PEER or PKM layers: a [`PeerForCausalLM`], or a model they are grafted
            onto.
        experts (`int`, iterable of `int`, or `torch.Tensor`, *optional*):
            Expert indices, or a bool mask of shape `(num_experts,)`. Added experts follow the first ones. `None`, the
            default, sets no condition: all experts of the layers, or all that `used_in` used.
        layers (`int` or iterable of `int`, *optional*):
            Indices of the layers, all layers if `None`. Of layers that share a pool, name all or none.
        used_in ([`ExpertBackground`], *optional*): Counts of a corpus; the experts that it used are frozen.
        min_documents (`int`, *optional*, defaults to 1): Minimum number of documents of `used_in` that used an
            expert.

    Returns:
        [`FrozenExperts`]: how many experts are frozen, and `remove()` to undo it.

    Raises:
        `ValueError`: for layers or experts that the model does not have, `min_documents` below 1, a background of
            other experts, or tables that are quantized, or that FSDP2 or tensor parallelism splits over processes.

    ```python
    >>> from modeling_peer import ExpertBackground, freeze_experts

    >>> frozen = freeze_experts(model, range(1000), layers=[1])  # by expert index
    >>> frozen.remove()
    >>> background = ExpertBackground.measure(model, dataset)
    >>> freeze_experts(model, used_in=background, min_documents=10)  # by usage
    >>> Trainer(model, args, train_dataset=dataset).train()
    ```
    """
    if min_documents < 1:
        raise ValueError(f"`min_documents` must be at least 1, got {min_documents}.")
    indices = expert_indices(experts)
    if used_in is not None:
        used_in.check(model)
    frozen = FrozenExperts({}, [])
    try:
        for name, each in select_expert_sets(model, layers).items():
            mask = torch.ones(each.num_experts).bool() if indices is None else mask_of_indices(each, indices)
            if used_in is not None:
                mask = mask & used_in.used(name, min_documents)
            frozen.num_frozen[name] = int(mask.sum())
            table: Any
            for first, table in (pair for tables in each.tables.values() for pair in tables):
                rows = mask[first : first + table.num_embeddings]
                if rows.any():
                    frozen.handles.append(freeze_rows(table, "weight", rows))
    except BaseException:
        frozen.remove()
        raise
    return frozen
