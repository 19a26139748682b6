# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
The gradient of an expert table as a sum of factors (see `gradient_factors.py`), from the backward to the optimizer.

A table's gradient comes in factors once an optimizer that takes them was made for it (see [`take_factors`]). It is
then a [`FactoredGradient`], a tensor of the table's shape. Accumulation, clipping, gradient scalers and freezing work
on its factors. Any other operation computes the dense gradient. Once that is written to, or viewed, as by a slice of
rows, it replaces the factors.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map
from transformers.utils import logging

from .gradient_factors import Factors


logger = logging.get_logger(__name__)

# Attribute of a table with a note of the optimizer that takes its factors.
OPTIMIZER = "_optimizer_of_factors"

# Accumulated factors are summed if they take more than this many times the memory of their rows.
MOST_FACTORS = 2.0


class _Sum:
    """What a gradient and tensors detached from it share: its factors or, in their place, the dense gradient."""

    def __init__(self, factors: Sequence[Factors]):
        self.factors = list(factors)
        self.rows: torch.Tensor | None = None


class FactoredGradient(torch.Tensor):
    """
    The gradient of an expert table, of its shape and dtype, as a sum of [`Factors`]. See the module's docstring.

    Sums are accumulated in float32, in float64 for a float64 table, whatever the dtype of the table.
    """

    _sum: _Sum

    @staticmethod
    def __new__(cls, table: torch.Tensor, factors: Sequence[Factors] | _Sum):
        """
        Args:
            table (`torch.Tensor` of shape `(num_rows, width)`): The table, or its gradient.
            factors (`Sequence[Factors]`)
        """
        # A view has the version counter of nothing: what autograd saves of a gradient, it saves as it is.
        self = torch.Tensor._make_wrapper_subclass(cls, table.shape, dtype=table.dtype, device=table.device)
        self._sum = factors if isinstance(factors, _Sum) else _Sum(factors)
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        tokens = sum(each.assignments.num_tokens for each in self._sum.factors)
        return f"FactoredGradient(shape={tuple(self.shape)}, dtype={self.dtype}, num_tokens={tokens})"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return memo.setdefault(id(self), self.to_rows())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.to_rows().__reduce_ex__(protocol)

    def numpy(self, **kwargs: Any) -> Any:
        """Return the dense gradient as an array, for loggers of histograms."""
        return self.to_rows().numpy(**kwargs)

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        name, kwargs, result = operator.name(), kwargs or {}, NotImplemented
        if name in ("aten::detach", "aten::alias"):
            return FactoredGradient(args[0], args[0]._sum)
        if name == "aten::mul.Tensor":
            args = sorted(args, key=_is_factored, reverse=True)  # also where a number comes first
        if name in _HANDLERS and _is_factored(args[0]):
            result = _HANDLERS[name](*args, **kwargs)
        elif name in _HANDLERS_OF_LISTS:
            result = _on_list(operator, _HANDLERS_OF_LISTS[name], *args, **kwargs)
        return _on_rows(operator, args, kwargs) if result is NotImplemented else result

    @property
    def factors(self) -> Factors | None:
        """All factors, joined as if from one backward pass; `None` if there are no assignments."""
        if self._sum.rows is not None:
            return Factors.of_rows(self._sum.rows)
        factors = [each for each in self._sum.factors if each.coefficients.numel()]
        self._sum.factors = [Factors.joined(factors)] if factors else []
        return self._sum.factors[0] if factors else None

    def to_rows(self) -> torch.Tensor:
        """Return a copy of the dense gradient, `(num_rows, width)`."""
        if self._sum.rows is not None:
            return self._sum.rows.clone()
        factors = self.factors
        if factors is None:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return factors.to_rows(self.dtype)

    def become_rows(self) -> torch.Tensor:
        """Replace the factors by the dense gradient, and return it. Writing to it changes this gradient."""
        if self._sum.rows is None:
            self._sum.rows, self._sum.factors = self.to_rows(), []
        return self._sum.rows

    def total_norm(self, order: float = 2.0) -> torch.Tensor:
        """Compute the norm of all elements, `()`, at least in float32. `order=2.0` needs no dense gradient."""
        factors = self.factors
        dtype = torch.promote_types(self.dtype, torch.float32)
        if factors is None:
            return torch.zeros((), dtype=dtype, device=self.device)
        if order == 2.0:
            return factors.assignments.run.squared_norm(*factors.in_groups()).sqrt().to(dtype)
        return torch.linalg.vector_norm(self.to_rows().to(dtype), order)

    def is_finite(self) -> torch.Tensor:
        """Whether all factors, or all elements of the dense gradient, are finite: bool, `()`."""
        if self._sum.rows is not None:
            return self._sum.rows.isfinite().all()
        finite = [
            torch.isfinite(part).all() for each in self._sum.factors for part in (each.coefficients, each.tokens)
        ]
        return torch.stack(finite).all() if finite else torch.ones((), dtype=torch.bool, device=self.device)

    def zero_rows(self, rows: torch.Tensor) -> None:
        """Zero rows in place: bool, `(num_rows,)`."""
        if self._sum.rows is None:
            self.set_factors([each.without(rows) for each in self._sum.factors])
        else:
            self._sum.rows.masked_fill_(rows[:, None], 0)

    def set_factors(self, factors: Sequence[Factors]) -> "FactoredGradient":
        """Become the sum of these factors, in place, and return itself."""
        if self._sum.rows is None:
            self._sum.factors = list(factors)
        else:
            self._sum.rows.copy_(FactoredGradient(self, factors).to_rows())
        return self

    def add_factors(self, others: Sequence[Factors]) -> "FactoredGradient":
        """Add factors in place and return itself. Factors that take much more memory than their rows are summed."""
        factors = [*self._sum.factors, *others]
        size, count = sum(each.nbytes for each in factors), sum(each.assignments.rows.numel() for each in factors)
        rows = min(count, self.shape[0]) * self.shape[1] * max(torch.float32.itemsize, self.dtype.itemsize)
        self._sum.factors = factors
        if len(factors) > 1 and size > MOST_FACTORS * rows and (joined := self.factors) is not None:
            self._sum.factors = [joined.summed()]
        return self


