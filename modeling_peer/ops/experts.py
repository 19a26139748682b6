# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Experts on kernels, as a function for autograd and as operators for compilers.

The core calls [`run_experts_on_kernels`]. It reads the tables, but returns a pool to the core if an adapter or a hook
has changed one of them. [`run_expert_pool`] runs the pool as one autograd function, or as operators where a compiler
traces it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ..experts import run_experts
from .disk_tables import is_on_disk, pieces_from_disk
from .factored_gradient import FactoredGradient, takes_factors, warn_of_dense_gradient
from .gradient_factors import Assignments, Factors
from .kernels import KERNELS, is_traced, needs_autograd, resolve_kernels
from .quantized_rows import QuantizedRows, readable_rows


class NoExchange:
    """The exchange of tokens of a pool whose tables are whole in one process: it does nothing."""

    # Factor of the gradients of the tables.
    share = 1.0
    keeps_coefficients = False

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """Gather `(num_tokens, ...)` of each process into `(num_all_tokens, ...)`, the tokens of all processes."""
        return part

    def to_columns(self, tokens: torch.Tensor) -> torch.Tensor:
        """Exchange `(num_tokens, hidden_size)` for `(num_all_tokens, width)`, this process's columns of all tokens."""
        return tokens

    def input_columns(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run [`NoExchange.to_columns`] on the hidden states, whose exchange may already have been started."""
        return self.to_columns(tokens)

    def to_tokens(self, columns: torch.Tensor) -> torch.Tensor:
        """The inverse of [`NoExchange.to_columns`]."""
        return columns

    def products(
        self, kernels: Any, columns: torch.Tensor, rows: torch.Tensor, tables: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """
        Compute the dot products of this process's tokens and the rows that they name, for each table, in the dtype of
        `columns`: `(columns [all T, width], rows [all T, A], tables [N, width]) -> [T, A]`.
        """
        return [kernels.up(columns, rows, table) for table in tables]


NO_EXCHANGE = NoExchange()


_OF_A_TABLE = "Tensor rows, Tensor table, Tensor? scales, int width, int bytes_per_scale, str kernels) -> Tensor"
_OF_FACTORS = (
    "(Tensor coefficients, Tensor tokens, Tensor rows, int num_rows, ScalarType dtype, str kernels) -> Tensor"
)


@torch.library.custom_op("modeling_peer::expert_up", mutates_args=(), schema=f"(Tensor hidden_states, {_OF_A_TABLE}")
def expert_up(hidden_states, rows, table, scales, width, bytes_per_scale, kernels):
    """
    `hidden[t] · table[rows[t, a]]`, accumulated at least in float32: `(num_tokens, num_active)`, in the dtype of
    `hidden_states`.

    Args:
        hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`)
        rows (`torch.Tensor` of shape `(num_tokens, num_active)`): rows of the table, int64.
        table (`torch.Tensor` of shape `(num_experts, hidden_size)`): The integers of a quantized table.
        scales (`torch.Tensor` of shape `(num_experts, num_groups)`, *optional*): The scales of a quantized table.
        width (`int`): Number of columns of the table.
        bytes_per_scale (`int`): See [`QuantizedRows`].
        kernels (`str`): See [`resolve_kernels`].
    """
    return KERNELS[kernels].up(hidden_states, rows, _table(table, scales, width, bytes_per_scale))


@torch.library.custom_op("modeling_peer::expert_down", mutates_args=(), schema=f"(Tensor weights, {_OF_A_TABLE}")
def expert_down(weights, rows, table, scales, width, bytes_per_scale, kernels):
    """
    `Σ_a weights[t, a] table[rows[t, a]]`, accumulated at least in float32: `(num_tokens, hidden_size)`, in the dtype
    of `weights`, of shape `(num_tokens, num_active)`. See [`expert_up`].
    """
    return KERNELS[kernels].down(weights, rows, _table(table, scales, width, bytes_per_scale))


@torch.library.custom_op("modeling_peer::expert_row_gradient", mutates_args=(), schema=_OF_FACTORS)
def expert_row_gradient(coefficients, tokens, rows, num_rows, dtype, kernels):
    """
    The dense gradient of a table, `(num_rows, hidden_size)`. Row n is `Σ coefficients[t, a] tokens[t]` over all
    `rows[t, a] = n`.
    """
    return Factors(coefficients, tokens, Assignments(rows, num_rows, kernels)).to_rows(dtype)


def _table(table, scales, width, bytes_per_scale):
    return table if scales is None else QuantizedRows(table, scales, width, bytes_per_scale)


@expert_up.register_fake
def _(hidden_states, rows, table, scales, width, bytes_per_scale, kernels):
    return hidden_states.new_empty(rows.shape)


@expert_down.register_fake
def _(weights, rows, table, scales, width, bytes_per_scale, kernels):
    return weights.new_empty(weights.shape[0], width)


@expert_row_gradient.register_fake
def _(coefficients, tokens, rows, num_rows, dtype, kernels):
    return tokens.new_empty(num_rows, tokens.shape[1], dtype=dtype)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.width, ctx.bytes_per_scale, ctx.kernels = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, gradient, inverse):
    """Compute the backward of `expert_up` or `expert_down` with the other operator, `inverse`."""
    factors, rows, table, scales = ctx.saved_tensors
    gradient, of_factors, of_table = gradient.contiguous(), None, None
    if ctx.needs_input_grad[0]:
        of_factors = inverse(gradient, rows, table, scales, ctx.width, ctx.bytes_per_scale, ctx.kernels)
    if ctx.needs_input_grad[2]:
        pair = (gradient, factors) if inverse is expert_down else (factors, gradient)
        of_table = expert_row_gradient(*pair, rows, table.shape[0], table.dtype, ctx.kernels)
    return of_factors, None, of_table, None, None, None, None


expert_up.register_autograd(partial(_backward, inverse=expert_down), setup_context=_save_for_backward)
expert_down.register_autograd(partial(_backward, inverse=expert_up), setup_context=_save_for_backward)


class ExpertPoolFunction(torch.autograd.Function):
    """
    A whole pool: `Σ_a weights[t, a] · σ(u · x) · v`, or `σ(w · x) (u · x) v` with gates w, or `Σ_a weights[t, a] · v`
    without u.
    """

    @staticmethod
    def forward(ctx, hidden_states, indices, weights, up, gate, down, act_fn, kernels, exchange):
        output, columns, named, coefficients, products = _forward(
            hidden_states, indices, weights, up, gate, down, act_fn, kernels, exchange
        )
        ctx.act_fn, ctx.kernels, ctx.exchange = act_fn, kernels, exchange
        kept = coefficients if exchange.keeps_coefficients else None
        # Quantized tables are not tensors and have no gradient.
        saved = [table if isinstance(table, torch.Tensor) else None for table in (up, gate, down)]
        ctx.tables = [None if each is not None else table for each, table in zip(saved, (up, gate, down), strict=True)]
        # Asked here, because activation checkpointing gives the backward another tensor than the parameter.
        ctx.factored = [each is not None and takes_factors(each) for each in saved]
        ctx.save_for_backward(columns, named, weights, kept, *saved, *products)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        columns, named, weights, kept, *rest = ctx.saved_tensors  # read once: checkpointing unpacks each a single time
        products, wanted = rest[3:], ctx.needs_input_grad
        up, gate, down = tables = [
            quantized if each is None else each for each, quantized in zip(rest[:3], ctx.tables, strict=True)
        ]
        run, exchange, indices = KERNELS[ctx.kernels], ctx.exchange, named.long()
        gradient = exchange.to_columns(gradient.contiguous())
        (of_weighted,) = exchange.products(run, gradient, indices, [down])
        activations, of_products = _activation_gradients(ctx.act_fn, products, of_weighted * weights)
        of_products = [exchange.gather(each) for each in of_products]
        of_hidden_states = of_weights = None
        if wanted[0] and up is not None:
            parts = zip(of_products, (up, gate), strict=False)
            of_hidden_states = exchange.to_tokens(sum(run.down(each, indices, table) for each, table in parts))
        if wanted[2]:
            of_weights = of_weighted if activations is None else of_weighted * activations
        if kept is None:
            kept = weights if activations is None else weights * activations
        of_neurons, of_gates, *_ = *of_products, None, None
        # Gradients live until they are cleared; detached columns do not keep the graph behind the input alive.
        columns = None if columns is None else columns.detach()
        factors = (of_neurons, columns), (of_gates, columns), (kept, gradient)
        # Tables of the same length, all unless one grew alone, share their assignments, which are grouped once.
        assignments: dict[int, Assignments] = {}
        of_tables: list[Any] = [None, None, None]
        for place, table in enumerate(tables):
            if wanted[3 + place]:
                shared = assignments.setdefault(len(table), Assignments(indices, len(table), ctx.kernels))
                found = Factors(*factors[place], shared)
                found = found if exchange.share == 1 else found.scaled(exchange.share)
                if not ctx.factored[place]:
                    warn_of_dense_gradient(table)
                of_tables[place] = (
                    FactoredGradient(table, [found]) if ctx.factored[place] else found.to_rows(table.dtype)
                )
        return of_hidden_states, None, of_weights, *of_tables, None, None, None


def _forward(hidden_states, indices, weights, up, gate, down, act_fn, kernels, exchange):
    """Return the output, and the tensors that a backward needs besides the arguments."""
    run = KERNELS[kernels]
    named = exchange.gather(indices)
    rows = named.long()
    read = [table for table in (up, gate) if table is not None]
    columns = exchange.input_columns(hidden_states) if read else None
    products = exchange.products(run, columns, rows, read) if read else []
    coefficients = exchange.gather(_weighted(act_fn, weights, products))
    return exchange.to_tokens(run.down(coefficients, rows, down)), columns, named, coefficients, products


def _activations(act_fn, neurons, gates=None):
    return act_fn(neurons) if gates is None else act_fn(gates) * neurons


def _weighted(act_fn, weights, products):
    return weights * _activations(act_fn, *products) if products else weights


def _activation_gradients(act_fn, products, gradient):
    """Return the activations, and the gradients of the dot products from which they are computed."""
    if not products:
        return None, []
    products = [each.detach().requires_grad_() for each in products]
    with torch.enable_grad():
        activations = _activations(act_fn, *products)
    return activations.detach(), list(torch.autograd.grad(activations, products, gradient))


def _run_traced(hidden_states, rows, weights, up, gate, down, act_fn, kernels):
    if up is not None:
        read = [up] if gate is None else [up, gate]
        weights = _weighted(act_fn, weights, [expert_up(hidden_states, rows, *_parts(each), kernels) for each in read])
    return expert_down(weights, rows, *_parts(down), kernels)


def _parts(table):
    if isinstance(table, torch.Tensor):
        return table, None, table.shape[1], 1
    return table.integers, table.scales, table.width, table.bytes_per_scale


# A traced backward knows plain tensors only, and cannot make a [`FactoredGradient`].
@torch.compiler.disable
def _run_outside_of_the_graph(*arguments):
    return ExpertPoolFunction.apply(*arguments)


def run_expert_pool(
    hidden_states: torch.Tensor | None,
    rows: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor | QuantizedRows | None,
    gate: torch.Tensor | QuantizedRows | None,
    down: torch.Tensor | QuantizedRows,
    act_fn: Callable[[torch.Tensor], torch.Tensor] | None,
    kernels: str,
    exchange: NoExchange = NO_EXCHANGE,
) -> torch.Tensor:
    """
    Run [`~experts.run_experts`] on tensors or quantized rows, with the kernels named `kernels`. It is one operation
    for autograd, or several where a compiler traces it. A table whose gradient comes in factors is not traced: the
    graph breaks there. With an `exchange`, tables have only the columns of this process. Rows are then in int32,
    because they are sent to other processes.
    """
    arguments = hidden_states, rows, weights, up, gate, down, act_fn, kernels
    if not is_traced():
        if needs_autograd():
            return ExpertPoolFunction.apply(*arguments, exchange)
        return _forward(*arguments, exchange)[0]
    tables = [table for table in (up, gate, down) if isinstance(table, torch.Tensor)]
    if torch.is_grad_enabled() and any(takes_factors(table) for table in tables):
        return _run_outside_of_the_graph(*arguments, exchange)
    return _run_traced(*arguments)


def run_experts_on_kernels(
    hidden_states: torch.Tensor,
    rows: torch.Tensor,
    weights: torch.Tensor,
    up: nn.Module | None,
    gate: nn.Module | None,
    down: nn.Module,
    act_fn: Callable[[torch.Tensor], torch.Tensor],
    kernels: str | None = None,
) -> torch.Tensor:
    """Run [`~experts.run_experts`] with the kernels named `kernels`, or with the fastest ones if `None`."""
    modules = up, gate, down
    if all(is_on_disk(module) for module in modules if module is not None):
        return _run_from_disk(hidden_states, rows, weights, modules, act_fn, kernels)
    tables: list[Any] = [None if module is None else readable_rows(module) for module in modules]
    if any(table is None and module is not None for table, module in zip(tables, modules, strict=True)):
        return run_experts(hidden_states, rows, weights, up, gate, down, act_fn)
    return _run_tables(hidden_states, rows, weights, tables, act_fn, kernels)


def _run_tables(hidden_states, rows, weights, tables, act_fn, kernels):
    name = resolve_kernels(kernels, tables[2] if isinstance(tables[2], torch.Tensor) else tables[2].scales)
    return run_expert_pool(hidden_states, rows, weights, *tables, act_fn, name)


@torch.compiler.disable
def _run_from_disk(hidden_states, rows, weights, modules, act_fn, kernels):
    outputs = [
        _run_tables(hidden_states[tokens], places, weights[tokens], tables, act_fn, kernels)
        for tokens, places, tables in pieces_from_disk(rows, modules)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
