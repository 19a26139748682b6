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
How the gradient of an expert table leaves a graph in factors, where `torch.compile` has traced the backward.

A traced backward cannot make a [`FactoredGradient`], as compiled code knows plain tensors only. Instead, an operator
in it hands the factors over, as it runs, and has a number as its output: the gradient of a scalar, the *outlet* of the
table, which is an input of the graph. The outlet is made from the table outside of all graphs, by an operation whose
backward takes the factors that were handed over and returns them as the gradient of the table. What autograd does with
gradients, it does with this one: it adds up, calls hooks, and leaves out what does not require one.

    table ── _Leave ──▶ outlet ──▶ ┌ graph: leave_graph(values of the experts, outlet) ──▶ the same values ┐
    gradient in factors ◀── _Leave ◀── └ backward: hand_over(factors) ──▶ a number ◀── gradient of the values ┘
"""

import itertools
import weakref
from collections.abc import Sequence

import torch

from .expert_kernels import NAMESPACE, PLAIN_TENSORS, refuse_double_backward
from .factored_gradient import FactoredGradient, Outlet, taker_of
from .gradient_factors import Entries, Factors
from .library_releases import call_after_backward, can_tell_backwards, current_backward, is_exporting


# What was handed over in a backward that failed is kept until so many others have handed over something. More than one
# are underway where activation checkpointing runs one inside of another.
MOST_BACKWARDS = 8

_numbers = itertools.count(1)


class _Backward:
    """What the operators of a backward have handed over: factors by outlet, and their entries by number."""

    def __init__(self):
        self.factors: dict[int, list[Factors]] = {}
        self.entries: dict[int, Entries] = {}


# By number of the backward. A backward is no object that could hold it.
_backwards: dict[int, _Backward] = {}


class _Leave(torch.autograd.Function):
    """A table to its outlet, a scalar with a number by which operators name it. See the module's docstring."""

    @staticmethod
    def forward(ctx, table):
        # This node lives as long as its output and may run often: it saves nothing, as that would be freed.
        ctx.number, ctx.table = next(_numbers), weakref.ref(table)
        # On a CPU, to be read without waiting for a GPU. It also keeps the operators out of CUDA graphs, which would
        # replay their kernels without handing over anything.
        return torch.tensor(ctx.number, dtype=torch.float64, device="cpu")

    @staticmethod
    def backward(ctx, times):
        backward = _backwards.get(current_backward(), _Backward())
        # The backward itself is dropped at its end: on a GPU, operators run in another thread than this.
        factors = backward.factors.pop(ctx.number, [])
        # A compiler may make one operator of several that do the same.
        if len(factors) == 1:
            factors = [factors[0].scaled(times)] if times != 1 else factors
        elif times != len(factors):
            raise RuntimeError(
                f"A compiled backward used {int(times)} gradients of an expert table in factors, and handed over "
                f"{len(factors)}. CUDA graphs, which replay kernels alone, cannot hand them over: compile without "
                '`mode="reduce-overhead"`, `mode="max-autotune"` and `triton.cudagraphs`. If there are none, the '
                "operators that hand over did not all run in this backward: a backend or a pass of your own took some "
                f"out or repeated them, compiled autograd runs them elsewhere, or more than {MOST_BACKWARDS} "
                "backwards ran one inside of another. Compile without these, or apply `torch.compiler.disable` to the "
                "forward of the layers with experts."
            )
        return FactoredGradient(ctx.table(), factors)


def outlet_of(table: torch.Tensor) -> torch.Tensor | None:
    """
    The outlet of a table whose gradient is to leave a graph in factors, to be called where a compiler traces. `None`
    if no optimizer takes them, in which case the gradient is dense; a compiler looks again when that changes. `None`
    also for a tensor that is no plain parameter, such as a process's part of a table.
    """
    is_parameter = table.requires_grad and table.is_leaf and type(table) in PLAIN_TENSORS
    if not is_parameter or is_exporting() or not can_tell_backwards():
        return None
    _open_outlet(table)
    taker = taker_of(table)
    outlet = None if taker is None else taker.outlet()
    if outlet is None or (outlet.dtype, outlet.device) != (table.dtype, table.device):
        return None
    return outlet.tensor


# Run as a graph is traced, before it reads what is set here.
@torch.compiler.assume_constant_result
def _open_outlet(table: torch.Tensor) -> None:
    taker = taker_of(table)
    outlet: Outlet | None = None if taker is None else taker.outlet()
    # Autograd forgets the node that accumulates a gradient where the parameter is cast or moved.
    if outlet is not None and (outlet.dtype, outlet.device) != (table.dtype, table.device):
        with torch.enable_grad():
            outlet.tensor = _Leave.apply(table)
        outlet.dtype, outlet.device = table.dtype, table.device


