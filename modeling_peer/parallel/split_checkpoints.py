# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Saving models that are split over processes, and loading whole checkpoints into them.

The tables that a memory group splits are gathered in chunks of rows, in a mapped file that has no name: the process
that saves a model never has a whole table in its own memory, and no other process has more than its columns. A whole
checkpoint is loaded into a split model by taking its own part of each tensor, without communication.
"""

import math
import mmap
import os
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import PreTrainedModel

from ..arguments.check_types import check_types
from ..experts import expert_tables
from ..memory.advice import advise_random_access, advise_whole_access
from ..memory.host_tables import advise_tables, keep_in_host_memory
from .columns import is_split, tables_left_out
from .split_initialization import own_part


# Elements that are gathered at a time, 16 MB in float32.
CHUNK_ELEMENTS = 2**22

# Fields of a configuration that the tensors of a checkpoint fix.
FIXED_SIZES = ("num_experts", "num_retrieval_heads", "query_size", "sub_keys_per_head")


def from_pretrained(method: Any, model_class: type, *args: Any, **kwargs: Any) -> Any:
    """
    Load as Transformers does. Expert tables stay in the mapped file, and the operating system is advised to read only
    the rows that are requested. Tables that `device_map` puts on `"cpu"` are never copied to a GPU: their experts run
    on the CPU. Raises `ValueError` for fields that the checkpoint does not fit.
    """
    try:
        loaded = method(*args, **kwargs)
    except RuntimeError as error:
        if sizes := {name: kwargs[name] for name in FIXED_SIZES if name in kwargs}:
            raise ValueError(
                f"The checkpoint has other sizes than {sizes}: load it without them. `keep_heads` drops heads then, "
                "and `add_experts` adds experts."
            ) from error
        raise
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.was_loaded = True
    keep_in_host_memory(model)
    advise_tables(model, advise_random_access)
    return loaded


def save_pretrained(
    method: Any,
    model: Any,
    save_directory: str | os.PathLike,
    is_main_process: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """
    Save as Transformers does, and also models that FSDP2 has split. Raises `ValueError` if [`shard_experts`] split the
    model, no `state_dict` is given, and [`SplitCheckpointCallback`] has not gathered the tables.
    """
    state_dict = state_dict_to_save(model, state_dict)
    model._save_directory = save_directory
    advise_tables(model, advise_whole_access)
    try:
        method.__func__(_in_its_own_class(model), save_directory, is_main_process, state_dict, *args, **kwargs)
    finally:
        advise_tables(model, advise_random_access)


def _in_its_own_class(model):
    """
    Return the model as an object of its original class. FSDP2 replaces that by a class in a module of torch.
    Transformers copies the code of a model from the module of its class, and writes the name of the class.
    """
    if not isinstance(model, FSDPModule):
        return model
    own_class = next(each for each in type(model).__mro__ if not issubclass(each, FSDPModule))
    twin = own_class.__new__(own_class)
    twin.__dict__ = model.__dict__
    return twin


def state_dict_to_save(model: Any, state_dict: Mapping[str, torch.Tensor] | None) -> Mapping[str, torch.Tensor] | None:
    """
    Return what to save of a model: the `state_dict` given to `save_pretrained`, or what [`SplitCheckpointCallback`]
    has gathered, else `None` for the model as it is. Instead of `None`, raises `ValueError` if [`has_parts_alone`].
    """
    if state_dict is None:
        state_dict = getattr(model, "gathered_state_dict", None)
    if state_dict is None and has_parts_alone(model):
        raise ValueError(
            "`shard_experts` split the expert tables of this model: pass the `state_dict` that `whole_state_dict` "
            "made on all processes, or give `Trainer` a `SplitCheckpointCallback`."
        )
    return state_dict


def has_parts_alone(model: nn.Module) -> bool:
    """
    Whether a model has parts of tables that are not gathered when it is saved, as after [`shard_experts`]. It is then
    saved in one process, or by PEFT, which saves an adapter as it is.
    """
    are_split = any(is_split(weight) for table in expert_tables(model).values() for weight in table.parameters())
    are_gathered = isinstance(model, PreTrainedModel) and model.is_distributed_loading_by_transformers
    return are_split and not are_gathered


@check_types
def whole_state_dict(model: nn.Module, directory: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    Gather the state dict of a model whose tables are split by [`shard_experts`], with whole tables. Other trained
    parameters that FSDP2 has split are gathered in memory. Frozen ones, as of the base model of an adapter, stay
    split. Call it on all processes:

    ```python
    >>> state_dict = whole_state_dict(model, "path/to/save")
    >>> if torch.distributed.get_rank() == 0:
    ...     model.save_pretrained("path/to/save", state_dict=state_dict)
    ```

    Args:
        model (`nn.Module`)
        directory (`str` or `os.PathLike`):
            A folder with space for the tables. They are in files without a name, which are removed with the tensors.

    Returns:
        `dict[str, torch.Tensor]`: empty on all processes but the first.
    """
    state_dict: dict[str, Any] = model.state_dict(keep_vars=True)
    gathered = _gather_tables(state_dict, directory)
    for name, tensor in state_dict.items():
        if isinstance(tensor, DTensor) and tensor.requires_grad and not is_split(tensor):
            gathered[name] = tensor.detach().full_tensor()
    return (
        {name: gathered.get(name, tensor.detach()) for name, tensor in state_dict.items()}
        if dist.get_rank() == 0
        else {}
    )


