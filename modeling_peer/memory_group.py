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
"""
Memory groups: expert tables split by width over ranks that train on different batches.

Each of the G ranks of a group owns `hidden_size / G` columns of every row of every table, and the optimizer state
of these columns. Tokens are exchanged (see `token_exchange.py`), tables and their gradients never. Where there are
more ranks than a group has, other groups own the same columns, and the gradients of these are averaged once for
each optimizer step (see `gradient_exchange.py`). All other parameters are FSDP2's, which Transformers applies, or
DistributedDataParallel's (see [`shard_experts`]):

```python
>>> from transformers.distributed import DistributedConfig

>>> distributed_config = DistributedConfig(fsdp_size=8, ep_size=8)
>>> model = PeerForCausalLM.from_pretrained("path/to/a/peer/checkpoint", distributed_config=distributed_config)
```

The styles are Transformers' expert-parallel ones, and the `ep_plan` of feed-forward variants says what they apply to.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from .expert_operators import run_expert_pool
from .expert_table import ExpertTable, refuse_quantized
from .factored_gradient import let_follow
from .feed_forward_peer import ExpertPool
from .forward_pass import ForwardPass
from .growth_advice import FROZEN_ROWS
from .library_releases import (
    FOUND_RELEASES,
    PARALLEL_STYLES,
    ExpertParallelLayer,
    apply_expert_parallelism,
    ensure_process_group,
    initialize_distributed_mesh,
    is_at_least,
    require_transformers,
    style_of_modules,
    timeout_of_default_group,
)
from .process_groups import group_of_all
from .tensor_parallel import shard_columns
from .token_exchange import TokenExchange, exchange_tokens


if dist.is_available():
    from torch.distributed.tensor import DTensor

logger = logging.get_logger(__name__)

FIRST_RELEASE = "5.24"
FEATURE = "A memory group (`ep_size` of a PEER model)"


class MemoryGroup:
    """
    The ranks that together hold whole expert tables, as one of them sees it.

    Args:
        columns (`dist.ProcessGroup`): The ranks of the group, in the order of their columns.
        replicas (`dist.ProcessGroup`, *optional*):
            The ranks of all groups that own the same columns as this one. `None` if there is one group.
    """

    def __init__(self, columns: dist.ProcessGroup, replicas: dist.ProcessGroup | None):
        self.columns = columns
        self.replicas = replicas

    @property
    def size(self) -> int:
        return dist.get_world_size(self.columns)

    def __deepcopy__(self, memo: dict[int, Any]) -> "MemoryGroup":
        return self  # a copy of a model is in the same processes, which torch cannot copy


class ExpertColumns(ExpertParallelLayer):
    """A table of which each rank holds some columns. What runs on it is the pool's part."""

    def validate_param(self, module, param, mesh, parameter_name=None):
        require_transformers(FIRST_RELEASE, FEATURE)
        num_biases = getattr(module, "num_biases", 0)
        width = module.embedding_dim - num_biases
        if width % mesh.size():
            raise ValueError(
                f"`ep_size` = {mesh.size()} does not divide the width {width} of {parameter_name}: each rank of a "
                "memory group owns equally many columns of an expert table."
            )
        # With biases, DTensor gives one column more to all processes but the last.
        of_others = math.ceil(module.embedding_dim / mesh.size()) * (mesh.size() - 1)
        if module.embedding_dim <= of_others:
            raise ValueError(
                f"`ep_size` = {mesh.size()} leaves the last rank of a memory group no column of {parameter_name}: "
                f"its {module.embedding_dim} columns, {num_biases} of them of biases, go to the others."
            )

    def shard_param(self, module, param, mesh):
        shard_columns(module, param, mesh)

    def install_forward(self, module, mesh):
        return module


class ExpertPoolExchange(ExpertParallelLayer):
    """A pool that runs all tokens of the group on the columns of this rank."""

    def install_forward(self, module, mesh):
        if module.act_has_parameters:
            raise ValueError(
                f"The activation of a pool in a memory group must have no parameters, got {module.act_fn}."
            )
        group = MemoryGroup(_group_of(mesh), None)
        module.start_exchange = functools.partial(_start_exchange, group)
        module.forward = functools.partial(_run_pool, module, group)
        return module


