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
"""Rows of a parameter that no training moves, to the bit, whatever the optimizer."""

import itertools
import weakref
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from .row_adamw import RowAdamW


if dist.is_available():
    from torch.distributed.tensor import DTensor


class FrozenRows:
    """
    One cause for which rows of a parameter are frozen, as [`freeze_rows`] returns it. A row is frozen as long as any cause
    freezes it. A cause that is forgotten lasts as long as the parameter.
    """

    def __init__(self, parameter: torch.Tensor, rows: torch.Tensor, dim: int, owner: nn.Module | None):
        self.parameter = parameter
        self._key = next(_KEYS)
        state = _FROZEN.get(parameter)
        if state is None:
            state = _FROZEN[parameter] = _FrozenRowsOfParameter(parameter, dim)
        state.masks[self._key] = rows.clone()
        state.unite()
        if rows.all():
            state.stop_gradient(parameter, self._key)
        if owner is not None:
            key = self._key
            (name,) = (name for name, each in owner.named_parameters(recurse=False) if each is parameter)
            _OWNERS[key] = (weakref.ref(owner, lambda _: _OWNERS.pop(key, None)), name, weakref.ref(parameter))

    def set_rows(self, rows: torch.Tensor) -> None:
        """
        Freezes other rows from now on. Gradients that were accumulated before are held back at the next step, but already
        counted by a clipping between.

        Args:
            rows (`torch.Tensor` of shape `(num_rows,)`): bool, True where a row is frozen.

        Raises:
            `ValueError`: for a mask of another type or size.
        """
        state = self._state()
        _check_rows(self.parameter, rows, state.dim)
        state.masks[self._key] = rows.clone()
        state.unite()
        if not rows.all():
            state.allow_gradient(self.parameter, self._key)

    def frozen_by_others(self) -> torch.Tensor:
        """Which rows other causes freeze: bool, `(num_rows,)`."""
        state = self._state()
        masks = [mask.to(state.mask.device) for key, mask in state.masks.items() if key != self._key]
        return torch.stack(masks).any(0) if masks else torch.zeros_like(state.mask)

    def remove(self) -> None:
        """Ends this cause. What it stopped from requiring a gradient requires one again, if it did before."""
        _OWNERS.pop(self._key, None)
        state = _FROZEN.get(self.parameter)
        if state is None or self._key not in state.masks:
            return
        del state.masks[self._key]
        state.allow_gradient(self.parameter, self._key)
        if state.masks:
            state.unite()
        else:
            state.hook.remove()
            del _FROZEN[self.parameter]

    def _state(self):
        state = _FROZEN.get(self.parameter)
        if state is None or self._key not in state.masks:
            raise RuntimeError("These rows are frozen no more: `remove` was called.")
        return state


class _FrozenRowsOfParameter:
    """All causes of one parameter. It holds no reference to the parameter, which is the weak key to it."""

    def __init__(self, parameter, dim):
        self.dim = dim
        self.masks = {}
        # The causes that freeze all of it, and whether it required a gradient before the first of them.
        self.whole = set()
        self.required_gradient = parameter.requires_grad
        parameter.requires_grad_(True)  # or torch takes no hook
        self.hook = parameter.register_post_accumulate_grad_hook(self._after_backward)
        parameter.requires_grad_(self.required_gradient)

    def unite(self):
        """`mask [num_rows]`, and the numbers of the frozen `rows`."""
        first, *others = self.masks.values()
        self.mask = first.clone()
        for other in others:
            self.mask |= other.to(first.device)
        self.rows = self.mask.nonzero()[:, 0]

    def move_to(self, device):
        if self.mask.device != device:
            self.mask, self.rows = self.mask.to(device), self.rows.to(device)

    def stop_gradient(self, parameter, key):
        if not self.whole:
            self.required_gradient = parameter.requires_grad
        self.whole.add(key)
        parameter.requires_grad_(False)

    def allow_gradient(self, parameter, key):
        if key in self.whole:
            self.whole.remove(key)
            if not self.whole:
                parameter.requires_grad_(self.required_gradient)

    def _after_backward(self, parameter):
        self.zero(parameter.grad)

    @torch.no_grad()
    def zero(self, gradient):
        """Zeroes the frozen rows of a gradient in place."""
        self.move_to(gradient.device)
        if gradient.is_sparse:
            values = gradient._values()
            frozen = self.mask[gradient._indices()[self.dim]]
            values.masked_fill_(frozen.view(-1, *[1] * (values.ndim - 1)), 0)
        else:
            gradient.index_fill_(self.dim, self.rows, 0)

    def copy_of_rows(self, parameter):
        """What [`_put_back`] takes."""
        self.move_to(parameter.device)
        return parameter, self.dim, self.rows, parameter.detach().index_select(self.dim, self.rows)


