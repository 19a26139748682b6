# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
New models that are split over processes. No process allocates a whole expert table, and values do not depend on the
number of processes.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import PreTrainedConfig
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from ..arguments.check_types import check_types
from .memory_group import check_agreement
from .plans import has_several_processes
from .releases import TorchDispatchMode, ensure_process_group


aten = torch.ops.aten

# The operators with which functions of `transformers.initialization` draw random values.
DRAWS = {aten.normal_.default, aten.uniform_.default}

# Elements that are drawn at a time, 16 MB in float32. Chunks of a multiple of 16 elements have the values that torch
# draws on a CPU for the whole.
CHUNK_ELEMENTS = 2**22


@check_types
def make_split_model(
    model_class: type[Any],
    config: PreTrainedConfig,
    distributed_config: DistributedConfig | dict | None = None,
    **kwargs: Any,
) -> Any:
    """
    Make a model with new weights, in training mode, as its constructor does, but split before it has memory. All
    processes must have the same seed. The weights do not depend on the number of processes; on a CPU, they are those
    that one process draws here without a `distributed_config`.

    Args:
        model_class (`type`): Such as [`PeerForCausalLM`].
        config ([`PeerConfig`])
        distributed_config (`DistributedConfig`, *optional*): Of Transformers, see `from_pretrained`.
        kwargs: `dtype` and others of `from_pretrained`.

    Raises:
        `ValueError`: on all processes, if they disagree on `distributed_config`, the configuration or their seeds.

    ```python
    >>> torch.manual_seed(0)
    >>> split = DistributedConfig(fsdp_size=8, ep_size=8)
    >>> model = make_split_model(PeerForCausalLM, config, split)
    ```
    """
    if isinstance(distributed_config, dict):
        distributed_config = DistributedConfig(**distributed_config)
    if has_several_processes(distributed_config):
        ensure_process_group()
        states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
        hashes = [sha256(state.numpy().tobytes()).hexdigest()[:8] for state in states]
        check_agreement("the random state", {"torch.manual_seed": hashes})
    with _initialized_whole():
        model = model_class.from_pretrained(
            None, config=config, state_dict={}, distributed_config=distributed_config, **kwargs
        )
    model.name_or_path = model.config.name_or_path = ""  # not "None", which cards would name as its base model
    model.was_loaded = False
    _zero_padding(model)
    return model.train()


class WholeDraws(TorchDispatchMode):
    """
    A mode in which a split tensor is filled with its part of the values of a whole one. Every process draws the whole,
    in chunks of rows, from a generator that must be in the same state on all processes.
    """

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator not in DRAWS or not isinstance(args[0], DTensor):
            return operator(*args, **(kwargs or {}))
        _fill(args[0], lambda chunk: operator(chunk, *args[1:], **(kwargs or {})))
        return args[0]


def _fill(tensor: Any, draw: Callable[[torch.Tensor], Any]) -> None:
    local = tensor.to_local()
    own, *others = own_part(tensor)
    num_rows, *shape = tensor.shape
    step = 16 * math.ceil(CHUNK_ELEMENTS / (16 * max(math.prod(shape), 1)))
    # The last chunk takes what remains: torch draws few values in another way than many.
    starts = range(0, max(num_rows // step, 1) * step, step)
    for start in starts:
        stop = num_rows if start == starts[-1] else start + step
        chunk = local.new_empty(stop - start, *shape)
        draw(chunk)
        first, last = max(own.start, start), min(own.stop, stop)
        if first < last:
            local[first - own.start : last - own.start] = chunk[first - start : last - start][(..., *others)]


def own_part(tensor: Any) -> tuple[slice, ...]:
    """Return this process's part of a split tensor, a DTensor, as a slice of each dimension."""
    if any(type(placement) not in (Shard, Replicate) for placement in tensor.placements):
        raise ValueError(f"Tensor parallelism beside FSDP2 is not supported here, found {tensor.placements}.")
    (part,) = tensor.__create_chunk_list__()
    return tuple(slice(first, first + size) for first, size in zip(part.offsets, part.sizes, strict=True))


@torch.no_grad()
def _zero_padding(model):
    """Zero the embeddings of padding, which Transformers does only for whole embeddings."""
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and isinstance(module.weight, DTensor):
            rows, _ = own_part(module.weight)
            if rows.start <= module.padding_idx < rows.stop:
                module.weight.to_local()[module.padding_idx - rows.start] = 0


@contextlib.contextmanager
def _initialized_whole() -> Iterator[None]:
    """
    Let `from_pretrained` initialize a model without a checkpoint. Split tensors get the values of whole ones, and
    there are no warnings of missing weights.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with WholeDraws():
            yield
    finally:
        logging.set_verbosity(verbosity)