class ExpertValuesExchange(ExpertColumns):
    """A table without neurons, PKM's: likewise, by itself."""

    def install_forward(self, module, mesh):
        module.forward = functools.partial(_run_values, module, MemoryGroup(_group_of(mesh), None))
        return module


def _group_of(mesh):
    """The ranks of a mesh, in a group of their own: a mesh of all ranks has the default group."""
    group = mesh.get_group()
    is_default = dist.is_initialized() and group.group_name == dist.group.WORLD.group_name
    return group_of_all("memory group") if is_default else group


# A compiler knows neither how many tokens other ranks have, nor the collectives.
@torch.compiler.disable
def _start_exchange(
    group: MemoryGroup, hidden_states: torch.Tensor, forward_pass: ForwardPass | None = None
) -> TokenExchange:
    """See [`ExpertPool.start_exchange`]."""
    exchange = exchange_tokens(group.columns, hidden_states, hidden_states.shape[1], forward_pass)
    exchange.start_to_columns(hidden_states.detach())
    return exchange


@torch.compiler.disable
def _run_pool(
    pool: Any,
    group: MemoryGroup,
    hidden_states: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    exchange: TokenExchange | None = None,
) -> torch.Tensor:
    """The forward of an [`ExpertPool`] in a memory group, with the arguments and the result of its own."""
    tables = (pool.up_proj, pool.gate_proj, pool.down_proj)
    up, gate, down = (None if table is None else _own_columns(table) for table in tables)
    rows = (indices - pool.first_expert).int()
    if exchange is None:
        exchange = _start_exchange(group, hidden_states)
    kernels = _kernels(pool.down_proj, down)
    return run_expert_pool(hidden_states, rows, weights, up, gate, down, pool.act_fn, kernels, exchange)


