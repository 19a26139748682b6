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
"""Adding experts to a trained model."""

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import initialization as init

from ..analysis.evaluation import evaluation
from ..analysis.expert_sets import layer_indices
from ..configuration_peer import PeerConfig
from ..expert_additions import check_additions
from ..expert_generations import generations_of
from ..expert_table import ExpertTable, refuse_quantized
from ..feed_forward_peer import ExpertPool, PeerFeedForward
from ..key_grid import grid_size
from ..modeling_peer import PeerPreTrainedModel
from ..optim.frozen_rows import FrozenRows, freeze_rows, freezes_of, require_gradients
from ..product_key_router import AddedRouter
from .freezing import FrozenExperts


if dist.is_available():
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Addition:
    """
    Result of [`add_experts`].

    Args:
        experts (`dict[int, range]`): Expert indices of the new experts, by layer.
        deviation (`float`):
            The largest absolute difference that the growth made to an element of the model's outputs, before any
            training.
    """

    experts: dict[int, range]
    deviation: float


def add_experts(
    model: PeerPreTrainedModel,
    num_experts: int,
    *,
    layers: Iterable[int] | int | None = None,
    mode: str = "protected",
    num_retrieval_heads: int | None = None,
    num_experts_per_head: int | None = None,
    inputs: torch.Tensor | None = None,
) -> Addition:
    """
    Add experts to a trained model and to its configuration, and leave only them to be trained (see
    [`train_added_experts_only`]). Old experts keep their indices and vectors; new ones are silent at first, v_i = 0.
    Make optimizers after it.

    `mode="protected"`: the new experts are a generation with a router, a softmax and a gate of their own (see
    [`AddedRouter`]), whose query network starts as a copy of the layer's. Outputs stay what they were. Whatever the
    new experts are trained on, a model that masks them ([`masked_experts`]) computes what it did before, to the bit.
    The cost per token is that of `num_retrieval_heads · num_experts_per_head` experts and of their retrieval.

    `mode="open"`: the key grid gets larger, and new keys compete with the old ones for the same k places of a head.
    The only cost per token is that of scoring them. New experts that win a place take weight from the old ones at
    once. Train with [`RowAdamW`]: other optimizers keep state for old rows too.

    Args:
        model ([`PeerPreTrainedModel`]): A model with PEER layers.
        num_experts (`int`):
            Number of experts to add to each layer, or to the pool that layers share: in protected mode a perfect
            square, in open mode such that the sum with the experts there are is one.
        layers (`int` or iterable of `int`, *optional*): Indices of the layers to grow, all PEER layers if `None`.
        mode (`str`, *optional*, defaults to `"protected"`): `"protected"` or `"open"`.
        num_retrieval_heads (`int`, *optional*):
            Number of heads that retrieve protected new experts, at most that of the configuration, which is the
            default.
        num_experts_per_head (`int`, *optional*):
            Number of protected new experts that a head retrieves; that of the configuration if not given.
        inputs (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            Tokens to measure the deviation on, random ones if not given.

    Returns:
        [`Addition`]: the indices of the new experts, and how much the outputs changed.

    Raises:
        `ValueError`: for a model that is no PEER model, has no PEER layer, is quantized or is split over processes, or
            for arguments of another type or out of range. The model is left as it was.

    ```python
    >>> from modeling_peer import add_experts, fit_gates, masked_experts

    >>> add_experts(model, 64**2)
    >>> fit_gates(model, new_text, reference_text)  # so that new experts are used for the new text only
    >>> Trainer(model, args, train_dataset=new_text).train()
    >>> with masked_experts(model):
    ...     model.generate(**inputs)  # what the model generated before it grew
    ```
    """
    check_is_peer_model(model)
    refuse_split_model(model, "Experts are added")
    refuse_quantized(model, "`add_experts`")
    grown = _peer_layers(model, layers)
    _check_inputs(model, inputs)
    if any(
        router.expert_mask is not None for layer in grown.values() for router in [layer.router, *layer.added_routers]
    ):
        raise ValueError("Experts cannot be added while some are masked: leave `masked_experts` first.")
    old_config, config = model.config, copy.deepcopy(model.config)
    addition = {"layers": sorted(grown), "mode": mode, "num_experts": num_experts}
    budget = {"num_retrieval_heads": num_retrieval_heads, "num_experts_per_head": num_experts_per_head}
    if mode == "protected":
        for name, value in budget.items():
            addition[name] = getattr(config, name) if value is None else value
    elif any(value is not None for value in budget.values()):
        raise ValueError(
            "`num_retrieval_heads` and `num_experts_per_head` are for protected experts, as open ones share those of "
            f"the layer: expected `None` for both in open mode, got {budget}."
        )
    config.expert_additions = [*(config.expert_additions or []), addition]
    _check(config, addition)
    before = _outputs(model, inputs)
    experts = {index: _new_indices(old_config, layer, index, num_experts) for index, layer in grown.items()}
    (_grow_protected if mode == "protected" else _grow_open)(model, grown, config)
    module: Any
    for module in model.modules():
        if getattr(module, "config", None) is old_config:
            module.config = config
    train_added_experts_only(model)
    return Addition(experts, (_outputs(model, inputs) - before).abs().max().item())


