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
from transformers import PreTrainedModel

from .expert_table import ExpertTable
from .memory_group import is_split
from .split_initialization import own_part


if dist.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Replicate, Shard

# Elements that are gathered at a time, 16 MB in float32.
CHUNK_ELEMENTS = 2**22


def in_its_own_class(model: Any) -> Any:
    """
    The model, as an object of the class that it was made of.

    FSDP2 replaces the class of a model by one that it derives, and whose module is torch's. Transformers copies the
    code of a model from the module of its class, and writes the name of that class into `auto_map`. The object that is
    returned has the attributes of the model, not copies of them.
    """
    if not (dist.is_available() and isinstance(model, FSDPModule)):
        return model
    own_class = next(each for each in type(model).__mro__ if not issubclass(each, FSDPModule))
    twin = own_class.__new__(own_class)
    twin.__dict__ = model.__dict__
    return twin


def whole_state_dict(model: nn.Module, directory: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    The state dict of a model whose tables are split by [`shard_experts`], with whole tables. Other parameters that are
    trained may be split by FSDP2, and are gathered in memory; frozen ones, as of the base model of an adapter, stay
    split. Call it on all processes:

    ```python
    >>> state_dict = whole_state_dict(model, "path/to/save")
    >>> if torch.distributed.get_rank() == 0:
    ...     model.save_pretrained("path/to/save", state_dict=state_dict)
    ```

    Args:
        model (`nn.Module`)
        directory (`str` or `os.PathLike`):
            Where there is space for the tables. They are in a file without a name, which is gone with the tensors.

    Returns:
        `dict[str, torch.Tensor]`: empty on all processes but the first.
    """
    state_dict = model.state_dict()
    gathered = gather_tables(state_dict, directory)
    is_first = dist.get_rank() == 0
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, DTensor) and tensor.requires_grad and not is_split(tensor):
            own: Any = tensor.detach()
            whole = own.full_tensor()
            gathered |= {name: whole} if is_first else {}
    return {**state_dict, **gathered} if is_first else {}


def gather_tables(state_dict: Mapping[str, torch.Tensor], directory: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    Gather the tables of a state dict that a memory group splits, in the first process. All processes take part, if
    there is any.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`)
        directory (`str` or `os.PathLike`): Where there is space for the tables, see [`whole_state_dict`].

    Returns:
        `dict[str, torch.Tensor]`: whole tables, in mapped files. Empty on all processes but the first.
    """
    gathered = {name: _gather(tensor, directory) for name, tensor in state_dict.items() if is_split(tensor)}
    return {name: whole for name, whole in gathered.items() if whole is not None}


@torch.no_grad()
def _gather(table, directory):
    group = table.device_mesh.get_group()
    ranks = dist.get_process_group_ranks(group)
    if 0 not in ranks:  # another group has the same columns
        return None
    is_first = dist.get_rank() == 0
    whole = _mapped(table.shape, table.dtype, directory) if is_first else None
    local, width = table.to_local(), math.ceil(table.shape[1] / len(ranks))
    num_rows = min(max(CHUNK_ELEMENTS // table.shape[1], 1), len(local))
    # Equal parts, also of a width that does not divide: the last process has fewer columns. All chunks use the same
    # memory. With a new tensor for each, a busy machine was once seen to hold the chunks of half a table.
    own = local.new_zeros(num_rows, width)
    parts = [torch.empty_like(own) for _ in ranks] if is_first else None
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
            os.posix_fallocate(file.fileno(), 0, size)  # or a full disk would end the process as it writes
        return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=dtype).view(shape)


def has_parts_alone(model: nn.Module) -> bool:
    """
    Whether a model has parts of tables that are not gathered where it is saved, as after [`shard_experts`]: in one
    process, or by PEFT, which saves an adapter as it is.
    """
    are_split = any(isinstance(each, ExpertTable) and is_split(each.weight) for each in model.modules())
    are_gathered = isinstance(model, PreTrainedModel) and getattr(
        model, "is_distributed_loading_by_transformers", False
    )
    return are_split and not are_gathered


def state_dict_to_save(model: Any, state_dict: Mapping[str, torch.Tensor] | None) -> Mapping[str, torch.Tensor] | None:
    """
    What to save of a model: the `state_dict` that its `save_pretrained` was given, or what
    [`SplitCheckpointCallback`] has gathered, or `None` if the model is to be saved as it is. Raises `ValueError` if
    [`has_parts_alone`] is true of it.
    """
    if state_dict is None:
        state_dict = getattr(model, "gathered_state_dict", None)
    if state_dict is None and has_parts_alone(model):
        raise ValueError(
            "`shard_experts` split the expert tables of this model, so one process cannot save it. Call "
            "`state_dict = whole_state_dict(model, save_directory)` on all processes first, and pass "
            "`state_dict=state_dict` on the first; or give `Trainer` a `SplitCheckpointCallback`."
        )
    return state_dict


@torch.no_grad()
def load_parts(model: nn.Module, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """
    Copy this process's part of whole tensors into the split tensors of a model. Nothing is communicated, and what is
    mapped from a file is read no further.

    Args:
        model (`nn.Module`)
        state_dict (`Mapping[str, Any]`): The same on all processes.

    Returns:
        `Mapping[str, Any]`: the state dict, with the model's own tensors in the place of those that were loaded.
    """
    if not _may_be_split(model):
        return state_dict
    split = {name: own for name, own in model.state_dict().items() if isinstance(own, DTensor)}
    loaded = OrderedDict(state_dict)
    for name in split.keys() & state_dict.keys():
        own, whole = split[name], state_dict[name]
        # Parts of tensor parallelism in FSDP2 may lie apart; torch says what is wrong with those and with shapes.
        is_simple = all(isinstance(each, Replicate) or type(each) is Shard for each in own.placements)
        if is_simple and not isinstance(whole, DTensor) and whole.shape == own.shape:
            own.to_local().copy_(whole[tuple(slice(*part) for part in own_part(own))])
            loaded[name] = own
    if hasattr(state_dict, "_metadata"):
        loaded._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return loaded


def _may_be_split(model):
    # FSDP2 shows whole parameters between a forward and the backward.
    return dist.is_available() and (
        isinstance(model, FSDPModule) or any(isinstance(each, DTensor) for each in model.parameters())
    )
