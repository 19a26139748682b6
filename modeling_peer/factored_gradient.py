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
The gradient of an expert table as the factors of which it is the sum (see `gradient_factors.py`), from backward to the
optimizer.

A table's gradient comes in factors once an optimizer that takes them was made for it (see [`take_factors`]). It is
then a [`FactoredGradient`], a tensor of the table's shape that does what accumulation, clipping, gradient scalers and
freezing need on the factors. Any other operation on it computes the dense gradient; what it writes, and what is
written through a view that it makes, such as a range of rows, is the gradient from then on.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.utils import logging

from .expert_kernels import PLAIN_TENSORS
from .gradient_factors import Factors, factors_of_rows
from .library_releases import tree_map


logger = logging.get_logger(__name__)

aten = torch.ops.aten

# The attribute of a table under which it is noted which optimizer takes its factors.
TAKER = "_optimizer_of_factors"

# The attribute of an optimizer that holds the outlets of the tables whose factors it takes.
OUTLETS = "_outlets_of_tables"

# What is said about dense gradients: of tables from this size on; how often a step reads or writes as many bytes as
# the table has (the gradient zeroed, summed, its norm, clipped, read; weights and two moments read and written); and
# how many bytes a second are moved, two cores or a GPU, in round numbers.
LEAST_BYTES_TO_ADVISE_ON = 2**24
DENSE_PASSES = 12
BYTES_PER_SECOND = {"cpu": 1e10, "cuda": 2e12}

# Factors may take this much more memory than the rows that they sum to, before they are summed.
MOST_FACTORS = 2.0


class _Parts(list[Factors]):
    """The factors that a gradient shares with what is detached from it."""

    # Whether there may be views of the tokens of the first part, which are the rows that it is of.
    has_views = False


