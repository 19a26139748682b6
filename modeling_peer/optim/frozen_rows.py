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
"""Rows of a parameter that no training changes, to the bit, whatever the optimizer."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef

from ..factored_gradient import FactoredGradient
from ..growth_advice import FROZEN_ROWS
from ..library_releases import is_flat_parameter
from ..memory_group import is_split
from .row_adamw import RowAdamW


if dist.is_available():
    from torch.distributed.tensor import DTensor

# The attribute under which an optimizer keeps what its running steps put back.
SAVED_ROWS = "_frozen_rows_before_step"


class FrozenRows:
    """
    Handle of one freeze, as [`freeze_rows`] returns it. A row is frozen as long as any freeze of the parameter holds
    it.

    The module keeps the freeze, so one whose handle is dropped lasts as long as the parameter, and a handle keeps
    neither of them alive. A copy of a handle (`copy.deepcopy`, pickle) is one of a freeze that has ended.

    Attributes:
        rows (`torch.Tensor` of shape `(num_rows,)`): bool, True where this freeze holds a row.
        holder (`Any`): What made the freeze, as it was passed to [`freeze_rows`].
    """

    def __init__(
        self,
        state: "_FrozenParameter | None" = None,
        rows: torch.Tensor | None = None,
        holder: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
    ):
        self._state = None if state is None else weakref.ref(state)
        self.rows = rows
        self.holder = holder
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)

    def __reduce__(self):
        return FrozenRows, ()

    def set_rows(self, rows: torch.Tensor) -> None:
        """
        Freeze other rows from now on. Gradients accumulated before are zeroed at the next step, but a clipping in
        between still counts them.

        Args:
            rows (`torch.Tensor` of shape `(num_rows,)`): bool, True where a row is frozen.

        Raises:
            `ValueError`: for a mask of another type or shape.
            `RuntimeError`: after [`~FrozenRows.remove`], or if the parameter is gone.
        """
        state = self._live_state()
        parameter = state.parameter()
        _check_rows(parameter, rows, state.dim)
        self.rows = rows.clone()
        state.unite()
        if not rows.all():
            state.allow_gradient(self)

    def frozen_by_others(self) -> torch.Tensor:
        """
        Rows that other freezes hold: bool, `(num_rows,)`. Raises `RuntimeError` after [`~FrozenRows.remove`], or if
        the parameter is gone.
        """
        state = self._live_state()
        others = [freeze.rows.to(state.mask.device) for freeze in state.freezes if freeze is not self]
        return torch.stack(others).any(0) if others else torch.zeros_like(state.mask)

    def remove(self) -> None:
        """
        End the freeze; do nothing if it has ended. A parameter that required no gradient because of it requires one
        again, if it did before.
        """
        state = None if self._state is None else self._state()
        if state is not None and self in state.freezes:
            state.remove(self)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise `RuntimeError` if the freeze is for the steps of another optimizer."""
        if self._optimizer is not None and self._optimizer() is not optimizer:
            raise RuntimeError(
                f"A {type(self.holder).__name__} that did not come to its end holds parameters that another "
                f"optimizer, a {type(optimizer).__name__}, is about to move. Call its `remove()`, or make a new one "
                "for the model."
            )

    def _live_state(self):
        state = None if self._state is None else self._state()
        if state is None or self not in state.freezes or state.parameter() is None:
            raise RuntimeError(
                "These rows are no longer frozen: `remove` was called, or the parameter is gone. Freeze them again."
            )
        return state


class _StatesOfModule(list):
    """
    The states of the frozen parameters of a module, one of its attributes. A freeze is of one parameter object: a copy
    of the module, by `copy.deepcopy` or pickle, gets an empty list.
    """

    def __reduce__(self):
        return list, ()


