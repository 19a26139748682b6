# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Frozen rows of a parameter, which stay the same to the bit with any optimizer."""

import functools
import weakref

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import TensorWeakRef

from ..ops.factored_gradient import FactoredGradient
from .row_adamw import RowAdamW


# Attribute of an optimizer with the frozen rows that its running steps will restore.
SAVED_ROWS = "_frozen_rows_before_step"


class FrozenRows:
    """
    Handle of one freeze, as [`freeze_rows`] returns it. A row is frozen as long as any freeze of the parameter holds
    it, and a freeze lasts as long as the parameter, also if its handle is dropped. A copy of a handle acts as if its
    freeze had ended.

    Attributes:
        rows (`torch.Tensor` of shape `(num_rows,)`): bool, True where this freeze holds a row.
    """

    def __init__(self, parameter: nn.Parameter, name: str, dim: int, optimizer: torch.optim.Optimizer | None):
        # The handle keeps neither the parameter nor the module alive.
        self.parameter, self.name, self.dim = TensorWeakRef(parameter), name, dim
        self.optimizer = None if optimizer is None else weakref.ref(optimizer)
        self.took_gradient = False  # whether the parameter requires no gradient because of it
        requires_gradient = parameter.requires_grad
        parameter.requires_grad_(True)  # or torch takes no hook
        self._hook = parameter.register_post_accumulate_grad_hook(lambda parameter: self.zero(parameter.grad))
        parameter.requires_grad_(requires_gradient)

    def set_rows(self, rows: torch.Tensor) -> None:
        """
        Freeze other rows from now on: bool, `(num_rows,)`. Gradients accumulated before are zeroed at the next step,
        but a clipping in between still counts them. Raises `RuntimeError` after [`~FrozenRows.remove`].
        """
        parameter = self.parameter()
        if parameter is None or self not in _every_freeze():
            raise RuntimeError("These rows are no longer frozen: the freeze was removed, or the parameter is gone.")
        self.rows, self._indices = rows.clone(), rows.nonzero()[:, 0]
        if self.took_gradient and not rows.all():
            parameter.requires_grad_(True)

    def remove(self) -> None:
        """
        End the freeze; do nothing if it has ended. A parameter that requires no gradient because of it requires one
        again.
        """
        for freezes in _FREEZES.values():
            if self in freezes:
                freezes.remove(self)
                self._hook.remove()
                parameter = self.parameter()
                if self.took_gradient and parameter is not None:
                    parameter.requires_grad_(True)

    @torch.no_grad()
    def zero(self, gradient: torch.Tensor) -> None:
        """Zero the frozen rows of a gradient in place, in all columns that this process has."""
        gradient = self._local(gradient)
        if isinstance(gradient, FactoredGradient) and self.dim == 0:
            gradient.zero_rows(self.rows)
        else:
            gradient.index_fill_(self.dim, self._indices, 0)

    @torch.no_grad()
    def copy_of_rows(self, parameter: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]:
        """Return the tensor whose `index_copy_` restores frozen rows, and its arguments, with a copy of the rows."""
        parameter = self._local(parameter)
        return parameter, self.dim, self._indices, parameter.detach().index_select(self.dim, self._indices)

    def _local(self, tensor):
        """Return this process's columns of a table, or of its gradient, that a memory group splits."""
        self.rows, self._indices = self.rows.to(tensor.device), self._indices.to(tensor.device)
        # With gradients disabled, as in all callers, this is the tensor itself of which a DTensor is made.
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# The freezes of the parameters of each module; a copy of a module has none.
_FREEZES: weakref.WeakKeyDictionary[nn.Module, list[FrozenRows]] = weakref.WeakKeyDictionary()