class FactoredGradient(torch.Tensor):
    """
    The gradient of an expert table, of its shape and dtype, as a sum of [`Factors`]. See the module's docstring.

    Sums are accumulated in float32, in float64 for a float64 table, whatever the dtype of the table.
    """

    _factors: _Parts

    @staticmethod
    def __new__(cls, table: torch.Tensor, factors: list[Factors]):
        """
        Args:
            table (`torch.Tensor` of shape `(num_rows, width)`): The table, or its gradient.
            factors (`list[Factors]`): Those of another gradient are shared with it.
        """
        # A view has the version counter of nothing: what autograd saves of a gradient, it saves as it is.
        self = torch.Tensor._make_wrapper_subclass(cls, table.shape, dtype=table.dtype, device=table.device)
        self._factors = factors if isinstance(factors, _Parts) else _Parts(factors)
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        tokens = sum(len(each.tokens) for each in self._factors)
        return f"FactoredGradient(shape={tuple(self.shape)}, dtype={self.dtype}, num_tokens={tokens})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return memo.setdefault(id(self), self.to_rows())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.to_rows().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        handler = _HANDLERS.get(operator)
        result = NotImplemented if handler is None else handler(*args, **(kwargs or {}))
        return _on_rows(operator, args, kwargs or {}) if result is NotImplemented else result

    @property
    def factors(self) -> Factors | None:
        """All factors joined, as those of one backward; `None` if no entry names a row."""
        self._factors[:] = [each for each in self._factors if each.coefficients.numel()]
        if not self._factors:
            return None
        if len(self._factors) > 1:
            self.set_factors([Factors.joined(self._factors)])
        return self._factors[0]

    def to_rows(self) -> torch.Tensor:
        """The dense gradient, `(num_rows, width)`."""
        factors = self.factors
        if factors is None:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return factors.to_rows(self.dtype)

    def viewed_rows(self) -> torch.Tensor | None:
        """The rows of which this gradient consists, if it does: there may be views of them."""
        return self._factors[0].tokens if self._factors.has_views and len(self._factors) == 1 else None

    def become_rows(self) -> None:
        """
        Become the dense gradient, each row of it a token: what is written to views of the rows is written to this
        gradient, until it is next changed on factors.
        """
        if self.viewed_rows() is None:
            self.set_factors([factors_of_rows(self.to_rows())])
            self._factors.has_views = True

    def copied_factors(self) -> list[Factors]:
        """The factors for another gradient, which does not change with the views of this one."""
        if (rows := self.viewed_rows()) is None:
            return list(self._factors)
        return [factors_of_rows(rows.clone())]

    def total_norm(self, order: float = 2.0) -> torch.Tensor:
        """The norm of all elements, at least in float32, `()`. No row is written for `order=2.0`."""
        factors = self.factors
        dtype = torch.promote_types(self.dtype, torch.float32)
        if factors is None:
            return torch.zeros((), dtype=dtype, device=self.device)
        if order == 2.0:
            return factors.entries.kernels.squared_norm(*factors.in_groups()).sqrt().to(dtype)
        return torch.linalg.vector_norm(self.to_rows().to(dtype), order)

    def is_finite(self) -> torch.Tensor:
        """Whether all factors are finite, and so the rows that they sum to: bool, `()`."""
        finite = [torch.isfinite(part).all() for each in self._factors for part in (each.coefficients, each.tokens)]
        return torch.stack(finite).all() if finite else torch.ones((), dtype=torch.bool, device=self.device)

    def scale(self, factor: float | torch.Tensor) -> None:
        """Multiply by a number in place."""
        self.set_factors([each.scaled(factor) for each in self._factors])

    def zero_rows(self, rows: torch.Tensor) -> None:
        """Zero rows in place: bool, `(num_rows,)`."""
        self.set_factors([each.without(rows) for each in self._factors])

    def set_factors(self, factors: Sequence[Factors]) -> None:
        """Become the sum of these factors."""
        self._factors[:] = factors
        self._factors.has_views = False

    def add_factors(self, others: Sequence[Factors]) -> None:
        """Add in place. Factors that take much more memory than the rows that they sum to are summed."""
        self._factors.extend(others)
        size = sum(each.nbytes for each in self._factors)
        entries = sum(each.coefficients.numel() for each in self._factors)
        rows = min(entries, self.shape[0]) * self.shape[1] * max(torch.float32.itemsize, self.dtype.itemsize)
        if len(self._factors) > 1 and size > MOST_FACTORS * rows:
            factors = self.factors
            self.set_factors([] if factors is None else [factors.summed()])


