# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Adding experts to a trained model."""

import copy
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import initialization as init
from transformers.modeling_utils import local_torch_dtype

from ..analysis.expert_sets import layer_indices
from ..arguments.check_types import check_types
from ..configuration_peer import generations_of, grid_size
from ..experts import ExpertPool, expert_tables
from ..feed_forward import PeerFeedForward
from ..memory.advice import advise_huge_pages
from ..memory.host_tables import keep_in_host_memory
from ..modeling_peer import PeerPreTrainedModel
from ..ops.disk_tables import is_on_disk
from ..optim.frozen_rows import check_can_freeze, freeze_rows
from ..quantization.quantizer import replace_config
from ..router import AddedRouter
from .freezing import FrozenExperts


@check_types
def add_experts(
    model: PeerPreTrainedModel,
    num_experts: int,
    *,
    layers: Iterable[int] | int | None = None,
    mode: str = "protected",
    num_retrieval_heads: int | None = None,
    num_experts_per_head: int | None = None,
) -> dict[int, range]:
    """
    Add experts to a trained model and to its configuration, and leave only them to be trained (see
    [`train_added_experts_only`]). Old experts keep their indices and vectors; new ones are silent at first, v_i = 0.
    Create optimizers after this call.

    `mode="protected"`: the new experts are a generation with a router, a softmax and a gate of their own (see
    [`AddedRouter`]). The router's query network starts as a copy of the layer's. Outputs do not change. Whatever the
    new experts are trained on, a model that masks them ([`masked_experts`]) computes what it did before, to the bit.
    The cost per token is that of `num_retrieval_heads · num_experts_per_head` experts and of their retrieval.

    `mode="open"`: the key grid gets larger, and new keys compete with the old ones for the same k places of a head.
    The only cost per token is that of scoring them. New experts that win a place take weight from the old ones at
    once. Train with [`RowAdamW`]: other optimizers keep state for old rows too.

    Args:
        model ([`PeerPreTrainedModel`]): A model with PEER layers and without masked experts.
        num_experts (`int`):
            Number of experts to add to each layer, or to the pool that layers share. In protected mode it is a perfect
            square; in open mode, its sum with the number of present experts is one.
        layers (`int` or iterable of `int`, *optional*): Indices of the layers to grow, all PEER layers if `None`.
        mode (`str`, *optional*, defaults to `"protected"`): `"protected"` or `"open"`.
        num_retrieval_heads, num_experts_per_head (`int`, *optional*):
            Number of heads that retrieve protected new experts, at most that of the configuration, and number of
            experts that each head retrieves. Default to the values of the configuration.

    Returns:
        `dict[int, range]`: the indices of the new experts, by layer.

    Raises:
        `ValueError`: for a model that is no PEER model, has adapters or no PEER layer, is quantized or split over
            processes, or for arguments out of range. The model is then left as it was.

    ```python
    >>> from modeling_peer import add_experts, fit_gates, masked_experts

    >>> add_experts(model, 64**2)
    >>> fit_gates(model, new_text, reference_text)  # so that new experts are used for the new text only
    >>> Trainer(model, args, train_dataset=new_text).train()
    >>> with masked_experts(model):
    ...     model.generate(**inputs)  # what the model generated before it grew
    ```
    """
    if not isinstance(model, PeerPreTrainedModel) or any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(f"Experts can be added to PEER models without adapters, got a {type(model).__name__}.")
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("Experts are added before a model is split over processes: do so in one, and save the model.")
    tables: list[Any] = [*expert_tables(model).values()]
    if not all(table.weight.is_floating_point() for table in tables):
        raise ValueError(
            "`model` has quantized experts: add experts before they are quantized, or call `dequantize_experts`."
        )
    if mode == "open" and any(map(is_on_disk, tables)):
        raise ValueError("Tables that are kept on a disk do not grow: add experts in protected mode.")
    if num_experts < 1:
        raise ValueError(f"`num_experts` must be at least 1, got {num_experts}.")
    grown = _peer_layers(model, layers)
    config = copy.deepcopy(model.config)
    addition: dict[str, Any] = {"layers": sorted(grown), "mode": mode, "num_experts": num_experts}
    budget = {"num_retrieval_heads": num_retrieval_heads, "num_experts_per_head": num_experts_per_head}
    if mode == "protected":
        addition |= {name: getattr(config, name) if value is None else value for name, value in budget.items()}
        heads, per_head = (addition[name] for name in budget)
        if not 0 < heads <= config.num_retrieval_heads or per_head < 1:
            raise ValueError(
                f"`num_retrieval_heads` must be from 1 to {config.num_retrieval_heads}, as new experts copy the "
                f"layer's query network, and `num_experts_per_head` at least 1, got {budget}."
            )
    elif any(value is not None for value in budget.values()):
        raise ValueError(f"Open experts share the heads of the layer and their number of experts, got {budget}.")
    config.expert_additions = [*(config.expert_additions or []), addition]
    config.validate_expert_additions()
    (_grow_protected if mode == "protected" else _grow_open)(model, grown, config)
    replace_config(model, config)
    train_added_experts_only(model)
    last = [generations_of(config, index)[-1] for index in grown]
    stops = [generation.first_expert + generation.num_experts for generation in last]
    return {index: range(stop - num_experts, stop) for index, stop in zip(grown, stops, strict=True)}


