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
"""The sets of experts in a model or its grafts: their tables, their routers, and what these retrieve."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..expert_table import ExpertTable
from ..feed_forward_peer import ExpertPool, PeerFeedForward
from ..feed_forward_pkm import PkmFeedForward
from ..graft_layer import PREFIX, GraftedFeedForward
from ..library_releases import in_backward
from ..product_key_router import ProductKeyRouter
from .arguments import check_is_module, shown


TABLES = ("up_proj", "gate_proj", "down_proj")


@dataclass(frozen=True, eq=False)
class ExpertSet:
    """
    Experts with a common range of indices: those of a PEER layer, with added ones, those of all layers that share a
    pool, or the values of a PKM layer.

    Args:
        name (`str`): The name of the module that holds the tables.
        layers (`tuple[int]`): Indices of the layers that retrieve from the set, see [`layer_index`].
        routers (`tuple[ProductKeyRouter]`): The routers of these layers.
        tables (`dict[str, list[tuple[int, ExpertTable]]]`):
            The tables of up-projection vectors under `"up_proj"`, of gates under `"gate_proj"`, and of down-projection
            vectors, or values of PKM, under `"down_proj"`; each with the expert index of its first row.
        graft (`str`, *optional*): The name of the graft among those of its layer, see [`graft_label`].
    """

    name: str
    layers: tuple[int, ...]
    routers: tuple[ProductKeyRouter, ...]
    tables: dict[str, list[tuple[int, ExpertTable]]]
    graft: str | None = None

    @property
    def num_experts(self) -> int:
        return max(first + table.num_embeddings for first, table in self.tables["down_proj"])

    @property
    def label(self) -> str:
        """
        The name in logs: `"layer_1"`, `"layer_1_3"` for a pool that layers 1 and 3 share, `"layer_1_default"` for the
        graft of the adapter of this name, `"layer_1_graft_0"` for the first merged graft.
        """
        return _label(self.layers, self.graft)


def module_label(modules: Mapping[str, nn.Module], name: str) -> str:
    """
    The name in logs of a router or another module of one layer, as [`ExpertSet.label`] is that of a set. The arguments
    are those of [`graft_label`].
    """
    return _label([layer_index(name)], graft_label(modules, name))


def _label(layers, graft):
    return "_".join(["layer", *map(str, layers), *([] if graft is None else [graft])])


def layer_index(name: str) -> int:
    """The layer in the name of a module: 3 for `"model.layers.3.mlp"` or `"transformer.h.3.mlp"`, 0 without one."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(number[1]) if number else 0


def find_expert_sets(model: nn.Module) -> dict[str, ExpertSet]:
    """
    Find all sets of experts in a module, by name, in the order of the layers. Grafts of inactive adapters are skipped.

    Raises:
        `ValueError`: if `model` is no module or has none, or a layer shares a pool that is not part of the module.
    """
    check_is_module(model)
    members: dict[str, tuple[nn.Module, list[str]]] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, (PeerFeedForward, PkmFeedForward)) and _is_active(modules, name):
            holder_name, holder = _holder(modules, name, module)
            members.setdefault(holder_name, (holder, []))[1].append(name)
    if not members:
        off = any(isinstance(module, (PeerFeedForward, PkmFeedForward)) for module in modules.values())
        raise ValueError(
            f"{type(model).__name__} has no PEER or PKM layer{' but grafts of adapters that are off' if off else ''}."
        )
    return {
        name: ExpertSet(
            name,
            tuple(sorted({layer_index(member) for member in names})),
            tuple(
                each for member in names for each in modules[member].modules() if isinstance(each, ProductKeyRouter)
            ),
            _tables(holder),
            graft_label(modules, name),
        )
        for name, (holder, names) in members.items()
    }


def adapter_of(name: str) -> tuple[str, str] | None:
    """The name of the layer that has the graft of a module, and of the graft's adapter; `None` outside of grafts."""
    found = re.search(rf"(.*?)\.?\b{PREFIX}layer\.([^.]+)", name)
    return (found[1], found[2]) if found else None