@torch.compiler.disable
def _run_values(table: ExpertTable, group: MemoryGroup, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The forward of an [`ExpertDownProjection`] in a memory group, with the arguments and the result of its own."""
    down = _own_columns(table)
    exchange = exchange_tokens(group.columns, weights, table.embedding_dim)
    kernels = _kernels(table, down)
    return run_expert_pool(None, indices.int(), weights, None, None, down, None, kernels, exchange)


def _own_columns(table):
    # Not by its class: styles are registered once, and the code that a checkpoint brought along has its own classes.
    if not hasattr(table, "kernels_on"):
        raise TypeError(
            f"A memory group reads expert tables without calling them, and found {type(table).__name__} in the place "
            "of one: adapters on tables do not work in it."
        )
    if table.has_hooks:
        raise TypeError("A memory group reads expert tables without calling them, and found hooks on one.")
    local = table.weight.to_local()
    let_follow(table.weight, local)
    return local


def _kernels(table, columns):
    kernels = table.kernels_on(columns)
    if kernels == "eager":
        # The literal algorithm is for one process: autograd does not see what others do.
        logger.warning_once(
            'A memory group runs `expert_kernels="torch"` instead of "eager", which is for one process.'
        )
        return "torch"
    return kernels


def check_processes(distributed_config: Any) -> Any:
    """
    Refuse, before ranks are grouped, what they do not agree on, and what no memory group can be formed of.

    Args:
        distributed_config (`DistributedConfig` or `dict`, *optional*)

    Returns:
        `DistributedConfig` or `None`: what was given, not as a dictionary.

    Raises:
        `RuntimeError`: if `ep_size` is more than 1 and Transformers is too old.
        `ValueError`: if ranks were given different ones, or if `ep_implementation`, `tp_size` or `pp_size` is set
            besides `ep_size`.
    """
    is_dict = isinstance(distributed_config, dict)
    ep_size = distributed_config.get("ep_size") if is_dict else getattr(distributed_config, "ep_size", None)
    has_groups = ep_size not in (None, 1)
    if has_groups:
        require_transformers(FIRST_RELEASE, FEATURE)
    if is_dict:
        if has_groups:
            _check_sizes(ep_size, **{name: distributed_config.get(name) for name in OTHER_SIZES})
        distributed_config = DistributedConfig.from_dict(distributed_config)
    if not is_at_least("Transformers", FIRST_RELEASE) or not _has_several_processes(distributed_config):
        return distributed_config
    # Also without groups: another rank may have them.
    ensure_process_group()
    _refuse_differences("`distributed_config`", asdict(distributed_config))
    if has_groups:
        _check_options(distributed_config)
    return distributed_config


def _has_several_processes(distributed_config):
    return distributed_config is not None and any(
        getattr(distributed_config, f"{kind}_size") > 1 for kind in ("tp", "pp", "dp")
    )


# What a memory group cannot be beside.
OTHER_SIZES = {
    "tp_size": "the ranks of a memory group have different batches",
    "pp_size": "the ranks of a memory group run the same layers",
}


def _check_sizes(ep_size, **sizes):
    for name, size in sizes.items():
        if size not in (None, 1):
            raise ValueError(
                f"`ep_size` = {ep_size} of a PEER model needs `{name}` = 1, found {size}: {OTHER_SIZES[name]}. Leave "
                f"`{name}` out, and set `fsdp_size` to the number of ranks; or leave `ep_size` out."
            )


def _check_options(distributed_config):
    sizes = {name: getattr(distributed_config, name) for name in OTHER_SIZES}
    _check_sizes(distributed_config.ep_size, **sizes)
    if distributed_config.ep_implementation != "auto":
        raise ValueError(
            f'`ep_implementation` of a PEER model must be "auto", found "{distributed_config.ep_implementation}": a '
            "memory group exchanges columns of all tokens, in one way."
        )


def form_memory_group(model: Any, distributed_config: Any, mesh_manager: Any) -> None:
    """
    Split the expert tables of a model over the ranks of a memory group. The model may be on the meta device.

    Args:
        model (`PeerPreTrainedModel`)
        distributed_config (`DistributedConfig`): Its `ep_size` is the number of ranks of a group.
        mesh_manager (`TransformersDeviceMesh`): The meshes that Transformers made for `distributed_config`.

    Raises:
        `ValueError`: if the ranks have different models or releases, if `ep_size` does not divide the width of a
            table, or if the plan is not that of a memory group.
    """
    plan = style_of_modules(model, distributed_config)
    dispatched = [name for name, style in plan.items() if style == "ep_dispatch_experts"]
    if dispatched:
        raise ValueError(
            f'`ep_plan` gives {dispatched} the style "ep_dispatch_experts" of Transformers, which a model with a '
            "memory group cannot have."
        )
    _split(model, plan, mesh_manager)


def _split(model, plan, mesh_manager):
    _refuse_differences("the model", _description(model))
    mesh = mesh_manager.get_mesh("ep")
    apply_expert_parallelism(model, mesh, mesh_manager.get_mesh("tp"), plan)
    group = MemoryGroup(_group_of(mesh), _group_of_replicas(mesh_manager))
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.memory_group = group


def shard_experts(model: Any, ep_size: int) -> Any:
    """
    Split the expert tables of a model that is whole, in place, and nothing else: for a model whose other parameters
    DistributedDataParallel replicates, or for grafts, whose base model may be FSDP2's. The tables become those of rank
    0, as DDP does with the others. Call it before an optimizer gets the tables.

    A model that is too large to be whole in every rank is made by `from_pretrained` or `from_config` with a
    `distributed_config`, which also splits the rest by FSDP2.

    Args:
        model ([`PeerPreTrainedModel`], or any model with grafts): On the device where it will be trained.
        ep_size (`int`): Number of ranks of a memory group. It divides the number of ranks.

    Returns:
        The model.

    Raises:
        `RuntimeError` or `ValueError`: as `from_pretrained` does for a `distributed_config` with this `ep_size`, and
            if experts are frozen.
    """
    require_transformers(FIRST_RELEASE, FEATURE)
    refuse_quantized(model, "`shard_experts`")
    ensure_process_group()
    _refuse_frozen_rows(model)
    config = check_processes(DistributedConfig(fsdp_size=dist.get_world_size(), ep_size=ep_size))
    _refuse_differences("the model", _description(model))
    if dist.get_world_size() == 1:
        return model
    _, mesh_manager = initialize_distributed_mesh(config)
    for module in model.modules():
        if isinstance(module, ExpertTable):
            dist.broadcast(module.weight.detach(), 0)
    _split(model, _plan_of(model), mesh_manager)
    return model


def _refuse_frozen_rows(model):
    for name, module in model.named_modules():
        if isinstance(module, ExpertTable) and module.__dict__.get(FROZEN_ROWS):
            raise ValueError(
                f"Experts of {name} are frozen, and the tables of a memory group are other parameters, of which they "
                "would not be: split the model first, and then call `freeze_experts` or `train_added_experts_only`."
            )


def _plan_of(model):
    """The styles of all pools and tables that are in a model, of whatever class it is."""
    tables = {name: module for name, module in model.named_modules() if isinstance(module, ExpertTable)}
    pools = {name for name, module in model.named_modules() if isinstance(module, ExpertPool)}
    plan = dict.fromkeys(pools, "expert_pool_exchange")
    for name in tables:
        in_pool = name.rpartition(".")[0] in pools
        style = "expert_columns" if in_pool else "expert_values_exchange"
        plan |= {f"{name}.weight": style, name: style}
    return plan


def _group_of_replicas(mesh_manager):
    """The ranks that own the same columns: a group of its own, in which nothing else is reduced."""
    ranks = mesh_manager.get_mesh(("dp_replicate", "efsdp", "ep")).mesh.flatten(0, -2)
    if len(ranks) == 1:
        return None
    own, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=timeout_of_default_group())
    return own


def _description(model):
    config = {name: value for name, value in model.config.to_dict().items() if name not in UNCOMPARED}
    tables = {
        f"{name}.weight": (tuple(module.weight.shape), module.weight.dtype)
        for name, module in model.named_modules()
        if isinstance(module, ExpertTable)
    }
    return {**FOUND_RELEASES, "modeling_peer": _own_release(), **config, **tables}


# Fields of a configuration that say where it came from and how it runs.
UNCOMPARED = {"distributed_config", "_name_or_path", "transformers_version"}


def _own_release():
    try:
        return metadata.version("modeling-peer")
    except metadata.PackageNotFoundError:  # the code came with a checkpoint
        return None


def refuse_other_seeds(distributed_config: Any) -> None:
    """
    Raise `ValueError` on all ranks that split a model if they would not draw the same random values.

    Args:
        distributed_config (`DistributedConfig` or `dict`, *optional*): See [`check_processes`], which is called first.
    """
    if not _has_several_processes(check_processes(distributed_config)):
        return
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        states = {"the CPU": torch.get_rng_state()}
        if torch.cuda.is_available():
            states["the GPU"] = torch.cuda.get_rng_state()
        hashes = {
            f"random state of {name}": sha256(state.numpy().tobytes()).hexdigest()[:8]
            for name, state in states.items()
        }
        _refuse_differences("what they draw new weights from, `torch.manual_seed`", hashes)


def _refuse_differences(subject, own):
    """Raise the same `ValueError` on all ranks if they do not have the same dictionary."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    for rank, other in enumerate(every):
        names = sorted(name for name in every[0].keys() | other.keys() if every[0].get(name) != other.get(name))
        if names:
            found = ", ".join(f"`{name}` {every[0].get(name)!r} and {other.get(name)!r}" for name in names)
            raise ValueError(f"Ranks 0 and {rank} disagree on {subject}: they have {found}.")


@contextlib.contextmanager
def tables_left_out(model: nn.Module) -> Iterator[None]:
    """
    Hide the tables that a memory group splits from what runs inside: FSDP2 would gather them, and Transformers does
    not tell it which parameters to ignore.
    """
    tables = [each for each in model.modules() if isinstance(each, ExpertTable) and is_split(each.weight)]
    weights = [table._parameters.pop("weight") for table in tables]
    try:
        yield
    finally:
        for table, weight in zip(tables, weights, strict=True):
            table._parameters["weight"] = weight


def is_split(weight: torch.Tensor) -> bool:
    """Whether a memory group splits a table."""
    return dist.is_available() and isinstance(weight, DTensor) and weight.device_mesh.mesh_dim_names == ("ep",)


def register_memory_group_styles() -> None:
    """Make the styles known under the names that the `ep_plan` of feed-forward variants uses."""
    styles: Any = PARALLEL_STYLES
    if dist.is_available() and styles is not None:
        styles.register("expert_columns", ExpertColumns())
        styles.register("expert_pool_exchange", ExpertPoolExchange())
        styles.register("expert_values_exchange", ExpertValuesExchange())