_KEYS = itertools.count()
_FROZEN = WeakTensorKeyDictionary()
# By the key of a cause: the module whose parameter is frozen, the name it has there, and the parameter.
_OWNERS: dict[int, tuple[weakref.ref, str, weakref.ref]] = {}
# Of each optimizer in the midst of a step, what to put back; a stack, as a step may call that of a parent class.
_SAVED: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[list]] = weakref.WeakKeyDictionary()


def freeze_rows(
    parameter: torch.Tensor, rows: torch.Tensor, dim: int = 0, owner: nn.Module | None = None
) -> FrozenRows:
    """
    Freezes rows of a parameter: they stay as they are to the bit, whatever optimizer of torch steps on the parameter.

    After each backward their gradient is zeroed in place, dense or row-sparse, so that a clipping does not count them (with
    DistributedDataParallel before the reduction: all ranks must freeze the same). A zero gradient alone holds no row, as
    weight decay and the momentum of earlier steps move it: [`RowAdamW`] leaves row parameters alone where the gradient is
    zero, and so does plain SGD; for all other optimizers, what the rows were is copied before each step and put back
    after it. That takes the memory of the frozen rows for the time of a step. The moments of frozen rows decay meanwhile,
    but those of [`RowAdamW`].

    Besides, a row costs a byte for each cause and one for all, and a frozen row eight bytes. If all rows are frozen, the
    parameter requires no gradient until [`~FrozenRows.remove`]; do that before DistributedDataParallel wraps the model.

    The freeze is of this parameter object: not of a copy (`copy.deepcopy`, a checkpoint that is loaded), where it has to
    be said again.

    Args:
        parameter (`nn.Parameter`)
        rows (`torch.Tensor` of shape `(parameter.shape[dim],)`): bool, True where a row is frozen.
        dim (`int`, *optional*, defaults to 0): The dimension along which rows are counted.
        owner (`nn.Module`, *optional*):
            The module whose parameter it is. A step on another parameter that has taken its place, when FSDP shards the
            model for one, raises `RuntimeError` then, rather than move what was to be frozen.

    Returns:
        [`FrozenRows`]: to undo it, or to freeze other rows.

    Raises:
        `ValueError`: for a mask of another type or size, a parameter that is split over processes, or one with rows frozen
            along another dimension. The parameter is left as it was.
    """
    check_can_freeze(parameter)
    if not -parameter.ndim <= dim < parameter.ndim:
        raise ValueError(f"`dim` must be a dimension of the parameter, of shape {tuple(parameter.shape)}, got {dim}.")
    dim %= parameter.ndim
    _check_rows(parameter, rows, dim)
    state = _FROZEN.get(parameter)
    if state is not None and state.dim != dim:
        raise ValueError(f"`dim` must be {state.dim}, along which rows of this parameter are frozen, got {dim}.")
    return FrozenRows(parameter, rows, dim, owner)