def graft_label(modules: Mapping[str, nn.Module], name: str) -> str | None:
    """
    What distinguishes the graft of a module from others of its layer: the name of its adapter, or, of merged grafts,
    its place in the order in which they were merged. `None` outside of grafts.

    Args:
        modules (mapping of `str` to `nn.Module`): All modules of a model, by name.
        name (`str`): The name of the module.
    """
    if adapter := adapter_of(name):
        return adapter[1]
    parts, num_before = name.split("."), 0
    for place, part in enumerate(parts):
        grafted = modules[".".join(parts[:place])]
        if isinstance(grafted, GraftedFeedForward):
            if part == "grafts":
                return f"graft_{num_before + int(parts[place + 1])}"
            # A later graft is merged into the feed-forward beside the earlier ones.
            num_before += len(grafted.grafts)
    return None


def _is_active(modules, name):
    """Whether a layer takes part in the forward pass: all but grafts of inactive adapters."""
    found = adapter_of(name)
    if found is None:
        return True
    layer = modules[found[0]]
    return found[1] in layer.active_adapters and not layer.disable_adapters


def _holder(modules, name, feed_forward):
    """Name and module of the holder of a layer's tables: its pool, that of a module around it, or a PKM layer."""
    if isinstance(feed_forward, PkmFeedForward):
        return name, feed_forward
    path = name
    while True:
        # Not by `getattr`, which wrappers of PEFT forward to what they wrap.
        pool = modules[path]._modules.get("expert_pool")
        if pool is not None:
            return f"{path}.expert_pool".removeprefix("."), pool
        if not path:
            raise ValueError(
                f"{name or type(feed_forward).__name__} shares its experts with other layers, and "
                f"{type(modules['']).__name__} does not hold them: pass the model that has an `expert_pool`."
            )
        path = path.rpartition(".")[0]


def _tables(holder: nn.Module) -> dict[str, list[tuple[int, ExpertTable]]]:
    if isinstance(holder, PkmFeedForward):
        parts = [("down_proj", 0, holder.values)]
    else:
        pools = [module for module in holder.modules() if isinstance(module, ExpertPool)]
        parts = [(role, pool.first_expert, getattr(pool, role)) for role in TABLES for pool in pools]
    tables: dict[str, list[tuple[int, ExpertTable]]] = {}
    for role, first, part in parts:
        # An adapter may wrap a table.
        found = [] if part is None else [(first, each) for each in part.modules() if isinstance(each, ExpertTable)]
        tables.setdefault(role, []).extend(found)
    return {role: found for role, found in tables.items() if found}


def select_expert_sets(model: nn.Module, layers: Iterable[int] | int | None = None) -> dict[str, ExpertSet]:
    """
    Select the sets of experts of some layers, or all.

    Args:
        model (`nn.Module`): Any module with PEER or PKM layers.
        layers (`int` or iterable of `int`, *optional*):
            Indices of the layers; of layers that share a pool all or none. All layers if `None`.

    Raises:
        `ValueError`: for anything but layer indices, layers without experts, or some of those that share a pool.
    """
    indices = layer_indices(layers)
    sets = find_expert_sets(model)
    if indices is None:
        return sets
    wanted = set(indices)
    known = {layer for each in sets.values() for layer in each.layers}
    if not wanted or not wanted <= known:
        raise ValueError(f"`layers` must be some of {sorted(known)}, the layers with experts, got {sorted(wanted)}.")
    selected = {name: each for name, each in sets.items() if wanted & set(each.layers)}
    for each in selected.values():
        if not set(each.layers) <= wanted:
            raise ValueError(
                f"`layers` must name all or none of {list(each.layers)}, as they share one pool of experts, got "
                f"{sorted(wanted)}."
            )
    return selected


def layer_indices(layers: Iterable[int] | int | None) -> list[int] | None:
    """
    What a user names as layers, as a list of Python integers, or `None` for all layers. Raises `ValueError` for
    anything but an index or an iterable of indices.
    """
    if layers is None:
        return None
    found = _as_list(layers)
    if found is None or not all(_is_index(layer) for layer in found):
        raise ValueError(
            "`layers` must be a layer index, an iterable of layer indices, or `None` for all layers, got "
            f"{shown(layers, None if isinstance(layers, Integral) else found)}."
        )
    return [int(layer) for layer in found]


