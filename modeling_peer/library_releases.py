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
What differs between the releases of Transformers and torch that this code runs on, and the private functions of theirs
that it calls. A checkpoint's code carries this module along and imports it first: pip never sees which releases remote
code needs, so the code itself refuses those that it does not know.

Two kinds of names with an underscore are used where they are needed, and not through here. `_parameters`, `_modules`
and the dictionaries of hooks of modules, `_indices()` and `_values()` of sparse tensors, the `_schema` of an operator,
`_make_wrapper_subclass` and `_disabled_torch_function_impl`, of which torch has its tensor subclasses made, and
`_hf_hook`, by which accelerate marks a module that it moves, are in every supported release. So are the operators of
lists, such as `_foreach_mul_`; one that is gone is done on dense gradients (`factored_gradient.py`). A class
of models declares what it can do by attributes such as `_no_split_modules`, `_tp_plan`, `_auto_class`,
`_can_set_experts_implementation`, `_ddp_params_and_buffers_to_ignore` and the `_global_mapping` of a registry, as the
models of Transformers do: one that a later release does not read any more has no effect. And classes of models
override `_upload_modified_files`: where a release does not call it, `push_to_hub` pushes a card without the package.
"""

import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers.utils import logging


# The first release that is supported, and the major release that is not any more.
SUPPORTED_RELEASES = {"Transformers": ("5.16.1", 6), "torch": ("2.9", 3)}

FOUND_RELEASES = {"Transformers": transformers.__version__, "torch": torch.__version__}


def is_at_least(library: str, release: str) -> bool:
    """Whether the installed `"Transformers"` or `"torch"` is of this release or a later one."""
    # A vendor's build of a release may call itself an alpha of it: only the digits count.
    return Version(FOUND_RELEASES[library]).release >= Version(release).release


def check_releases() -> None:
    """Raise `ImportError` if the installed release of Transformers or torch is not supported."""
    for library, (first, too_late) in SUPPORTED_RELEASES.items():
        if not is_at_least(library, first) or is_at_least(library, str(too_late)):
            ranges = " and ".join(f"{name} {low} to {high - 1}.x" for name, (low, high) in SUPPORTED_RELEASES.items())
            raise ImportError(
                f"PEER for Transformers supports {ranges}, and found {library} {FOUND_RELEASES[library]}. Install a "
                "supported release of it, or a release of modeling_peer that supports this one."
            )


# Before anything is imported that another release may have elsewhere.
check_releases()

logger = logging.get_logger(__name__)

# What a forward, a layer, an attention, a mask and an output call the KV cache.
CACHE = "cache" if is_at_least("Transformers", "5.24") else "past_key_values"


def rename_cache(forward: Callable) -> Callable:
    """
    Decorate a forward so that its parameter `cache` has the name that this release of Transformers gives it.

    Before 5.24 the parameter itself is renamed, to `past_key_values`, rather than wrapped: continuous batching passes
    a cache of another kind, called `cache`, to the attention beside it; pipeline parallelism binds arguments by the
    signature; and ahead-of-time compilation does not take a wrapper. The body of the forward goes on as it is.
    """
    if CACHE == "cache":
        from transformers.utils.deprecation import deprecate_kwarg

        return deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")(forward)
    code = forward.__code__
    forward.__code__ = code.replace(co_varnames=tuple(CACHE if name == "cache" else name for name in code.co_varnames))
    forward.__annotations__[CACHE] = forward.__annotations__.pop("cache")
    return forward


try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # before 5.21

    def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """Select the last `logits_to_keep` positions, all if it is 0, or those that it lists."""
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, kept, :]


def require_transformers(release: str, feature: str) -> None:
    """Raise `RuntimeError` if Transformers is older than the `release` that a `feature` needs."""
    if not is_at_least("Transformers", release):
        raise RuntimeError(f"{feature} needs Transformers {release} or later, found {FOUND_RELEASES['Transformers']}.")


def put_first(callback: Any) -> None:
    """
    Put a callback before the others of the `Trainer` that calls it now, those of trackers among them, so that these
    see what it adds to logs. An event hands on everything but the list of callbacks, so the caller is asked for it.
    Without it, or if a release of Transformers calls events otherwise, the order stays as it is, and what is added
    reaches the history of the training but no tracker.
    """
    from transformers.trainer_callback import CallbackHandler

    frame = inspect.currentframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        # What is called in turn stays as it is: callbacks that come later keep their places.
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            handler.callbacks.remove(callback)
            handler.callbacks.insert(0, callback)
            return
        frame = frame.f_back


def ensure_process_group() -> None:
    """Initialize `torch.distributed` as Transformers does, from what a launcher set, if it is not initialized."""
    from transformers.distributed.utils import _ensure_torch_distributed

    _ensure_torch_distributed(torch._C._get_accelerator().type)


def is_about_a_checkpoint(message: str) -> bool:
    """
    Whether a message that Transformers logs as it loads a model says what a checkpoint should have. If a later release
    has other texts, a model that is initialized without a checkpoint reports all its weights as missing, and they are
    drawn all the same.
    """
    return "LOAD REPORT" in message or message.startswith("This checkpoint seem corrupted")


def style_of_modules(model: Any, distributed_config: Any) -> dict[str, str]:
    """The expert-parallel style of each module and parameter of a model that has one, by names without wildcards."""
    return model._resolve_parallel_plans(distributed_config)[1]


# Without them the model works, and cannot be split by tensor parallelism.
try:
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES as PARALLEL_STYLES
    from transformers.distributed.tensor_parallel import TensorParallelLayer
except ImportError as error:
    logger.warning_once(f"Tensor parallelism of experts is not available with this release of Transformers: {error}")
    PARALLEL_STYLES, TensorParallelLayer = None, object  # type: ignore[assignment,misc]

# Without them, a memory group is refused, by styles that are registered all the same.
try:
    from transformers.distributed.expert_parallel import ExpertParallelLayer, apply_expert_parallelism
    from transformers.distributed.utils import initialize_distributed_mesh
except ImportError:  # before 5.24
    ExpertParallelLayer = TensorParallelLayer  # type: ignore[assignment,misc]
    apply_expert_parallelism = initialize_distributed_mesh = None  # type: ignore[assignment]


def _private(name: str, otherwise: Any, loss: str) -> Callable:
    """A private function of torch or, where there is none, one that warns once and gives `otherwise`."""

    def missing(*args):
        logger.warning_once(f"torch {torch.__version__} has no `torch._C.{name}`: {loss}")
        return otherwise

    return getattr(torch._C, name, missing)


# Without it, activation checkpointing's second forward is not told from the first.
_current_graph_task_id = _private(
    "_current_graph_task_id", -1, "what activation checkpointing runs again in the backward is observed twice."
)


def in_backward() -> bool:
    """Whether the caller runs in a backward, as a forward does that activation checkpointing runs again."""
    return _current_graph_task_id() != -1


def current_backward() -> int:
    """The number of the backward in which the caller runs; one that runs inside of another has its own, a higher."""
    return _current_graph_task_id()


def can_tell_backwards() -> bool:
    """
    Whether [`current_backward`] tells one backward from another. If a later release of torch has not what it takes,
    the gradients of expert tables are dense in compiled models.
    """
    return hasattr(torch._C, "_current_graph_task_id")


# Asked outside of the graph: what `torch.compile` traces in torch 2.9 is told that it is exported.
@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether `torch.export` traces the caller."""
    return torch.compiler.is_exporting()


