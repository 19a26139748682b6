# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Private functions of Transformers and torch that training on many processes needs, and differences between their
releases. Each entry says what happens without it.
"""

import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

# Without it, new models that are split over processes cannot be made, and importing this package fails.
from torch.utils._python_dispatch import TorchDispatchMode


# Without them, or before 5.24, expert tables cannot be split over processes; the rest of a model can.
try:
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES as PARALLEL_STYLES
    from transformers.distributed.tensor_parallel import TensorParallelLayer
except ImportError:
    PARALLEL_STYLES, TensorParallelLayer = None, object  # type: ignore[assignment,misc]

IS_NEW = Version(transformers.__version__).release >= (5, 24)
HAS_PARALLEL_STYLES = PARALLEL_STYLES is not None and IS_NEW


def show_cache_name(model_class: Any) -> None:
    """
    Before 5.24, name the cache of a forward `past_key_values` in its signature. Stages of pipeline parallelism bind it
    by this name, and would lose it otherwise.
    """
    if not IS_NEW:
        shown = inspect.signature(model_class.forward)
        named = [
            each.replace(name="past_key_values") if name == "cache" else each
            for name, each in shown.parameters.items()
        ]
        model_class.forward.__signature__ = shown.replace(parameters=named)


def require_parallel_styles() -> None:
    """Raise `RuntimeError` if Transformers is too old to split expert tables."""
    if not HAS_PARALLEL_STYLES:
        raise RuntimeError(
            f"Splitting expert tables over processes needs Transformers 5.24, found {transformers.__version__}."
        )


def ensure_process_group() -> None:
    """Initialize `torch.distributed` from what a launcher set, if it is not initialized. Without it, this raises."""
    from transformers.distributed.utils import _ensure_torch_distributed

    _ensure_torch_distributed()


def replicas_in_forward() -> DistributedDataParallel | None:
    """The DistributedDataParallel in whose forward the caller runs, if any. See [`can_exchange_gradients`]."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def can_exchange_gradients() -> bool:
    """
    Whether torch has what [`replicas_in_forward`] and [`call_after_backward`] need. Without it,
    DistributedDataParallel keeps the expert tables, and reduces dense gradients of them.
    """
    return hasattr(DistributedDataParallel, "_active_ddp_module") and hasattr(
        torch.autograd.Variable, "_execution_engine"
    )


def call_after_backward(function: Callable[[], object]) -> None:
    """Call a function at the end of the backward that runs now."""
    torch.autograd.Variable._execution_engine.queue_callback(function)  # type: ignore[attr-defined]


def reduces_gradients(model: torch.nn.Module) -> bool:
    """
    Whether FSDP2 reduces the gradients of a model in this backward, which it does not during gradient accumulation. If
    torch no longer tells, the answer is yes: averaging too often moves more bytes, and the result is the same.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
            return all(getattr(group, "all_reduce_grads", True) for group in groups)
    return True


def timeout_of_default_group() -> timedelta | None:
    """How long collectives of the default process group may take; `None`, torch's default, if torch does not tell."""
    group: Any = dist.group.WORLD
    try:
        return group._get_backend(group._device_types[0]).options._timeout
    except (AttributeError, IndexError, RuntimeError):
        return None


# `(output, input, group=...)`, collectives of equal parts, which torch 2.13 renamed.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

__all__ = ["TensorParallelLayer", "TorchDispatchMode", "all_gather", "reduce_scatter"]