# The last freeze of old rows of each base model.
_FREEZES: weakref.WeakKeyDictionary[nn.Module, FrozenExperts] = weakref.WeakKeyDictionary()


@check_types
def train_added_experts_only(model: PeerPreTrainedModel) -> FrozenExperts:
    """
    Freeze a grown model except for the experts of its last addition, their keys and, if the addition is protected,
    their query network. Gates of added experts are left to [`fit_gates`]. [`add_experts`] calls it. Call it again
    after loading or copying a model, before an optimizer gets the parameters. First remove any freeze of whole tables
    by [`freeze_experts`].

    In layers with an open addition, the old rows of tables and keys are frozen by [`freeze_rows`]. [`RowAdamW`]
    keeps them at no cost, other optimizers at the cost of a copy in each step.

    If a memory group splits the model, call this after the split. An open addition then needs keys that are not split:
    use DistributedDataParallel for the rest of the model and not FSDP2, see [`shard_experts`].

    Returns:
        [`FrozenExperts`]: how many old experts share a table with new ones, and `remove()` to let their rows be
            trained.

    Raises:
        `ValueError`: if no experts were added, or they are quantized, or the keys of an open addition are split.
    """
    if not model.config.expert_additions:
        raise ValueError("No experts were added to this model: `expert_additions` of its configuration is empty.")
    tables: list[Any] = [*expert_tables(model).values()]
    if not all(table.weight.is_floating_point() for table in tables):
        raise ValueError("Quantized experts are not trained: `dequantize_experts` makes them trainable again.")
    addition = model.config.expert_additions[-1]
    layers = _peer_layers(model, addition["layers"])
    for layer in layers.values() if addition["mode"] == "open" else ():
        check_can_freeze(layer.router.sub_keys)
    _FREEZES.pop(model.base_model, FrozenExperts({}, [])).remove()
    model.requires_grad_(False)
    frozen = FrozenExperts({}, [])
    # The dimension of the rows of each parameter, and how many of them are old. Layers may share tables.
    parts: dict[tuple[nn.Module, str], tuple[int, int]] = {}
    for index, layer in layers.items():
        pool = _pool(model, layer)
        if addition["mode"] == "protected":
            pool.added[-1].requires_grad_(True)
            layer.added_routers[-1].requires_grad_(True)
            layer.added_routers[-1].gate.requires_grad_(False)
            continue
        num_old = layer.router.generation.num_experts - addition["num_experts"]
        frozen.num_frozen[f"layer_{index}"] = num_old
        parts[layer.router, "sub_keys"] = 2, grid_size(num_old)
        parts |= {(table, "weight"): (0, num_old) for table in _tables(pool)}
    for (module, name), (dim, size) in parts.items():
        parameter = getattr(module, name).requires_grad_(True)
        frozen.handles.append(freeze_rows(module, name, torch.arange(parameter.shape[dim]) < size, dim))
    _FREEZES[model.base_model] = frozen
    return frozen