def gather_sharded_state_dict_for_save(
    method: Any, model: Any, model_to_save: Any, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Gather as Transformers does, but the tables of a memory group in files, and not in memory."""
    tables = _gather_tables(state_dict, model._save_directory)
    rest = {name: tensor for name, tensor in state_dict.items() if not is_split(tensor)}
    with tables_left_out(model_to_save):
        return {**method(model_to_save, rest, *args, **kwargs), **tables}


def _gather_tables(state_dict, directory):
    """Gather the tables that a memory group splits in mapped files. Empty on all processes but the first."""
    gathered = {name: _gather(tensor, directory) for name, tensor in state_dict.items() if is_split(tensor)}
    return {name: whole for name, whole in gathered.items() if whole is not None}


@torch.no_grad()
def _gather(table, directory):
    group = table.device_mesh.get_group()
    ranks = dist.get_process_group_ranks(group)
    if 0 not in ranks:  # another group has the same columns
        return None
    whole = _mapped(table.shape, table.dtype, directory) if dist.get_rank() == 0 else None
    local, width = table.to_local(), math.ceil(table.shape[1] / len(ranks))
    num_rows = min(max(CHUNK_ELEMENTS // table.shape[1], 1), len(local))
    # Equal parts, even if the last process has fewer columns. All chunks use the same memory. With a new tensor for
    # each, a busy machine was once seen to hold the chunks of half a table.
    own = local.new_zeros(num_rows, width)
    parts = [torch.empty_like(own) for _ in ranks] if dist.get_rank() == 0 else None
    for start in range(0, len(local), num_rows):
        chunk = local[start : start + num_rows]
        own[: len(chunk), : chunk.shape[1]] = chunk
        dist.gather(own, parts, dst=0, group=group)
        if whole is not None:
            for part, columns in zip(parts, whole[start : start + num_rows].split(width, dim=1), strict=False):
                columns.copy_(part[: len(chunk), : columns.shape[1]])
    return whole


def _mapped(shape, dtype, directory):
    """An empty tensor in a file, which the operating system removes when the tensor is gone."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory) as file:
        size = shape.numel() * dtype.itemsize
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # otherwise a write to a full disk would end the process
        return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=dtype).view(shape)


@torch.no_grad()
def load_state_dict(method: Any, model: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """
    Load as torch does. A split model takes its parts of whole tensors, which `Trainer` loads to resume. Nothing is
    communicated, and only these parts of mapped files are read.
    """
    # FSDP2 shows whole parameters between a forward and the backward.
    if isinstance(model, FSDPModule) or any(isinstance(each, DTensor) for each in model.parameters()):
        loaded = OrderedDict(state_dict)
        for name, own in model.state_dict().items():
            whole = state_dict.get(name)
            # Parts of tensor parallelism in FSDP2 may lie apart; torch says what is wrong with those and with shapes.
            if isinstance(own, DTensor) and whole is not None and not isinstance(whole, DTensor):
                is_simple = all(isinstance(each, Replicate) or type(each) is Shard for each in own.placements)
                if is_simple and whole.shape == own.shape:
                    own.to_local().copy_(whole[own_part(own)])
                    loaded[name] = own
        state_dict = loaded
    return method(state_dict, *args, **kwargs)