def require_gradients(parameters: Iterable[torch.Tensor], required: bool = True) -> None:
    """`requires_grad_(required)` of each parameter, of which the end of an earlier freeze takes nothing back."""
    for parameter in parameters:
        parameter.requires_grad_(required)
        if parameter in _FROZEN:
            _FROZEN[parameter].required_gradient = required


def check_can_freeze(parameter: torch.Tensor) -> None:
    """Raises `ValueError` if rows of the parameter cannot be frozen."""
    if not isinstance(parameter, nn.Parameter):
        raise ValueError(f"Rows of an `nn.Parameter` can be frozen, got a {type(parameter).__name__}.")
    if dist.is_available() and isinstance(parameter, DTensor):
        raise ValueError(
            f"Rows of a parameter that FSDP2 or tensor parallelism splits over processes cannot be frozen, got one of shape "
            f"{tuple(parameter.shape)} with placements {parameter.placements}. DistributedDataParallel works."
        )


def _check_rows(parameter, rows, dim):
    expected = (parameter.shape[dim],)
    if not isinstance(rows, torch.Tensor) or rows.dtype != torch.bool or rows.shape != expected:
        found = f"{rows.dtype} of shape {tuple(rows.shape)}" if isinstance(rows, torch.Tensor) else repr(rows)
        raise ValueError(f"`rows` must be a torch.bool tensor of shape {expected}, one for each row, got {found}.")


def _before_step(optimizer, args, kwargs):
    # One entry for each step, so that one that failed, whose entry is left, is not taken for the next.
    saved: list = []
    _SAVED.setdefault(optimizer, []).append(saved)
    if not _FROZEN and not _OWNERS:
        return
    replaced = {id(weight) for weight in _replaced_weights()}
    with_closure = len(args) > 1 or kwargs.get("closure") is not None
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in replaced or (_is_flat(parameter) and _owners_without_weight()):
                raise RuntimeError(
                    "Rows of an expert table were frozen, and another parameter has taken its place since, of shape "
                    f"{tuple(parameter.shape)} ({type(parameter.data).__name__}). Freeze its rows again; where FSDP or "
                    "tensor parallelism splits them, they cannot be frozen."
                )
            state = _FROZEN.get(parameter)
            if state is None or (parameter.grad is None and not with_closure):
                continue
            if parameter.grad is not None:
                # A clipping by a norm that is not a number leaves no zero, and a gradient may have been set by hand.
                state.zero(parameter.grad)
            if not _needs_gradient_to_move(optimizer, group, parameter, state.dim):
                saved.append(state.copy_of_rows(parameter))


def _after_step(optimizer, args, kwargs):
    if not _SAVED.get(optimizer):
        return
    with torch.no_grad():
        for parameter, dim, rows, values in _SAVED[optimizer].pop():
            parameter.index_copy_(dim, rows, values)


def _replaced_weights():
    """Weights that stand, with no row frozen, where a frozen one stood."""
    for owner_reference, name, frozen in list(_OWNERS.values()):
        owner = owner_reference()
        weight = None if owner is None else owner._parameters.get(name)
        if weight is not None and weight is not frozen() and weight not in _FROZEN:
            yield weight


def _is_flat(parameter):
    """Whether it holds all that the first FSDP, without `use_orig_params`, takes out of modules."""
    return getattr(parameter, "_is_flat_param", False)


def _owners_without_weight():
    owners = [(owner(), name) for owner, name, _ in _OWNERS.values()]
    return [owner for owner, name in owners if owner is not None and owner._parameters.get(name) is None]


def _needs_gradient_to_move(optimizer, group, parameter, dim):
    """Whether a step of this optimizer leaves rows whose gradient is zero to the bit as they are."""
    if isinstance(optimizer, RowAdamW):
        return dim == 0 and optimizer.moves_by_rows(parameter, group)
    return type(optimizer) is torch.optim.SGD and not any(map(group.get, ("momentum", "weight_decay", "maximize")))


# For all optimizers, of which most are made after the freeze: `Trainer` makes its own.
register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