class _Note:
    """Note of the optimizer that takes the factors of a table. It does not apply to copies of the table."""

    def __init__(self, table: torch.Tensor, optimizer: torch.optim.Optimizer):
        # Not a weak reference to the table: `Module.to` refuses to move a DTensor that has one.
        self.table, self.optimizer = id(table), weakref.ref(optimizer)

    def __reduce__(self):
        return OrderedDict, ()  # weak references cannot be pickled; `torch.load` accepts this with `weights_only`


def optimizer_of(table: torch.Tensor) -> torch.optim.Optimizer | None:
    """The optimizer that takes the gradient of a table in factors, if there is one."""
    note = getattr(table, OPTIMIZER, None)
    return note.optimizer() if isinstance(note, _Note) and note.table == id(table) else None


def take_factors(table: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """
    Let the gradient of a table come in factors, as long as the optimizer lives. A note on the table, which does not
    apply to its copies, tells the backward.
    """
    setattr(table, OPTIMIZER, _Note(table, optimizer))


def let_follow(table: torch.Tensor, local: torch.Tensor) -> None:
    """Let the gradient of a process's part of a table come in factors if that of the table does."""
    optimizer = optimizer_of(table)
    if optimizer is not None:
        take_factors(local, optimizer)


@torch.compiler.assume_constant_result
def takes_factors(table: torch.Tensor) -> bool:
    """Whether there is an optimizer that takes the gradient of a table in factors."""
    return optimizer_of(table) is not None


def warn_of_dense_gradient(table: torch.Tensor) -> None:
    """Warn once that the gradient of a table is dense, and say how to avoid it."""
    logger.warning_once(
        f"The gradient of an expert table of shape {tuple(table.shape)} is dense. Give `Trainer` the optimizer of "
        "`optimizers=(make_optimizer(model, args), None)`, which moves the rows of retrieved experts only. A new "
        "model takes a `learning_rate` of about 0.256 / hidden_size, at most 4e-3, and other rates for tables. To "
        "train a trained model further, pass `expert_lr_multiplier=1.0, down_proj_lr_multiplier=1.0`."
    )


def _is_factored(value):
    return isinstance(value, FactoredGradient) and value._sum.rows is None


def _clone(gradient, *, memory_format=None):
    return FactoredGradient(gradient, gradient._sum.factors)


def _view(gradient, shape):
    same = tuple(shape) == tuple(gradient.shape)
    return FactoredGradient(gradient, gradient._sum) if same else NotImplemented


def _new_empty_strided(gradient, size, stride, *, dtype=None, **kwargs):
    # Autograd copies a gradient into this tensor if its strides differ from the parameter's. That happens if the width
    # of a table is not divisible by the number of processes.
    same = tuple(size) == tuple(gradient.shape) and dtype in (None, gradient.dtype)
    return FactoredGradient(gradient, []) if same else NotImplemented


def _copy_(gradient, other, non_blocking=False):
    return gradient.set_factors(other._sum.factors) if _is_factored(other) else NotImplemented


def _zero_(gradient):
    return gradient.set_factors([])


def _add_(gradient, other, *, alpha=1):
    if not _is_factored(other):
        return NotImplemented
    return gradient.add_factors([each if alpha == 1 else each.scaled(alpha) for each in other._sum.factors])


def _mul_(gradient, factor):
    if getattr(factor, "ndim", 0):
        return NotImplemented
    return gradient.set_factors([each.scaled(factor) for each in gradient._sum.factors])


def _div_(gradient, divisor):
    return _mul_(gradient, 1 / divisor)


def _of_copy(in_place):
    return lambda gradient, *args, **kwargs: in_place(_clone(gradient), *args, **kwargs)


def _vector_norm(gradient, ord=2, dim=None, keepdim=False, *, dtype=None):
    if dim is not None or keepdim:
        return NotImplemented
    return gradient.total_norm(float(ord)).to(dtype or torch.promote_types(gradient.dtype, torch.float32))


def _unscale_(gradient, found_inf, inverse_scale):
    """Unscale as gradient scalers do: `found_inf` becomes 1 if a factor is infinite or NaN."""
    found_inf.copy_(torch.maximum(found_inf, (~gradient.is_finite()).to(found_inf)))
    return _mul_(gradient, inverse_scale)


# Handlers of operators on factored gradients.
_HANDLERS: dict[str, Callable] = {
    "aten::view": _view,
    "aten::clone": _clone,
    "aten::new_empty_strided": _new_empty_strided,
    "aten::add.Tensor": _of_copy(_add_),
    "aten::add_.Tensor": _add_,
    "aten::copy_": _copy_,
    "aten::zero_": _zero_,
    "aten::mul.Tensor": _of_copy(_mul_),
    "aten::mul_.Tensor": _mul_,
    "aten::div.Tensor": _of_copy(_div_),
    "aten::div_.Tensor": _div_,
    "aten::linalg_vector_norm": _vector_norm,
}

# Handlers of operators on lists, which are called for each factored gradient of a list.
_HANDLERS_OF_LISTS: dict[str, Callable] = {
    "aten::_foreach_norm.Scalar": _vector_norm,
    "aten::_foreach_mul_.Scalar": _mul_,
    "aten::_foreach_mul_.Tensor": _mul_,
    "aten::_foreach_zero_": _zero_,
    "aten::_amp_foreach_non_finite_check_and_unscale_": _unscale_,
}


def _dense(value):
    """Return the plain tensor of a gradient that has become dense; return other values as they are."""
    return value.become_rows() if isinstance(value, FactoredGradient) and not _is_factored(value) else value


def _on_list(operator, single, tensors, *args, **kwargs):
    """Run an operator on a list of tensors: on factored gradients one by one, on the others together."""
    if any(isinstance(each, (list, tuple)) for each in args):
        return NotImplemented
    dense = [_dense(each) for each in tensors if not _is_factored(each)]
    results = iter((operator(dense, *args, **kwargs) if dense else ()) or ())
    found = [single(each, *args, **kwargs) if _is_factored(each) else next(results, None) for each in tensors]
    if any(each is NotImplemented for each in found):
        return NotImplemented
    return found if operator._schema.returns else None


def _on_rows(operator, args, kwargs):
    """Run an operator on dense gradients. One that it writes to, or views, is dense from then on."""
    logger.warning_once(
        f"`{operator}` is not done on the factors of an expert table's gradient: the dense gradient is computed, of "
        "the shape of the table."
    )
    arguments = operator._schema.arguments
    named = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
    gradients: dict[int, FactoredGradient] = {}
    for value in [named.get(argument.name) for argument in arguments if argument.alias_info is not None]:
        for gradient in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(gradient, FactoredGradient):
                gradients[id(gradient.become_rows())] = gradient

    def rows_of(value):
        return value.to_rows() if _is_factored(value) else _dense(value)

    result = operator(*tree_map(rows_of, args), **tree_map(rows_of, kwargs))
    return tree_map(lambda value: gradients.get(id(value), value), result)