def train_added_experts_only(model: PeerPreTrainedModel) -> FrozenExperts:
    """
    Freeze a grown model except for the experts of its last addition, their keys and, if the addition is protected,
    their query network. Gates of added experts are left to [`fit_gates`]. [`add_experts`] calls it. What is trained is
    not saved or copied with a model: call it again after loading or copying one, before an optimizer gets the
    parameters.

    In layers with an open addition, the old rows of tables and keys are frozen by [`freeze_rows`]: [`RowAdamW`] holds
    them at no cost, other optimizers at that of a copy in each step.

    A model that a memory group splits is frozen after it is split. An open addition needs whole keys for that: not
    FSDP2 for the rest of the model, but DistributedDataParallel, see [`shard_experts`].

    Returns:
        [`FrozenExperts`]: how many old experts share a table with new ones, and `remove()` to let their rows be
            trained.

    Raises:
        `ValueError`: if no experts were added, or if the last addition is an open one and the keys are split.
    """
    check_is_peer_model(model)
    refuse_quantized(model, "`train_added_experts_only`")
    if not model.config.expert_additions:
        raise ValueError("No experts were added to this model: `expert_additions` of its configuration is empty.")
    addition = model.config.expert_additions[-1]
    layers = _peer_layers(model, addition["layers"])
    if addition["mode"] == "open" and any(_is_split(layer.router.sub_keys) for layer in layers.values()):
        raise ValueError(
            'The last addition to this model is of `mode` "open", whose old keys cannot be frozen where FSDP2 splits '
            "them: load the model without `distributed_config` and split its tables alone, by `shard_experts`, for "
            "DistributedDataParallel."
        )
    for freeze in [freeze for module in model.modules() for freeze in freezes_of(module)]:
        if freeze.holder is train_added_experts_only:
            freeze.remove()
    require_gradients(model.parameters(), False)
    num_frozen: dict[str, int] = {}
    handles: list[FrozenRows] = []
    for index, layer in layers.items():
        pool = _pool(model, layer)
        if addition["mode"] == "protected":
            require_gradients([*layer.added_routers[-1].parameters(), *pool.added[-1].parameters()])
            require_gradients(layer.added_routers[-1].gate.parameters(), False)
        else:
            num_frozen[f"layer_{index}"] = layer.router.generation.num_experts - addition["num_experts"]
            handles += _freeze_old_rows(layer.router, pool, addition["num_experts"])
    return FrozenExperts(num_frozen, handles)


def check_is_peer_model(model: nn.Module) -> None:
    """Raise `ValueError` if experts cannot be added to a model."""
    if not isinstance(model, PeerPreTrainedModel):
        raise ValueError(
            f"Experts can be added to PEER models, got a {type(model).__name__}. If it has adapters, merge or unload "
            "them first; a model with grafts takes another graft."
        )
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("Experts can be added to a model without adapters: merge or unload those it has first.")


def refuse_split_model(model: nn.Module, what: str) -> None:
    """Raise `ValueError` if a model is split over processes, of which something, a sentence's start, comes before."""
    if any(map(_is_split, model.parameters())):
        raise ValueError(
            f"{what} before a model is split over processes, and this one is split. Load it in one process without "
            "`distributed_config`, do so there and save it; what loads it split then has all its experts."
        )


def _is_split(parameter):
    return dist.is_available() and isinstance(parameter, DTensor)