def _peer_layers(model, layers):
    """The PEER layers of a model by their index in it, all or those named."""
    found = {module.layer_idx: module for module in model.modules() if isinstance(module, PeerFeedForward)}
    indices = [*found] if layers is None else layer_indices(layers)
    if not indices or not set(indices) <= found.keys():
        raise ValueError(f"`layers` must be some of the PEER layers of the model, {sorted(found)}, got {layers}.")
    return {layer: found[layer] for layer in indices}


def _pool(model, layer):
    return layer.expert_pool if layer.expert_pool is not None else model.base_model.expert_pool


def _tables(pool):
    """The expert tables of a pool's first generation."""
    return [table for name in pool.expert_table_names if (table := getattr(pool, name)) is not None]


def _grow_protected(model, grown, config):
    """Make all new modules before putting them in place, so that the model stays as it was if one cannot be made."""
    added: dict[nn.ModuleList, nn.Module] = {}
    for index, layer in grown.items():
        pool, generation = _pool(model, layer), generations_of(config, index)[-1]
        if pool.added not in added:
            added[pool.added] = _initialized(model, pool.up_proj.weight, ExpertPool, config, [generation])
        router = _initialized(model, layer.router.sub_keys, AddedRouter, config, generation)
        _copy_query_network(router, layer.router)
        for hook in layer.router._forward_hooks.values():  # by which Transformers returns router outputs
            if getattr(hook, "__name__", None) == "output_capturing_hook":
                router.register_forward_hook(hook)
        added[layer.added_routers] = router
    for modules, module in added.items():
        modules.append(module)
    keep_in_host_memory(model)


def _initialized(model, reference, module_class, *arguments):
    """A new module with the device and dtype of a parameter of the model, initialized as in a new model."""
    # The default dtype does not apply to tensors that are created in float32, such as statistics.
    with torch.device(reference.device), local_torch_dtype(reference.dtype):
        module = module_class(*arguments)
    return module.apply(model._init_weights).train(model.training)


@torch.no_grad()
def _copy_query_network(added, router):
    """Initialize the queries with the first heads of another router, which were trained to distinguish tokens."""
    size = added.num_heads * added.query_size
    trained = router.state_dict()
    for name, tensor in added.state_dict(keep_vars=True).items():
        if name.startswith(("query_proj.", "query_norm.", "key_norm.")):
            tensor.copy_(trained[name][:size] if tensor.ndim else trained[name])


def _grow_open(model, grown, config):
    """Enlarge one table after the other, so that at most one is in memory twice."""
    pools = {_pool(model, layer): generations_of(config, index)[0].num_experts for index, layer in grown.items()}
    for pool, size in pools.items():
        for table in _tables(pool):
            weight = advise_huge_pages(table.weight.new_empty(size, table.embedding_dim))
            weight[: len(table.weight)] = table.weight.detach()
            new = weight[len(table.weight) :]
            init.zeros_(new) if table is pool.down_proj else init.normal_(new, std=table.init_std)
            table.weight = nn.Parameter(weight, requires_grad=table.weight.requires_grad)
            table.num_embeddings = size
    for index, layer in grown.items():
        layer.router.generation = generations_of(config, index)[0]
        layer.router.sub_keys = _more_sub_keys(layer.router.sub_keys, layer.router.generation)


@torch.no_grad()
def _more_sub_keys(old, generation):
    """Extend sub-keys for a larger generation by random ones with the same root mean square as the old ones."""
    sub_keys = old.new_empty(old.shape[0], 2, grid_size(generation.num_experts), old.shape[-1])
    init.normal_(sub_keys, std=old.square().mean().sqrt().item())
    sub_keys[:, :, : old.shape[2]] = old
    return nn.Parameter(sub_keys, requires_grad=old.requires_grad)