def take_factors(table: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """
    Let the gradient of a table come in factors, as long as the optimizer lives.

    It is noted on the table, where the backward finds it; copies of the table do not have it.
    """
    if (taker := taker_of(table)) is None or taker.optimizer() is not optimizer:
        setattr(table, TAKER, _Taker(optimizer))


def let_follow(table: torch.Tensor, local: torch.Tensor) -> None:
    """Let the gradient of a process's part of a table come in factors if that of the table does."""
    if takes_factors(table):
        setattr(local, TAKER, getattr(table, TAKER))


def taker_of(table: torch.Tensor) -> "_Taker | None":
    """What was noted by [`take_factors`]. Its optimizer may be gone."""
    taker = getattr(table, TAKER, None)
    return taker if isinstance(taker, _Taker) else None


@torch.compiler.assume_constant_result
def takes_factors(table: torch.Tensor) -> bool:
    """Whether there is an optimizer that takes the gradient of a table in factors."""
    taker = taker_of(table)
    return taker is not None and taker.optimizer() is not None


def advise_on_dense_gradient(table: torch.Tensor) -> None:
    """Say once what the dense gradient of a large table costs, and how to avoid it."""
    if type(table) in PLAIN_TENSORS and table.nbytes >= LEAST_BYTES_TO_ADVISE_ON:  # a tracer's have no bytes
        moved = DENSE_PASSES * table.nbytes
        rate = BYTES_PER_SECOND.get(table.device.type, BYTES_PER_SECOND["cuda"])
        logger.warning_once(
            f"The gradient of an expert table of shape {tuple(table.shape)} is dense: it takes "
            f"{table.nbytes / 2**20:,.0f} MB, and a step with it moves some {moved / 2**20:,.0f} MB, about "
            f"{1000 * moved / rate:,.0f} ms for this table. An optimizer that takes the gradient in factors touches "
            "retrieved experts alone: `Trainer(model, args, ..., optimizers=(make_optimizer(model, args), None))` "
            "with `from modeling_peer import make_optimizer`."
        )


class Outlet:
    """
    Where the gradient of a table leaves a graph, see `gradient_outlet.py`, which makes the tensor once a graph needs
    it, for the dtype and the device that the table has then.
    """

    tensor: torch.Tensor | None = None
    dtype: torch.dtype | None = None
    device: torch.device | None = None


class _Taker:
    """
    Weak references to an optimizer and to the outlet of a table. Of a table that is pickled, an empty dictionary
    remains of it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        outlet = Outlet()
        # The outlet leads to the table through autograd, where no garbage collector sees it: the table must not hold
        # the outlet.
        vars(optimizer).setdefault(OUTLETS, []).append(outlet)
        self.optimizer, self.outlet = weakref.ref(optimizer), weakref.ref(outlet)

    def __reduce__(self):
        return OrderedDict, ()


def _is_factored(*values):
    return all(isinstance(value, FactoredGradient) for value in values)


def _is_number(value):
    return isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.dim() == 0)


def _detach(gradient):
    return FactoredGradient(gradient, gradient._factors)


def _view(gradient, shape):
    return _detach(gradient) if tuple(shape) == tuple(gradient.shape) else NotImplemented


def _clone(gradient, *, memory_format=None):
    return FactoredGradient(gradient, gradient.copied_factors())


def _new_empty_strided(gradient, size, stride, *, dtype=None, **kwargs):
    # Autograd copies a gradient into it if strides are not those of the parameter, as of a table that does not divide
    # by the number of processes.
    if tuple(size) != tuple(gradient.shape) or dtype not in (None, gradient.dtype):
        return NotImplemented
    return FactoredGradient(gradient, [])


def _add_(gradient, other, *, alpha=1):
    if not _is_factored(gradient, other):
        return NotImplemented
    factors = other.copied_factors()
    gradient.add_factors(factors if alpha == 1 else [each.scaled(alpha) for each in factors])
    return gradient


def _add(gradient, other, *, alpha=1):
    return _add_(_clone(gradient), other, alpha=alpha) if _is_factored(gradient, other) else NotImplemented


def _copy_(gradient, other, non_blocking=False):
    if not _is_factored(gradient, other):
        return NotImplemented
    gradient.set_factors(other.copied_factors())
    return gradient


def _zero_(gradient):
    gradient.set_factors([])
    return gradient


def _mul_(gradient, factor):
    if not _is_factored(gradient) or not _is_number(factor):
        return NotImplemented
    gradient.scale(factor)
    return gradient


def _div_(gradient, divisor):
    if not _is_factored(gradient) or not _is_number(divisor):
        return NotImplemented
    gradient.scale(1 / divisor)
    return gradient


def _mul(gradient, factor):
    if not _is_factored(gradient):
        gradient, factor = factor, gradient
    return _mul_(_clone(gradient), factor) if _is_number(factor) else NotImplemented


def _div(gradient, divisor):
    return _div_(_clone(gradient), divisor) if _is_factored(gradient) else NotImplemented


def _vector_norm(gradient, ord=2, dim=None, keepdim=False, *, dtype=None):
    if dim is not None or keepdim:
        return NotImplemented
    return gradient.total_norm(float(ord)).to(dtype or torch.promote_types(gradient.dtype, torch.float32))


def _foreach(operator: Any, single: Callable) -> Callable:
    """A handler of a list of tensors some of which are factored: these one by one, the others as before."""
    returns_nothing = not operator._schema.returns

    def handle(tensors, *args, **kwargs):
        if any(isinstance(each, (list, tuple)) for each in args):
            return NotImplemented
        dense = [each for each in tensors if not _is_factored(each)]
        results = iter((operator(dense, *args, **kwargs) if dense else ()) or ())
        found = [single(each, *args, **kwargs) if _is_factored(each) else next(results, None) for each in tensors]
        if any(each is NotImplemented for each in found):
            return NotImplemented
        return None if returns_nothing else found

    return handle


def _unscale_(gradients, found_inf, inverse_scale):
    """As gradient scalers call it: `found_inf` becomes 1 if an element is infinite or NaN, and all are unscaled."""
    dense = [each for each in gradients if not _is_factored(each)]
    if dense:
        aten._amp_foreach_non_finite_check_and_unscale_(dense, found_inf, inverse_scale)
    for gradient in filter(_is_factored, gradients):
        found_inf.copy_(torch.maximum(found_inf, (~gradient.is_finite()).to(found_inf)))
        gradient.scale(inverse_scale)


# By operator: what is done on factors.
_SINGLE: dict[str, Callable] = {
    "detach.default": _detach,
    "alias.default": _detach,
    "view.default": _view,
    "clone.default": _clone,
    "new_empty_strided.default": _new_empty_strided,
    "add.Tensor": _add,
    "add_.Tensor": _add_,
    "copy_.default": _copy_,
    "zero_.default": _zero_,
    "mul.Tensor": _mul,
    "mul_.Tensor": _mul_,
    "mul_.Scalar": _mul_,
    "div.Tensor": _div,
    "div_.Tensor": _div_,
    "div_.Scalar": _div_,
    "linalg_vector_norm.default": _vector_norm,
    "_amp_foreach_non_finite_check_and_unscale_.default": _unscale_,
}

# The same by operator of lists, for each of the list.
_OF_LISTS: dict[str, Callable] = {
    "_foreach_norm.Scalar": _vector_norm,
    "_foreach_mul_.Scalar": _mul_,
    "_foreach_mul_.Tensor": _mul_,
    "_foreach_div_.Scalar": _div_,
    "_foreach_div_.Tensor": _div_,
    "_foreach_zero_.default": _zero_,
}


def _by_operator(handlers: dict[str, Callable]) -> dict[Any, Callable]:
    """The handlers by the operators of those names. One that a release of torch has not is done on dense gradients."""
    found = {}
    for name, handler in handlers.items():
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(aten, packet, None), overload, None)
        if operator is not None:
            found[operator] = handler
    return found


_HANDLERS = _by_operator(_SINGLE)
_HANDLERS |= {operator: _foreach(operator, single) for operator, single in _by_operator(_OF_LISTS).items()}


def _on_rows(operator, args, kwargs):
    """Run an operator on dense gradients. One that it writes, or makes a view of, has a token for each row then."""
    logger.warning_once(
        f"`{operator}` is not done on the factors of an expert table's gradient: the dense gradient is computed, of "
        "the shape of the table."
    )
    arguments = operator._schema.arguments
    named = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
    gradients: dict[int, FactoredGradient] = {}
    for value in [named.get(argument.name) for argument in arguments if argument.alias_info is not None]:
        for gradient in filter(_is_factored, value if isinstance(value, (list, tuple)) else [value]):
            gradient.become_rows()
            gradients[id(gradient.viewed_rows())] = gradient

    def rows_of(value):
        if not isinstance(value, FactoredGradient):
            return value
        rows = value.viewed_rows()
        return value.to_rows() if rows is None else rows

    dense = {name: tree_map(rows_of, value) for name, value in kwargs.items()}
    result = operator(*tree_map(rows_of, args), **dense)
    return tree_map(lambda value: gradients.get(id(value), value), result)