def expert_indices(experts: Iterable[int] | torch.Tensor | int | None) -> torch.Tensor | None:
    """
    What a user names as experts, as a tensor of expert indices (int64) or a mask (bool), or `None`. Raises
    `ValueError` for anything but an index, an iterable of indices, a bool mask or `None`.
    """
    if experts is None:
        return None
    found: Any = experts
    if not isinstance(experts, torch.Tensor):
        found = _as_list(experts)
        # Booleans are a mask only if there is nothing else: among indices they would be experts 0 and 1.
        is_mask = bool(found) and not isinstance(experts, bool) and all(isinstance(each, bool) for each in found)
        if found and (is_mask or all(_is_index(each) for each in found)):
            found = torch.tensor([bool(each) if is_mask else int(each) for each in found])
    is_tensor = isinstance(found, torch.Tensor) and found.numel()
    if not is_tensor or found.is_floating_point() or found.is_complex():
        raise ValueError(
            "`experts` must be an expert index, an iterable of expert indices, or a bool mask of shape "
            f"(num_experts,), got {shown(experts, None if isinstance(experts, (Integral, torch.Tensor)) else found)}."
        )
    return found.cpu()


def _as_list(value):
    """An iterable as a list, one index as a list of it, `None` for anything else."""
    if isinstance(value, (Integral, torch.Tensor)) and not getattr(value, "ndim", 0):
        return [value]
    return list(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else None


def _is_index(value):
    """Whether this is a whole number, of Python, NumPy or torch. `True` is none, though Python takes it for 1."""
    if isinstance(value, torch.Tensor):
        return not value.ndim and value.dtype != torch.bool and not (value.is_floating_point() or value.is_complex())
    return isinstance(value, Integral) and not isinstance(value, bool)


def mask_of_indices(experts: ExpertSet, indices: torch.Tensor) -> torch.Tensor:
    """
    Which experts of a set [`expert_indices`] are: bool, `(num_experts,)`. Raises `ValueError` if it does not have
    them.
    """
    size = experts.num_experts
    of_set = f"{experts.name} has experts 0 to {size - 1}"
    if indices.dtype == torch.bool:
        if indices.shape != (size,):
            raise ValueError(
                f"A mask of `experts` must be of shape {(size,)}, as {of_set}, got {tuple(indices.shape)}."
            )
        return indices
    unknown = indices[(indices < 0) | (indices >= size)]
    if len(unknown):
        raise ValueError(f"{of_set}, but `experts` has {len(unknown)} others, {unknown[:5].tolist()} among them.")
    mask = torch.zeros(size, dtype=torch.bool)
    mask[indices.long().flatten()] = True
    return mask


def observe_routers(
    sets: dict[str, ExpertSet],
    on_output: Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor | None], None],
) -> list[RemovableHandle]:
    """
    Call a function with the output of each router. Forward passes that activation checkpointing repeats are skipped.

    Args:
        sets (`dict[str, ExpertSet]`)
        on_output (`Callable`):
            Gets the name of the set, the expert indices (int64) and their router weights, both of shape `(batch_size,
            sequence_length, num_heads, k)`, and the padding mask of shape `(batch_size, sequence_length)` or `None`.

    Returns:
        `list[RemovableHandle]`: handles of the hooks.
    """
    return [
        router.register_forward_hook(_router_hook(name, on_output), with_kwargs=True)
        for name, each in sets.items()
        for router in each.routers
    ]


def _router_hook(name, on_output):
    # Not traced: a graph would keep the answer of the first forward pass to whether it runs in the backward pass.
    @torch.compiler.disable
    def observe(router, args, kwargs, output):
        # Activation checkpointing runs a forward pass again in the backward pass.
        if not in_backward():
            padding_mask = args[1] if len(args) > 1 else kwargs.get("padding_mask")
            on_output(name, *output, padding_mask)

    return observe


def observe_retrievals(
    sets: dict[str, ExpertSet], on_retrieval: Callable[[str, torch.Tensor, torch.Tensor], None]
) -> list[RemovableHandle]:
    """
    Call a function with the experts that tokens retrieve, see [`observe_routers`].

    Args:
        sets (`dict[str, ExpertSet]`)
        on_retrieval (`Callable`):
            Gets the name of the set, the expert indices (int64) and whether they count (bool), both of shape
            `(batch_size, sequence_length, num_heads, k)`. Experts of padding do not count, nor do those of zero
            weight, such as experts behind a closed gate.

    Returns:
        `list[RemovableHandle]`: handles of the hooks.
    """

    def on_output(name, indices, weights, padding_mask):
        counts = weights != 0
        if padding_mask is not None:
            counts = counts & padding_mask.to(counts.device, torch.bool)[..., None, None]
        on_retrieval(name, indices, counts)

    return observe_routers(sets, on_output)