class _FrozenParameter:
    """
    All freezes of a parameter. The module holds it; it holds neither the module nor the parameter, so that both go,
    and their memory with them, without waiting for the garbage collector.
    """

    def __init__(self, module: nn.Module, name: str, dim: int):
        parameter = getattr(module, name)
        self.module, self.name, self.dim = weakref.ref(module), name, dim
        self.parameter = TensorWeakRef(parameter)
        self.freezes: list[FrozenRows] = []
        # The freezes that hold all rows, and whether the parameter required a gradient before the first of them.
        self.whole: list[FrozenRows] = []
        self.required_gradient = parameter.requires_grad
        self.mask = torch.empty(0, dtype=torch.bool)  # [num_rows], of all freezes together
        self.rows = torch.empty(0, dtype=torch.int64)  # indices of the frozen rows
        itself = weakref.ref(self)

        def after_backward(parameter):
            state = itself()
            if state is not None:
                state.zero(parameter.grad)

        parameter.requires_grad_(True)  # or torch takes no hook
        self.hook = parameter.register_post_accumulate_grad_hook(after_backward)
        parameter.requires_grad_(self.required_gradient)

    def add(self, freeze: FrozenRows) -> None:
        self.freezes.append(freeze)
        self.unite()
        if freeze.rows.all():
            parameter = self.parameter()
            if not self.whole:
                self.required_gradient = parameter.requires_grad
            self.whole.append(freeze)
            parameter.requires_grad_(False)

    def remove(self, freeze: FrozenRows) -> None:
        self.freezes.remove(freeze)
        self.allow_gradient(freeze)
        if self.freezes:
            self.unite()
            return
        self.hook.remove()
        _STEP_HOOKS.discard(self)
        module = self.module()
        if module is not None:
            module.__dict__[FROZEN_ROWS].remove(self)

    def allow_gradient(self, freeze: FrozenRows) -> None:
        """Let the parameter require a gradient, if it did before, once no freeze holds all of it."""
        if freeze in self.whole:
            self.whole.remove(freeze)
            parameter = self.parameter()
            if not self.whole and parameter is not None:
                parameter.requires_grad_(self.required_gradient)

    def unite(self) -> None:
        first, *others = (freeze.rows for freeze in self.freezes)
        self.mask = first.clone()
        for other in others:
            self.mask |= other.to(first.device)
        self.rows = self.mask.nonzero()[:, 0]

    @torch.no_grad()
    def zero(self, gradient: torch.Tensor) -> None:
        """Zero the frozen rows of a gradient in place, all columns of them that this process has."""
        gradient = _local(gradient)
        self._move_to(gradient.device)
        if isinstance(gradient, FactoredGradient):
            gradient.zero_rows(self.mask)
        elif gradient.is_sparse:
            values = gradient._values()
            frozen = self.mask[gradient._indices()[self.dim]]
            values.masked_fill_(frozen.view(-1, *[1] * (values.ndim - 1)), 0)
        else:
            gradient.index_fill_(self.dim, self.rows, 0)

    @torch.no_grad()
    def copy_of_rows(self, parameter: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]:
        """What to call `index_copy_` of to put frozen rows back, and its arguments, these rows among them."""
        parameter = _local(parameter)
        self._move_to(parameter.device)
        return parameter, self.dim, self.rows, parameter.detach().index_select(self.dim, self.rows)

    def _move_to(self, device):
        if self.mask.device != device:
            self.mask, self.rows = self.mask.to(device), self.rows.to(device)