@torch.library.custom_op(f"{NAMESPACE}::leave_graph", mutates_args=())
def leave_graph(
    values: Sequence[torch.Tensor],
    others: torch.Tensor,
    indices: torch.Tensor,
    outlets: Sequence[torch.Tensor],
    entries: torch.Tensor,
    num_rows: int,
    kernels: str,
    is_down: bool,
) -> list[torch.Tensor]:
    """
    Let the gradients of tables leave the graph: these are the outer products of the gradients of `values`, which one
    half of the experts has made from `others`, and `others`.

    Args:
        values (`Sequence[torch.Tensor]`):
            For each table, what the half makes: `(num_tokens, num_active)`, `(num_tokens, hidden_size)` if `is_down`.
        others (`torch.Tensor`):
            What it makes them from: `(num_tokens, hidden_size)`, `(num_tokens, num_active)` if `is_down`.
        indices (`torch.Tensor` of shape `(num_tokens, num_active)`): rows of the tables, int64.
        outlets (`Sequence[torch.Tensor]` of shape `()`): See [`outlet_of`].
        entries (`torch.Tensor` of shape `()`):
            The last output of the other half of a pool, or zero. By its gradient the operators of a backward tell each
            other of the entries, which are grouped by row once.
        num_rows (`int`): Number of rows of each table.
        kernels (`str`): See [`resolve_kernels`].
        is_down (`bool`): Whether it is the down-projection vectors.

    Returns:
        `list[torch.Tensor]`: `values`, and a tensor for the `entries` of the other half.
    """
    return [*(each.clone() for each in values), torch.zeros_like(entries)]


@torch.library.custom_op(f"{NAMESPACE}::hand_over", mutates_args=())
def hand_over(
    gradients: Sequence[torch.Tensor],
    others: torch.Tensor,
    indices: torch.Tensor,
    outlets: Sequence[torch.Tensor],
    entries: torch.Tensor,
    num_rows: int,
    kernels: str,
    is_down: bool,
) -> list[torch.Tensor]:
    """
    Hand factors over to the outlets of tables, in a backward.

    Args:
        gradients (`Sequence[torch.Tensor]`): Of the values, see [`leave_graph`] for these and the other arguments.
        entries (`torch.Tensor` of shape `()`): The number of the entries, or zero if nobody had them before.

    Returns:
        `list[torch.Tensor]` of shape `()`: For each outlet, how often it got something; and the number of the entries.
    """
    task = current_backward()
    if task not in _backwards:
        _backwards[task] = _Backward()
        call_after_backward(lambda: _backwards.pop(task, None))
    backward = _backwards[task]
    for oldest in sorted(_backwards)[:-MOST_BACKWARDS]:
        del _backwards[oldest]
    number = int(entries)
    # Compiled code uses the memory of what it gives to an operator again: all that is kept is a copy.
    if number not in backward.entries:
        number = next(_numbers)
        backward.entries[number] = Entries(_copy(indices), num_rows, kernels)
    others = _copy(others)
    for gradient, outlet in zip(gradients, outlets, strict=True):
        coefficients, tokens = (others, _copy(gradient)) if is_down else (_copy(gradient), others)
        factors = Factors.of(coefficients, tokens, backward.entries[number])
        backward.factors.setdefault(int(outlet), []).append(factors)
    return [*(torch.ones_like(outlet) for outlet in outlets), torch.full_like(entries, number)]


def _copy(tensor):
    return tensor.clone(memory_format=torch.contiguous_format)


@leave_graph.register_fake
def _(values, others, indices, outlets, entries, num_rows, kernels, is_down):
    return [*(torch.empty_like(each) for each in values), torch.empty_like(entries)]


@hand_over.register_fake
def _(gradients, others, indices, outlets, entries, num_rows, kernels, is_down):
    return [*(torch.empty_like(outlet) for outlet in outlets), torch.empty_like(entries)]


def _save_for_backward(ctx, inputs, output):
    _, others, indices, outlets, entries, *ctx.rest = inputs
    ctx.save_for_backward(others, indices, entries, *outlets)


def _hand_over(ctx, gradients):
    refuse_double_backward()
    *gradients, entries = gradients
    others, indices, _, *outlets = ctx.saved_tensors
    *numbers, entries = hand_over(gradients, others, indices, outlets, entries, *ctx.rest)
    return gradients, None, None, numbers, entries, None, None, None


leave_graph.register_autograd(_hand_over, setup_context=_save_for_backward)