def freeze_rows(
    module: nn.Module, name: str, rows: torch.Tensor, dim: int = 0, optimizer: torch.optim.Optimizer | None = None
) -> FrozenRows:
    """
    Freeze rows of a module's parameter: they keep their values to the bit, whatever optimizer of torch steps on them.

    After each backward their gradient is zeroed in place, so that a clipping does not count them. All ranks must
    freeze the same rows. [`RowAdamW`] leaves rows of row parameters alone where the gradient is zero, and so does
    plain SGD. For all other optimizers, whose weight decay and momentum move them, the frozen rows are copied before
    each step and put back after it, which takes their memory for the time of a step. Sparse gradients are not
    supported.

    If all rows are frozen, a parameter that requires a gradient requires none until [`~FrozenRows.remove`]. It then
    requires one again, whatever was set since. Freeze before DistributedDataParallel wraps the model. A freeze applies
    to this parameter object: copies of it and loaded checkpoints have none. If another parameter has taken its place
    in the module, a step on that raises `RuntimeError`. In a memory group, freeze rows of tables after they are split.

    Args:
        module (`nn.Module`): The module that holds the parameter.
        name (`str`): Name of the parameter in the module.
        rows (`torch.Tensor` of shape `(parameter.shape[dim],)`): bool, True where a row is frozen.
        dim (`int`, *optional*, defaults to 0): The dimension along which rows are counted, from 0 on.
        optimizer (`torch.optim.Optimizer`, *optional*):
            The only optimizer that may move the parameter while the freeze lasts. Steps of all others on it raise
            `RuntimeError`. Any may if not given.

    Returns:
        [`FrozenRows`]: to end the freeze, or to freeze other rows.

    Raises:
        `ValueError`: for a quantized parameter, or one that FSDP2 or tensor parallelism splits over processes.
    """
    parameter = getattr(module, name)
    check_can_freeze(parameter)
    _hold_rows_in_steps()
    freeze = FrozenRows(parameter, name, dim, optimizer)
    if rows.all():
        freeze.took_gradient = parameter.requires_grad
        parameter.requires_grad_(False)
    _FREEZES.setdefault(module, []).append(freeze)
    freeze.set_rows(rows)
    return freeze


def freezes_of(module: nn.Module) -> list[FrozenRows]:
    """Return all freezes of rows of the module's own parameters, without those of its submodules."""
    return list(_FREEZES.get(module, ()))


def check_can_freeze(parameter: torch.Tensor) -> None:
    """Raise `ValueError` if rows of the parameter cannot be frozen."""
    if not parameter.is_floating_point():
        raise ValueError(f"Quantized tables are not trained: there is nothing to freeze in one of {parameter.dtype}.")
    # A process of a memory group has columns of every row, whose gradients nothing reduces.
    if isinstance(parameter, DTensor) and parameter.device_mesh.mesh_dim_names != ("ep",):
        raise ValueError(
            "Rows of a parameter that FSDP2 or tensor parallelism splits over processes cannot be frozen, got one "
            f"with placements {parameter.placements}. Those of tables that a memory group splits can be."
        )


def _every_freeze():
    return [freeze for freezes in list(_FREEZES.values()) for freeze in freezes]


@functools.cache
def _hold_rows_in_steps():
    """Register global hooks once per process: most optimizers are made after a freeze, and only these reach them."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer, args, kwargs):
    saved = []
    with_closure = kwargs.get("closure", args[1] if len(args) > 1 else None) is not None  # Accelerate passes None
    groups = {id(each): group for group in optimizer.param_groups if _FREEZES for each in group["params"]}
    others = groups.keys() - {id(freeze.parameter()) for freeze in _every_freeze()}
    for module, freezes in list(_FREEZES.items()):
        for freeze in freezes:
            parameter, current = freeze.parameter(), module._parameters.get(freeze.name)
            # FSDP1 without `use_orig_params` leaves no parameter.
            if id(current) in others or (current is None and parameter is None):
                raise RuntimeError("Rows were frozen, and another parameter has taken its place. Freeze them again.")
            group = groups.get(id(parameter))
            if group is None:
                continue
            if freeze.optimizer is not None and freeze.optimizer() is not optimizer:
                raise RuntimeError(
                    "Rows of a parameter are frozen for the steps of another optimizer, by a training that did not "
                    "end. Call `remove()` of the callback that froze them, or make a new callback for the model."
                )
            if parameter.grad is not None:
                # Clipping by a norm that is not finite leaves no zeros, and a gradient may have been set by hand.
                freeze.zero(parameter.grad)
            moves = parameter.grad is not None or with_closure
            # A closure may leave a gradient that is not finite.
            if moves and (with_closure or not _leaves_rows_without_gradient(optimizer, group, freeze.dim)):
                saved.append(freeze.copy_of_rows(parameter))
    # A stack, as a step may call that of a parent class. Every step pushes an entry, even an empty one, so that it
    # does not take the entry that a failed step left.
    optimizer.__dict__.setdefault(SAVED_ROWS, []).append(saved)


@torch.no_grad()
def _after_step(optimizer, args, kwargs):
    # There is no entry if the step began before the first freeze.
    for parameter, dim, indices, values in (optimizer.__dict__.get(SAVED_ROWS) or [[]]).pop():
        parameter.index_copy_(dim, indices, values)


def _leaves_rows_without_gradient(optimizer, group, dim):
    """Whether a step of this optimizer leaves rows whose gradient is zero as they are, to the bit."""
    if isinstance(optimizer, RowAdamW):
        return dim == 0 and group["rows"]
    return type(optimizer) is torch.optim.SGD and not any(map(group.get, ("momentum", "weight_decay", "maximize")))