def replicas_in_forward() -> torch.nn.parallel.DistributedDataParallel | None:
    """
    The DistributedDataParallel in whose forward the caller runs, if any. Ask only where
    [`can_exchange_gradients`].
    """
    if not torch.distributed.is_available():
        return None
    return getattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", None)


def can_exchange_gradients() -> bool:
    """
    Whether torch has what [`replicas_in_forward`] and [`call_after_backward`] are made of. If a later release has not,
    DistributedDataParallel keeps the expert tables, and reduces dense gradients of them.
    """
    replicas, variable = torch.nn.parallel.DistributedDataParallel, torch.autograd.Variable
    return hasattr(replicas, "_active_ddp_module") and hasattr(variable, "_execution_engine")


def reduces_gradients(model: torch.nn.Module) -> bool:
    """
    Whether FSDP2 reduces the gradients of a model in the next backward: not in the midst of an accumulation. If a
    release of torch no longer tells, the answer is yes; what is averaged too often moves more bytes.
    """
    if not torch.distributed.is_available():
        return True
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
            return all(getattr(group, "all_reduce_grads", True) for group in groups)
    return True


def call_after_backward(function: Callable[[], object]) -> None:
    """Call a function when the backward that runs now has come to its end."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(function)


def _collective(name: str, name_before: str) -> Callable:
    """A collective of equal parts of tensors, under the name that it has in this release of torch: 2.13 renamed it."""
    found: Any = getattr(torch.distributed, name, None) or getattr(torch.distributed, name_before, None)
    return found


# `(output, input, group=...)`. `None` where torch is built without `torch.distributed`.
all_gather = _collective("all_gather_single", "all_gather_into_tensor")
reduce_scatter = _collective("reduce_scatter_single", "reduce_scatter_tensor")


def timeout_of_default_group() -> timedelta | None:
    """
    How long collectives of the default process group may take. `None` if a release of torch no longer tells: groups
    that are made with it have torch's default.
    """
    group: Any = torch.distributed.group.WORLD
    try:
        return group._get_backend(group._device_types[0]).options._timeout
    except (AttributeError, IndexError, RuntimeError):
        return None


def is_flat_parameter(parameter: torch.Tensor) -> bool:
    """
    Whether a parameter is one into which the first FSDP, without `use_orig_params`, has put those of other modules. If
    a release of torch no longer marks them, the answer is no, and a step on one that holds frozen rows is not refused.
    """
    return getattr(parameter, "_is_flat_param", False)


# Without it, `torch.vmap` fails where C would read its tensors, which have no memory, and so does `torch.func.grad`.
try:
    from torch._C._functorch import get_interpreter_stack as _interpreter_stack
except ImportError:

    def _interpreter_stack():
        return None


# Without it, experts whose tables are tensor subclasses fail on the kernels for plain tensors.
try:
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass
except ImportError:

    def is_traceable_wrapper_subclass(t: object) -> bool:  # type: ignore[misc]
        return False


# Without it, new models that are split over processes are refused.
try:
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:

    class TorchDispatchMode:  # type: ignore[no-redef]
        """Stands for a mode that sees operators, and is refused where it is entered."""

        def __enter__(self):
            raise RuntimeError(f"torch {torch.__version__} has no `TorchDispatchMode`: split models cannot be drawn.")

        def __exit__(self, *error):
            pass


# Without it, what is in dictionaries and tuples with names stays as it is: operators take and give neither.
try:
    from torch.utils._pytree import tree_map
except ImportError:

    def tree_map(func: Callable, tree: Any) -> Any:  # type: ignore[misc]
        if isinstance(tree, (list, tuple)):
            return type(tree)(tree_map(func, each) for each in tree)
        return func(tree)


def active_transforms() -> tuple[str, ...]:
    """The transforms of `torch.func` in which the caller runs, outermost first: `"Grad"`, `"Jvp"`, `"Vmap"`, …"""
    return tuple(each.key().name for each in _interpreter_stack() or ())


def in_forward_mode() -> bool:
    """
    Whether the caller runs in forward-mode differentiation. If a release of torch no longer tells, the answer is no,
    and kernels in C lose the tangents of dual tensors.
    """
    return getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0


# Without it, one counts as there, and sees operators.
_num_dispatch_modes = _private("_len_torch_dispatch_stack", 1, "the router takes longer in training than it must.")


def num_dispatch_modes() -> int:
    """In how many modes that see every operator, such as those that trace or count FLOPs, the caller runs."""
    return _num_dispatch_modes()
