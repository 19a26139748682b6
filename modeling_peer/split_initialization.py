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
Initialization of a model that is split over processes: no process allocates the whole of an expert table, and values
do not depend on the number of processes.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.utils.logging import set_tqdm_hook

from .library_releases import TorchDispatchMode, is_about_a_checkpoint


if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Replicate, Shard

aten = torch.ops.aten

# What the functions of `transformers.initialization` draw random values by.
DRAWS = {aten.normal_.default, aten.uniform_.default}

# Elements that are drawn at a time, 16 MB in float32. Chunks of a multiple of 16 elements have the values that torch
# draws on a CPU for the whole.
CHUNK_ELEMENTS = 2**22


class WholeDraws(TorchDispatchMode):
    """
    A mode in which a split tensor is filled with its part of what a whole one would be filled with. Every process
    draws the whole, in chunks of rows, from a generator that has to be in the same state on all of them.
    """

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator not in DRAWS or not isinstance(args[0], DTensor):
            return operator(*args, **kwargs)
        _fill(args[0], lambda chunk: operator(chunk, *args[1:], **kwargs))
        return args[0]


def _fill(tensor: Any, draw: Callable[[torch.Tensor], Any]) -> None:
    local = tensor.to_local()
    (first, last), *others = own_part(tensor)
    num_rows, *shape = tensor.shape
    step = 16 * math.ceil(CHUNK_ELEMENTS / (16 * max(math.prod(shape), 1)))
    # The last chunk takes what remains: torch draws few values in another way than many.
    starts = range(0, max(num_rows // step, 1) * step, step)
    for start in starts:
        stop = num_rows if start == starts[-1] else start + step
        chunk = local.new_empty(stop - start, *shape)
        draw(chunk)
        own = slice(max(first, start), min(last, stop))
        if own.start < own.stop:
            columns = tuple(slice(*part) for part in others)
            local[own.start - first : own.stop - first] = chunk[own.start - start : own.stop - start][(..., *columns)]


def own_part(tensor: Any) -> list[tuple[int, int]]:
    """Of each dimension of a split tensor, a DTensor, where this process's part starts and ends."""
    parts = [(0, size) for size in tensor.shape]
    for dim, placement in enumerate(tensor.placements):
        if type(placement) not in (Shard, Replicate):
            raise ValueError(
                f"The part of a process of a tensor that is split as {tensor.placements} is no range of rows and "
                "columns, as with tensor parallelism beside FSDP2: new models and split checkpoints need one of them."
            )
        if placement.is_shard():
            start, stop = parts[placement.dim]
            length = math.ceil((stop - start) / tensor.device_mesh.size(dim))
            first = min(start + tensor.device_mesh.get_local_rank(dim) * length, stop)
            parts[placement.dim] = first, min(first + length, stop)
    return parts


@torch.no_grad()
def zero_padding(model: nn.Module) -> None:
    """Zero the embeddings of padding, as Transformers does where it does not have parts of them alone."""
    if not torch.distributed.is_available():
        return
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and isinstance(module.weight, DTensor):
            (first, last), _ = own_part(module.weight)
            if first <= module.padding_idx < last:
                module.weight.to_local()[module.padding_idx - first] = 0


@contextlib.contextmanager
def initialized_whole() -> Iterator[None]:
    """
    Let `from_pretrained` initialize a model without a checkpoint: split tensors as whole ones, and without reports of
    what a checkpoint should have and how much of it is loaded.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_of_no_checkpoint)
    hook = set_tqdm_hook(_without_bar)
    try:
        with WholeDraws() if torch.distributed.is_available() else contextlib.nullcontext():
            yield
    finally:
        logger.removeFilter(_is_of_no_checkpoint)
        set_tqdm_hook(hook)


def _without_bar(make_bar, arguments, options):
    return make_bar(*arguments, **{**options, "disable": True})


def _is_of_no_checkpoint(record):
    return not is_about_a_checkpoint(record.getMessage())
