# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The sets of experts in a model or its grafts: their tables, their routers, and what the routers retrieve."""

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..experts import ExpertPool
from ..fact_graft import FactGraft
from ..feed_forward import PeerFeedForward, PkmFeedForward
from ..graft_layer import PREFIX, GraftedFeedForward, PeerGraft
from ..router import AddedRouter, ProductKeyRouter


@dataclass(frozen=True, eq=False)
class ExpertSet:
    """
    Experts with a common range of indices: those of a PEER layer, including added ones, those of a pool that layers
    share, or the values of a PKM layer.

    Args:
        layers (`tuple[int]`): Indices of the layers that retrieve from the set, see [`layer_index`].
        routers (`tuple[ProductKeyRouter]`): The routers of these layers.
        tables (`dict[str, list[tuple[int, nn.Module]]]`):
            The tables of up-projection vectors under `"up_proj"`, of gates under `"gate_proj"`, and of down-projection
            vectors, or values of PKM, under `"down_proj"`; each with the expert index of its first row. If an adapter
            wraps a table, this is the `nn.Embedding` inside.
        label (`str`):
            The name in logs: `"layer_1"`, `"layer_1_3"` for a pool that layers 1 and 3 share, `"layer_1_default"` for
            the graft of the adapter of this name, `"layer_1_graft_0"` for the first merged graft.
    """

    layers: tuple[int, ...]
    routers: tuple[ProductKeyRouter, ...]
    tables: dict[str, list[tuple[int, nn.Module]]]
    label: str

    @property
    def num_experts(self) -> int:
        return max(each.generation.first_expert + each.generation.num_experts for each in self.routers)


def module_label(modules: Mapping[str, nn.Module], name: str, layers: Iterable[int] = ()) -> str:
    """
    Return the name in logs of a router or another module: its layer, or the `layers` given, and its graft. A graft has
    the name of its adapter or, if merged, its place in the order of merging. `modules` are all modules of the model.
    """
    label = "_".join(["layer", *map(str, layers or [layer_index(name)])])
    if adapter := _adapter_of(name):
        return f"{label}_{adapter[1]}"
    parts, num_before = name.split("."), 0
    for place, part in enumerate(parts):
        grafted = modules[".".join(parts[:place])]
        if isinstance(grafted, GraftedFeedForward):
            if part == "grafts":
                return f"{label}_graft_{num_before + int(parts[place + 1])}"
            # A later graft is merged into the feed-forward beside the earlier ones.
            num_before += len(grafted.grafts)
    return label


def layer_index(name: str) -> int:
    """The layer in the name of a module: 3 for `"model.layers.3.mlp"` or `"transformer.h.3.mlp"`, 0 without one."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(number[1]) if number else 0


def _adapter_of(name: str) -> tuple[str, str] | None:
    """The name of the layer that has the graft of a module, and of the graft's adapter; `None` outside of grafts."""
    found = re.search(rf"(.*?)\.?\b{PREFIX}layer\.([^.]+)", name)
    return (found[1], found[2]) if found else None


def find_expert_sets(model: nn.Module) -> dict[str, ExpertSet]:
    """
    Find all sets of experts in a module, by name, in the order of the layers. Grafts of inactive adapters and
    grafts of facts (see [`find_fact_grafts`]) are skipped.

    Raises:
        `ValueError`: if there are none, or a layer shares a pool that is not part of the module.
    """
    modules = dict(model.named_modules())
    members: dict[str, list[str]] = {}
    for name, module in modules.items():
        has_experts = isinstance(module, (PeerFeedForward, PkmFeedForward)) and not isinstance(module, FactGraft)
        if has_experts and _is_active(modules, name):
            members.setdefault(_holder_name(modules, name), []).append(name)
    if not members:
        raise ValueError(f"{type(model).__name__} has no PEER or PKM layer, or none whose adapter is active.")
    sets = {}
    for holder, names in members.items():
        layers = tuple(sorted({layer_index(name) for name in names}))
        routers = [each for name in names for each in modules[name].modules() if isinstance(each, ProductKeyRouter)]
        label = module_label(modules, names[0], layers)
        sets[holder] = ExpertSet(layers, tuple(routers), _tables(modules[holder]), label)
    return sets


def find_fact_grafts(model: nn.Module) -> dict[str, FactGraft]:
    """Find the active grafts of facts in a model, by their labels, such as `"layer_29_default"` for an adapter."""
    modules = dict(model.named_modules())
    return {
        module_label(modules, name): module
        for name, module in modules.items()
        if isinstance(module, FactGraft) and _is_active(modules, name)
    }


def find_gated_grafts(model: nn.Module) -> dict[str, PeerGraft]:
    """Find the grafts with `has_gate` of active adapters, by their labels. Merged ones keep their gates."""
    modules = dict(model.named_modules())
    return {
        module_label(modules, name): module
        for name, module in modules.items()
        if isinstance(module, PeerGraft) and isinstance(module.router, AddedRouter)
        if _adapter_of(name) and _is_active(modules, name)
    }


def _is_active(modules, name):
    """Whether a layer takes part in the forward pass: all but grafts of inactive adapters."""
    found = _adapter_of(name)
    return not found or (found[1] in modules[found[0]].active_adapters and not modules[found[0]].disable_adapters)