def freeze_rows(
    module: nn.Module,
    name: str,
    rows: torch.Tensor,
    dim: int = 0,
    holder: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> FrozenRows:
    """
    Freeze rows of a module's parameter: they keep their values to the bit, whatever optimizer of torch steps on them.

    After each backward their gradient is zeroed in place, dense or in factors, so that a clipping does not count them
    (with DistributedDataParallel before the reduction: all ranks must freeze the same rows). A zero gradient alone
    does not hold a row, as weight decay and the momentum of earlier steps move it. [`RowAdamW`] leaves rows of row
    parameters alone where the gradient is zero, and so does plain SGD. For all other optimizers the frozen rows are
    copied before each step and put back after it, which takes their memory for the time of a step. The optimizer state
    of frozen rows decays meanwhile, except that of [`RowAdamW`].

    Besides, a row costs a byte for each freeze and one for all of them together, and a frozen row eight bytes. If all
    rows are frozen, the parameter requires no gradient until [`~FrozenRows.remove`]; freeze before
    DistributedDataParallel wraps the model. While anything in the process is frozen, the steps of all optimizers have
    a hook; it goes with the last freeze.

    A freeze is of this parameter object. A copy (`copy.deepcopy`, a checkpoint that is loaded) has none, and has to be
    frozen by itself. A step on another parameter that has taken the place of the frozen one in the module, as when
    FSDP shards the model, raises `RuntimeError`: it would move rows that were to be frozen.

    In a memory group, freeze rows of the tables after they are split, the same on all processes.

    Args:
        module (`nn.Module`): The module that holds the parameter.
        name (`str`): Name of the parameter in the module.
        rows (`torch.Tensor` of shape `(parameter.shape[dim],)`): bool, True where a row is frozen.
        dim (`int`, *optional*, defaults to 0): The dimension along which rows are counted.
        holder (`Any`, *optional*): What makes the freeze, to find it again with [`freezes_of`].
        optimizer (`torch.optim.Optimizer`, *optional*):
            The only optimizer that may move the parameter while the freeze lasts. Steps of all others on it raise
            `RuntimeError`. Any may if not given.

    Returns:
        [`FrozenRows`]: to end the freeze, or to freeze other rows.

    Raises:
        `ValueError`: for a mask of another type or shape, a parameter that FSDP2 or tensor parallelism splits over
            processes, or one with rows frozen along another dimension. The parameter is left as it was.
    """
    parameter = getattr(module, name)
    check_can_freeze(parameter)
    if not -parameter.ndim <= dim < parameter.ndim:
        raise ValueError(f"`dim` must be a dimension of the parameter, of shape {tuple(parameter.shape)}, got {dim}.")
    dim %= parameter.ndim
    _check_rows(parameter, rows, dim)
    state = next((state for state in _states_of(module) if state.parameter() is parameter), None)
    if state is None:
        state = _FrozenParameter(module, name, dim)
        module.__dict__[FROZEN_ROWS] = _StatesOfModule([*_states_of(module), state])
        _STEP_HOOKS.add(state)
    elif state.dim != dim:
        raise ValueError(f"`dim` must be {state.dim}, along which rows of this parameter are frozen, got {dim}.")
    freeze = FrozenRows(state, rows.clone(), holder, optimizer)
    state.add(freeze)
    return freeze


def freezes_of(module: nn.Module) -> list[FrozenRows]:
    """All freezes of rows of the module's own parameters, those of its submodules not among them."""
    return [freeze for state in _states_of(module) for freeze in state.freezes]


def require_gradients(parameters: Iterable[torch.Tensor], required: bool = True) -> None:
    """Call `requires_grad_(required)` of each parameter, such that the end of an earlier freeze does not undo it."""
    frozen = _STEP_HOOKS.states_by_parameter()
    for parameter in parameters:
        parameter.requires_grad_(required)
        if id(parameter) in frozen:
            frozen[id(parameter)].required_gradient = required


def check_can_freeze(parameter: torch.Tensor) -> None:
    """Raise `ValueError` if rows of the parameter cannot be frozen."""
    if not isinstance(parameter, nn.Parameter):
        raise ValueError(f"Rows of an `nn.Parameter` can be frozen, got a {type(parameter).__name__}.")
    # A process of a memory group has columns of every row, whose gradients nothing reduces.
    if dist.is_available() and isinstance(parameter, DTensor) and not is_split(parameter):
        raise ValueError(
            f"Rows of a parameter that FSDP2 or tensor parallelism splits over processes cannot be frozen, got one of "
            f"shape {tuple(parameter.shape)} with placements {parameter.placements}. Those of tables that a memory "
            "group splits can be, and all rows where DistributedDataParallel has the model."
        )


def _local(tensor):
    """The columns of this process of a table, or of its gradient, that a memory group splits."""
    # Without gradients, in which all of this runs, it is the tensor itself that a DTensor is made of.
    return tensor.to_local() if dist.is_available() and isinstance(tensor, DTensor) else tensor


def _states_of(module):
    # Not by `getattr`: wrappers of PEFT answer for what they wrap.
    return module.__dict__.get(FROZEN_ROWS, ())


def _check_rows(parameter, rows, dim):
    expected = (parameter.shape[dim],)
    if not isinstance(rows, torch.Tensor) or rows.dtype != torch.bool or rows.shape != expected:
        found = f"{rows.dtype} of shape {tuple(rows.shape)}" if isinstance(rows, torch.Tensor) else repr(rows)
        raise ValueError(f"`rows` must be a torch.bool tensor of shape {expected}, one for each row, got {found}.")


class _StepHooks:
    """
    The hooks on the steps of all optimizers, which are there while any parameter of the process has frozen rows.

    They are process-wide, as most optimizers are made after the freeze, by `Trainer` for one, and torch has no other
    hook that reaches them. So is the set of frozen parameters, for two things that no module, parameter or optimizer
    can know: that the last freeze has ended, and which module held a frozen parameter in whose place FSDP has put
    another, from which nothing leads back to the module. Its references are weak.
    """

    def __init__(self):
        self._references: set[weakref.ref[_FrozenParameter]] = set()
        self._handles: list[RemovableHandle] = []
        self._running = False

    def add(self, state: _FrozenParameter) -> None:
        self._references.add(weakref.ref(state, self._forget))
        if not self._handles:
            self._handles = [
                register_optimizer_step_pre_hook(self._before_step),
                register_optimizer_step_post_hook(self._after_step),
            ]

    def discard(self, state: _FrozenParameter) -> None:
        self._forget(weakref.ref(state))

    def states_by_parameter(self) -> dict[int, _FrozenParameter]:
        """The states of all frozen parameters that are alive, by the `id` of the parameter."""
        states = ((state.parameter(), state) for state in self._states())
        return {id(parameter): state for parameter, state in states if parameter is not None}

    def _states(self):
        states = (reference() for reference in list(self._references))
        return [state for state in states if state is not None]

    def _forget(self, reference):
        self._references.discard(reference)
        # The garbage collector may come here in the midst of a hook, while torch iterates over its hooks. They stay
        # then, and go with the next freeze that ends.
        if not self._references and not self._running:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def _before_step(self, optimizer, args, kwargs):
        self._running = True
        try:
            saved = self._rows_to_put_back(optimizer, with_closure=len(args) > 1 or kwargs.get("closure") is not None)
        finally:
            self._running = False
        # A stack, as a step may call that of a parent class. It has an entry for each step, also an empty one, so that
        # the entry that a failed step leaves is not taken for that of the next.
        optimizer.__dict__.setdefault(SAVED_ROWS, []).append(saved)

    def _rows_to_put_back(self, optimizer, with_closure):
        saved: list[tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]] = []
        frozen = self.states_by_parameter()
        standing = [(state.module(), state.name) for state in self._states()]
        weights = [module._parameters.get(name) for module, name in standing if module is not None]
        replaced = {id(weight) for weight in weights if weight is not None and id(weight) not in frozen}
        # The first FSDP, without `use_orig_params`, takes parameters out of their modules into a flat one.
        taken_out = any(weight is None for weight in weights)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in replaced or (taken_out and is_flat_parameter(parameter)):
                    raise RuntimeError(
                        "Rows of an expert table were frozen, and another parameter has taken its place since, of "
                        f"shape {tuple(parameter.shape)} ({type(parameter.data).__name__}). Freeze its rows again; "
                        "where FSDP or tensor parallelism splits them, they cannot be frozen."
                    )
                state = frozen.get(id(parameter))
                if state is None:
                    continue
                for freeze in state.freezes:
                    freeze.check_optimizer(optimizer)
                if parameter.grad is None and not with_closure:
                    continue
                if parameter.grad is not None:
                    # Clipping by a norm that is not finite leaves no zeros, and a gradient may have been set by hand.
                    state.zero(parameter.grad)
                if not _needs_gradient_to_move(optimizer, group, parameter, state.dim):
                    saved.append(state.copy_of_rows(parameter))
        return saved

    @torch.no_grad()
    def _after_step(self, optimizer, args, kwargs):
        steps = optimizer.__dict__.get(SAVED_ROWS)
        if not steps:  # the step began before the first freeze
            return
        self._running = True
        try:
            for parameter, dim, rows, values in steps.pop():
                parameter.index_copy_(dim, rows, values)
        finally:
            self._running = False


def _needs_gradient_to_move(optimizer, group, parameter, dim):
    """Whether a step of this optimizer leaves rows whose gradient is zero as they are, to the bit."""
    if isinstance(optimizer, RowAdamW):
        return dim == 0 and optimizer.moves_by_rows(parameter, group)
    return type(optimizer) is torch.optim.SGD and not any(map(group.get, ("momentum", "weight_decay", "maximize")))


_STEP_HOOKS = _StepHooks()