def _peer_layers(model, layers):
    """The PEER layers of a model by their index in it, all or those named."""
    indices = layer_indices(layers)
    found = {module.layer_idx: module for module in model.modules() if isinstance(module, PeerFeedForward)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no PEER layer that could get more experts.")
    if indices is None:
        return found
    if unknown := [layer for layer in indices if layer not in found]:
        raise ValueError(f"`layers` must be some of the PEER layers {sorted(found)}, got {unknown} among them.")
    return {layer: found[layer] for layer in indices}


def _check(config: PeerConfig, addition):
    """Raise `ValueError` if a model cannot get these experts."""
    check_additions(
        config.expert_additions, config.feed_forward_types, config.num_experts, config.share_experts_across_layers
    )
    if addition["mode"] == "protected" and addition["num_retrieval_heads"] > config.num_retrieval_heads:
        raise ValueError(
            f"`num_retrieval_heads` must be at most {config.num_retrieval_heads}, the number of heads of the layer, "
            f"as new experts start with a copy of its query network, got {addition['num_retrieval_heads']}."
        )


def _check_inputs(model, inputs):
    if inputs is None:
        return
    size = model.config.vocab_size
    is_tokens = isinstance(inputs, torch.Tensor) and inputs.ndim == 2 and inputs.dtype in (torch.int32, torch.int64)
    if not is_tokens or not inputs.numel() or inputs.min() < 0 or inputs.max() >= size:
        found = f"{inputs.dtype} of shape {tuple(inputs.shape)}" if isinstance(inputs, torch.Tensor) else repr(inputs)
        raise ValueError(
            f"`inputs` must be token ids, int32 or int64 from 0 to {size - 1}, of shape (batch_size, "
            f"sequence_length), got {found}"
            + (f", from {inputs.min()} to {inputs.max()}." if is_tokens and inputs.numel() else ".")
        )


def _new_indices(config: PeerConfig, layer, index, num_experts):
    """The expert indices that the new experts of a layer will have."""
    held = [layer.router, *layer.added_routers]
    if [router.generation for router in held] != generations_of(config, index):
        raise ValueError(
            f"`expert_additions` of the configuration is {config.expert_additions}, which is not how layer {index} "
            "grew: do models share a configuration? Give each its own."
        )
    first = held[-1].generation.experts.stop
    return range(first, first + num_experts)


def _pool(model, layer):
    return layer.expert_pool if layer.expert_pool is not None else model.base_model.expert_pool


def _tables(pool):
    """The expert tables of a pool's first generation."""
    return [module for module in pool.children() if isinstance(module, ExpertTable)]


def _outputs(model, inputs):
    """The model's outputs in evaluation, on random tokens if `inputs` is `None`."""
    if inputs is None:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randint(model.config.vocab_size, (4, 64), generator=generator)
    with evaluation(model):
        # Row by row: a classifier without a padding token takes one sequence at a time.
        return torch.cat([model(row, use_cache=False)[0].float() for row in inputs.to(model.device).split(1)])


def _grow_protected(model, grown, config: PeerConfig):
    """Make all new modules before putting them in place, so that the model stays as it was if one cannot be made."""
    new_pools, new_routers = {}, {}
    for index, layer in grown.items():
        pool, generation = _pool(model, layer), generations_of(config, index)[-1]
        if pool not in new_pools:
            new_pools[pool] = _initialized(
                model, pool.up_proj.weight, lambda each=generation: ExpertPool(config, [each])
            )
        router = _initialized(model, layer.router.sub_keys, lambda each=generation: AddedRouter(config, each))
        router.copy_query_network(layer.router)
        new_routers[layer] = router
    for pool, new_pool in new_pools.items():
        pool.added.append(new_pool)
    for layer, router in new_routers.items():
        layer.added_routers.append(router)


def _initialized(model, reference, make):
    """A new module with the device and dtype of a parameter of the model, initialized as in a new model."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(reference.dtype)
    try:
        with torch.device(reference.device):
            module = make()
    finally:
        torch.set_default_dtype(dtype)
    return module.apply(model._init_weights).train(model.training)


def _grow_open(model, grown, config: PeerConfig):
    """Table by table, so that at most one is in memory twice; all of them shrink again if one cannot grow."""
    undo = []
    try:
        for pool, generation in {
            _pool(model, each): generations_of(config, i)[0] for i, each in grown.items()
        }.items():
            for table in _tables(pool):
                undo.append(functools.partial(table.keep_rows, table.num_embeddings))
                table.append_rows(_new_rows(table, generation.num_experts, silent=table is pool.down_proj))
        for index, layer in grown.items():
            undo.append(functools.partial(layer.router.restore_keys, layer.router.sub_keys, layer.router.generation))
            layer.router.enlarge(generations_of(config, index)[0])
    except BaseException:
        for step in undo:
            step()
        raise


def _new_rows(table, num_experts, silent):
    rows = torch.zeros_like(table.weight[:1]).repeat(num_experts - table.num_embeddings, 1)
    return rows if silent else init.normal_(rows, std=table.init_std)


def _freeze_old_rows(router, pool, num_added):
    num_old = router.generation.num_experts - num_added
    parts = [(router, "sub_keys", 2, grid_size(num_old))]
    parts += [(table, "weight", 0, num_old) for table in _tables(pool)]
    handles = []
    for module, name, dim, size in parts:
        parameter = getattr(module, name)
        require_gradients([parameter])
        rows = torch.arange(parameter.shape[dim]) < size
        handles.append(freeze_rows(module, name, rows, dim, holder=train_added_experts_only))
    return handles


__all__ = ["Addition", "add_experts", "train_added_experts_only"]
