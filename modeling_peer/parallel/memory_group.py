# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Memory groups: expert tables split by width over processes that train on different batches.

Each of the G processes of a group owns `hidden_size / G` columns of every row of every table, and the optimizer state
of these columns. Tokens are exchanged (see `token_exchange.py`), tables and their gradients never. Where there are
more processes than a group has, other groups own the same columns, and their gradients are averaged once for each
optimizer step (see `gradient_exchange.py`). All other parameters are FSDP2's, which Transformers applies, or
DistributedDataParallel's (see [`shard_experts`]).
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..arguments.check_types import check_types
from ..experts import expert_tables
from ..optim.frozen_rows import freezes_of
from .columns import ExpertColumns, MemoryGroup, decoder_of, run_on_columns
from .gradient_exchange import average_in_replicas
from .releases import ensure_process_group, timeout_of_default_group


# Fields of a configuration that say where it came from and how it runs.
UNCOMPARED = {"distributed_config", "_name_or_path", "transformers_version"}


def check_agreement(subject: str, own: dict[str, Any]) -> None:
    """Raise the same `ValueError` on all processes if they do not have the same dictionary."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    for rank, other in enumerate(every):
        names = sorted(name for name in every[0].keys() | other.keys() if every[0].get(name) != other.get(name))
        if names:
            found = ", ".join(f"`{name}` {every[0].get(name)!r} and {other.get(name)!r}" for name in names)
            raise ValueError(f"Ranks 0 and {rank} disagree on {subject}: they have {found}.")


def form_memory_group(model: Any, ep_size: int, device_type: str) -> None:
    """
    Split the expert tables of a model, which may be on the meta device, over memory groups of `ep_size` processes with
    consecutive ranks, in place. Raises `ValueError` if the processes have different models or releases, or a table
    cannot be split.
    """
    tables = expert_tables(model)
    config = {name: value for name, value in model.config.to_dict().items() if name not in UNCOMPARED}
    releases = {"Transformers": transformers.__version__, "torch": torch.__version__}
    shapes = {name: (tuple(table.weight.shape), table.weight.dtype) for name, table in tables.items()}
    check_agreement("the model", config | releases | shapes)
    ranks = [tuple(range(first, first + ep_size)) for first in range(0, dist.get_world_size(), ep_size)]
    columns = _own_group(tuple(ranks), dist.group.WORLD)
    replicas = _own_group(tuple(zip(*ranks, strict=True)), dist.group.WORLD) if len(ranks) > 1 else None
    mesh, style = DeviceMesh.from_group(columns, device_type, mesh_dim_names=("ep",)), ExpertColumns()
    group = MemoryGroup(columns, replicas)
    for name, table in tables.items():
        style.validate_param(table, "weight", mesh, f"{name}.weight")
    run_on_columns(model, group)
    for table in tables.values():
        style.shard_param(table, "weight", mesh)
    decoder = decoder_of(model)
    decoder.memory_group = group
    average_in_replicas(decoder)


@functools.cache
def _own_group(ranks, world):
    # In a group of their own, collectives do not queue behind those of FSDP2 or DistributedDataParallel. The group has
    # the timeout of the default group.
    own, _ = dist.new_subgroups_by_enumeration([list(each) for each in ranks], timeout=timeout_of_default_group())
    return own


@check_types
def shard_experts(model: nn.Module, ep_size: int) -> Any:
    """
    Split only the expert tables of a whole model, in place. The other parameters may be replicated by
    DistributedDataParallel; for grafts, FSDP2 may split the base model. The tables become those of rank 0, as DDP does
    with the others. Call it before an optimizer gets the tables, and before experts are frozen.

    For a model that is too large to be whole in every process, use `from_pretrained` or [`make_split_model`] with a
    `distributed_config`, which also splits the rest by FSDP2.

    Args:
        model ([`PeerPreTrainedModel`], or any model with grafts): On the device where it will be trained.
        ep_size (`int`): Number of processes of a memory group. It divides the number of processes.

    Returns:
        The model.

    Raises:
        `ValueError`: if `ep_size` does not fit, the processes have different models, or experts are already split,
        frozen or quantized.
    """
    ensure_process_group()
    num_processes = dist.get_world_size()
    check_agreement("`shard_experts`", {"ep_size": ep_size})
    if ep_size < 1 or num_processes % ep_size:
        raise ValueError(f"`ep_size` must divide the number of processes, {num_processes}, got {ep_size}.")
    tables: dict[str, Any] = expert_tables(model)
    if any(isinstance(each, DTensor) for table in tables.values() for each in table.parameters()):
        raise ValueError("The expert tables are split already: `shard_experts` takes a model whose tables are whole.")
    if any(freezes_of(table) for table in tables.values()):
        raise ValueError("Experts are frozen, and split tables are other parameters: call `shard_experts` before.")
    if num_processes == 1:
        return model
    for table in tables.values():
        if isinstance(table, nn.Embedding):
            dist.broadcast(table.weight.detach(), 0)
    device_types = {parameter.device.type for parameter in model.parameters()}
    form_memory_group(model, ep_size, device_types.pop())
    return model