def _holder_name(modules, name):
    """The name of the module that holds a layer's tables: its pool, that of a module around it, or a PKM layer."""
    if isinstance(modules[name], PkmFeedForward):
        return name
    path = name
    # Not by `getattr`, which wrappers of PEFT forward to what they wrap.
    while modules[path]._modules.get("expert_pool") is None:
        if not path:
            raise ValueError(f"{name} shares its experts with other layers: pass the model that has an `expert_pool`.")
        path = path.rpartition(".")[0]
    return f"{path}.expert_pool".removeprefix(".")


def _tables(holder):
    if isinstance(holder, PkmFeedForward):
        return {"down_proj": [(0, each) for each in _embeddings(holder.values)]}
    tables: dict[str, list[tuple[int, nn.Module]]] = {}
    for pool in (module for module in holder.modules() if isinstance(module, ExpertPool)):
        for role in (name for name in pool.expert_table_names if getattr(pool, name) is not None):
            tables.setdefault(role, []).extend((pool.first_expert, each) for each in _embeddings(getattr(pool, role)))
    return tables


def _embeddings(table):
    """The embeddings of a table that an adapter may wrap, or the table itself."""
    return [each for each in table.modules() if isinstance(each, nn.Embedding)] or [table]


def select_expert_sets(model: nn.Module, layers: Iterable[int] | int | None = None) -> dict[str, ExpertSet]:
    """
    Find the sets of experts of the layers with these indices, see [`find_expert_sets`]. Raises `ValueError` for layers
    without experts, or if only some of the layers that share a pool are named.
    """
    sets = find_expert_sets(model)
    if layers is None:
        return sets
    wanted = set(layer_indices(layers))
    known = {layer for each in sets.values() for layer in each.layers}
    if not wanted or not wanted <= known:
        raise ValueError(f"`layers` must be some of {sorted(known)}, the layers with experts, got {sorted(wanted)}.")
    selected = {name: each for name, each in sets.items() if wanted & set(each.layers)}
    if split := [each.layers for each in selected.values() if not set(each.layers) <= wanted]:
        raise ValueError(f"`layers` must name all or none of {split[0]}, which share one pool of experts.")
    return selected


def layer_indices(layers: Any) -> list[int]:
    """Convert layers to a list of Python integers. Raises `TypeError` for anything that is not an index."""
    return [operator.index(layer) for layer in ([layers] if isinstance(layers, Integral) else layers)]


def expert_indices(experts: Any) -> torch.Tensor | None:
    """Convert the `experts` argument of a user to a tensor of expert indices or a bool mask; `None` stays `None`."""
    if experts is None:
        return None
    if not isinstance(experts, (torch.Tensor, Integral)):
        experts = list(experts) or torch.tensor([], dtype=torch.long)
    return torch.as_tensor(experts, device="cpu")


def mask_of_indices(experts: ExpertSet, indices: torch.Tensor) -> torch.Tensor:
    """
    Convert what [`expert_indices`] returns to a mask of the experts of a set: bool, `(num_experts,)`. Raises
    `ValueError` for experts that the set does not have, a mask of another size, or values that are not indices.
    """
    size = experts.num_experts
    if indices.is_floating_point() or (indices.dtype == torch.bool and indices.shape != (size,)):
        raise ValueError(
            f"`experts` must be indices, or a bool mask of shape ({size},), got {indices.dtype} of shape "
            f"{tuple(indices.shape)}."
        )
    mask = torch.zeros(size, dtype=torch.bool)
    if indices.dtype != torch.bool and (outside := indices[(indices < 0) | (indices >= size)]).numel():
        raise ValueError(f"`experts` must be from 0 to {size - 1} in {experts.label}, got {outside.flatten()[0]}.")
    mask[indices if indices.dtype == torch.bool else indices.long()] = True
    return mask


def observe_routers(
    sets: dict[str, ExpertSet],
    on_output: Callable[[str, torch.Tensor, torch.Tensor], None],
) -> list[RemovableHandle]:
    """
    Call a function with the output of each router. Forward passes that activation checkpointing repeats are skipped.

    It gets the name of the set, the expert indices (int64) and their router weights, both of shape `(batch_size,
    sequence_length, num_heads, k)`. Weights are zero at padding, and for experts behind a closed gate.
    """
    return [
        observe_router(router, lambda _, *output, name=name: on_output(name, *output))
        for name, each in sets.items()
        for router in each.routers
    ]


def observe_router(router: ProductKeyRouter, on_output: Callable) -> RemovableHandle:
    """As [`observe_routers`], for one router: `on_output(router, indices, weights)`."""

    @torch.compiler.disable
    def observe(router, args, kwargs, output):
        _, padding_mask, forward_pass = [*args, None, None][:3]
        indices, weights = output
        padding_mask = kwargs.get("padding_mask", padding_mask)
        # Activation checkpointing runs a layer again when the forward pass is over.
        if getattr(kwargs.get("forward_pass", forward_pass), "has_ended", False):
            return
        if padding_mask is not None:  # selected rather than multiplied by zero: weights of padding may be NaN
            weights = torch.where(padding_mask.to(weights.device, torch.bool)[..., None, None], weights.detach(), 0.0)
        on_output(router, indices, weights)

    return router.register_forward_hook(observe, with_kwargs=True)
