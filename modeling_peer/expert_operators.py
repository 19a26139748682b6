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
The operators of the experts: what autograd, compilers and exporters see of a pool, whatever implementation runs.
"""

from collections.abc import Callable

import torch

from .expert_kernels import ALL_EXPERT_KERNELS, NAMESPACE, refuse_double_backward
from .factored_gradient import FactoredGradient, advise_on_dense_gradient, takes_factors
from .gradient_factors import Entries, Factors
from .gradient_outlet import leave_graph, outlet_of
from .token_exchange import NoExchange


NO_EXCHANGE = NoExchange()


@torch.library.custom_op(f"{NAMESPACE}::expert_up", mutates_args=())
def expert_up(
    hidden_states: torch.Tensor, indices: torch.Tensor, table: torch.Tensor, kernels: str, factored: bool
) -> torch.Tensor:
    """
    `hidden[t] · table[indices[t, a]]`, accumulated in float32.

    Args:
        hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`)
        indices (`torch.Tensor` of shape `(num_tokens, num_active)`): rows of the table, int64.
        table (`torch.Tensor` of shape `(num_experts, hidden_size)`)
        kernels (`str`): See [`resolve_kernels`].
        factored (`bool`): Whether the table's gradient is a [`FactoredGradient`].

    Returns:
        `torch.Tensor` of shape `(num_tokens, num_active)`, in the dtype of `hidden_states`.
    """
    return ALL_EXPERT_KERNELS[kernels].up(hidden_states, indices, table)


@torch.library.custom_op(f"{NAMESPACE}::expert_down", mutates_args=())
def expert_down(
    weights: torch.Tensor, indices: torch.Tensor, table: torch.Tensor, kernels: str, factored: bool
) -> torch.Tensor:
    """
    `Σ_a weights[t, a] table[indices[t, a]]`, accumulated in float32.

    Args:
        weights (`torch.Tensor` of shape `(num_tokens, num_active)`)
        indices, table, kernels, factored: See [`expert_up`].

    Returns:
        `torch.Tensor` of shape `(num_tokens, hidden_size)`, in the dtype of `weights`.
    """
    return ALL_EXPERT_KERNELS[kernels].down(weights, indices, table)


@torch.library.custom_op(f"{NAMESPACE}::expert_row_gradient", mutates_args=())
def expert_row_gradient(
    coefficients: torch.Tensor,
    tokens: torch.Tensor,
    indices: torch.Tensor,
    num_rows: int,
    dtype: torch.dtype,
    kernels: str,
) -> torch.Tensor:
    """
    The dense gradient of a table: `Σ coefficients[t, a] tokens[t]` over `indices[t, a] = n` in row n.

    Args:
        coefficients (`torch.Tensor` of shape `(num_tokens, num_active)`)
        tokens (`torch.Tensor` of shape `(num_tokens, hidden_size)`)
        indices (`torch.Tensor` of shape `(num_tokens, num_active)`): rows of the table, int64.
        num_rows (`int`): Number of rows of the table.
        dtype (`torch.dtype`): Dtype of the table.
        kernels (`str`): See [`resolve_kernels`].

    Returns:
        `torch.Tensor` of shape `(num_rows, hidden_size)`.
    """
    return Factors.of(coefficients, tokens, Entries(indices, num_rows, kernels)).to_rows(dtype)


@expert_up.register_fake
def _(hidden_states, indices, table, kernels, factored):
    return hidden_states.new_empty(indices.shape)


@expert_down.register_fake
def _(weights, indices, table, kernels, factored):
    return weights.new_empty(weights.shape[0], table.shape[1])


@expert_row_gradient.register_fake
def _(coefficients, tokens, indices, num_rows, dtype, kernels):
    return tokens.new_empty(num_rows, tokens.shape[1], dtype=dtype)


def _save_for_backward(ctx, inputs, output):
    first, indices, table, ctx.kernels, ctx.factored = inputs
    ctx.save_for_backward(first, indices, table)


def _table_gradient(ctx, coefficients, tokens, indices, table):
    if not ctx.factored:
        advise_on_dense_gradient(table)
        return expert_row_gradient(coefficients, tokens, indices, table.shape[0], table.dtype, ctx.kernels)
    return FactoredGradient(table, [Factors.of(coefficients, tokens, Entries(indices, table.shape[0], ctx.kernels))])


def _up_backward(ctx, gradient):
    refuse_double_backward()
    hidden_states, indices, table = ctx.saved_tensors
    of_hidden_states = of_table = None
    if ctx.needs_input_grad[0]:
        of_hidden_states = expert_down(gradient.contiguous(), indices, table, ctx.kernels, False)
        of_hidden_states = of_hidden_states.to(hidden_states.dtype)
    if ctx.needs_input_grad[2]:
        of_table = _table_gradient(ctx, gradient.contiguous(), hidden_states, indices, table)
    return of_hidden_states, None, of_table, None, None


def _down_backward(ctx, gradient):
    refuse_double_backward()
    weights, indices, table = ctx.saved_tensors
    of_weights = of_table = None
    if ctx.needs_input_grad[0]:
        of_weights = expert_up(gradient.contiguous(), indices, table, ctx.kernels, False).to(weights.dtype)
    if ctx.needs_input_grad[2]:
        of_table = _table_gradient(ctx, weights, gradient.contiguous(), indices, table)
    return of_weights, None, of_table, None, None


expert_up.register_autograd(_up_backward, setup_context=_save_for_backward)
expert_down.register_autograd(_down_backward, setup_context=_save_for_backward)


def run_half(
    operator: Callable, first: torch.Tensor, indices: torch.Tensor, table: torch.Tensor, kernels: str
) -> torch.Tensor:
    """
    Run one table, whose gradient comes in factors if an optimizer takes them.

    Args:
        operator (`Callable`): [`expert_up`] or [`expert_down`], whose arguments the others are.
    """
    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        (output,), _ = _run_traced(operator, first, indices, [table], kernels)
        return output
    return operator(first, indices, table, kernels, torch.is_grad_enabled() and takes_factors(table))


def _run_traced(operator, first, indices, tables, kernels, entries=None):
    """Run tables where a compiler traces. Return their outputs, and `entries` for the other half of the pool."""
    outlets = [outlet_of(table) for table in tables]
    outputs = [
        operator(first, indices, table if outlet is None else table.detach(), kernels, False)
        for table, outlet in zip(tables, outlets, strict=True)
    ]
    leaving = [place for place, outlet in enumerate(outlets) if outlet is not None]
    if not leaving:
        return outputs, entries
    *left, entries = leave_graph(
        [outputs[place] for place in leaving],
        first.detach(),
        indices,
        [outlets[place] for place in leaving],
        torch.zeros((), dtype=torch.float64, device="cpu") if entries is None else entries,
        tables[0].shape[0],
        kernels,
        operator is expert_down,
    )
    for place, output in zip(leaving, left, strict=True):
        outputs[place] = output
    return outputs, entries


class _ExpertPool(torch.autograd.Function):
    """
    All of a pool: `Σ_a weights[t, a] · σ(u · x) · v`, or `σ(w · x) (u · x) v` with gates w, or `Σ_a weights[t, a] · v`
    without u.
    """

    @staticmethod
    def forward(ctx, hidden_states, indices, weights, up, gate, down, act_fn, kernels, exchange):
        run = ALL_EXPERT_KERNELS[kernels]
        named = exchange.gather(indices)
        rows = named.long()
        read = [table for table in (up, gate) if table is not None]
        columns = exchange.input_columns(hidden_states) if read else None
        products = exchange.products(run, columns, rows, read) if read else []
        ctx.act_fn, ctx.kernels, ctx.exchange, ctx.num_read = act_fn, kernels, exchange, len(read)
        # Asked here: what activation checkpointing gives to the backward is not the parameter.
        ctx.factored = [table is not None and takes_factors(table) for table in (up, gate, down)]
        coefficients = exchange.gather(_weighted(act_fn, weights, products))
        kept = coefficients if exchange.keeps_coefficients else None
        ctx.save_for_backward(columns, named, weights, up, gate, down, kept, *products)
        return exchange.to_tokens(run.down(coefficients, rows, down))

    @staticmethod
    def backward(ctx, gradient):
        refuse_double_backward()
        columns, named, weights, up, gate, down, kept, *products = ctx.saved_tensors
        of_input, _, of_weights, *of_tables = ctx.needs_input_grad[:6]
        run, exchange, indices = ALL_EXPERT_KERNELS[ctx.kernels], ctx.exchange, named.long()
        gradient = exchange.to_columns(gradient.contiguous())
        (of_weighted,) = exchange.products(run, gradient, indices, [down])
        activations, of_products = _activation_gradients(ctx.act_fn, products, of_weighted * weights)
        of_products = [exchange.gather(each) for each in of_products]
        read = [table for table in (up, gate) if table is not None]
        of_input = of_input and bool(read)
        if of_input:
            of_columns = sum(run.down(each, indices, table) for each, table in zip(of_products, read, strict=True))
        of_neurons, of_gates, *_ = *of_products, None, None
        if kept is None:
            kept = weights if activations is None else weights * activations
        coefficients, tokens = (of_neurons, of_gates, kept), (columns, columns, gradient)
        tables = (up, gate, down)
        lengths = {len(table) for table in tables if table is not None}
        # One, unless a table grew alone. Tables that share their entries have them grouped once.
        entries = {length: Entries(indices, length, ctx.kernels) for length in lengths}
        return (
            exchange.to_tokens(of_columns) if of_input else None,
            None,
            (of_weighted if activations is None else of_weighted * activations) if of_weights else None,
            *(
                _gradient_of(table, *factors, entries[len(table)], exchange.share, factored) if wanted else None
                for wanted, table, factored, *factors in zip(
                    of_tables, tables, ctx.factored, coefficients, tokens, strict=True
                )
            ),
            None,
            None,
            None,
        )


def _activations(act_fn, neurons, gates=None):
    return act_fn(neurons) if gates is None else act_fn(gates) * neurons


def _weighted(act_fn, weights, products):
    return weights * _activations(act_fn, *products) if products else weights


def _activation_gradients(act_fn, products, gradient):
    """The activations, and the gradients of the dot products that they are made of."""
    if not products:
        return None, []
    products = [each.detach().requires_grad_() for each in products]
    with torch.enable_grad():
        activations = _activations(act_fn, *products)
    return activations.detach(), list(torch.autograd.grad(activations, products, gradient))


def _gradient_of(table, coefficients, tokens, entries, share, factored):
    factors = Factors.of(coefficients, tokens, entries)
    if share != 1:
        factors = factors.scaled(share)
    if factored:
        return FactoredGradient(table, [factors])
    advise_on_dense_gradient(table)
    return factors.to_rows(table.dtype)


def run_expert_pool(
    hidden_states: torch.Tensor | None,
    indices: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor | None,
    gate: torch.Tensor | None,
    down: torch.Tensor,
    act_fn: Callable[[torch.Tensor], torch.Tensor] | None,
    kernels: str,
    exchange: NoExchange = NO_EXCHANGE,
) -> torch.Tensor:
    """
    The experts of every token, weighted and summed. Their entries are grouped once for the gradients of all tables: it
    is one operation for autograd or, where a compiler traces it, several that share their entries.

    Args:
        hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`, *optional*): Not read without `up`.
        indices (`torch.Tensor` of shape `(num_tokens, num_active)`): rows of the tables, int64.
        weights (`torch.Tensor` of shape `(num_tokens, num_active)`): router weights.
        up (`torch.Tensor` of shape `(num_experts, hidden_size)`, *optional*):
            up-projection vectors. Without them, what is weighted is the rows of `down` alone.
        gate (`torch.Tensor` of shape `(num_experts, hidden_size)`, *optional*): gate vectors.
        down (`torch.Tensor` of shape `(num_experts, hidden_size)`): down-projection vectors.
        act_fn (`Callable`, *optional*): The activation, without parameters. Not called without `up`.
        kernels (`str`): See [`resolve_kernels`].
        exchange ([`NoExchange`], *optional*):
            With whom tokens are exchanged, if the tables have the columns of this process alone. Indices are then in
            int32: they travel.

    Returns:
        `torch.Tensor` of shape `(num_tokens, hidden_size)`.
    """
    if not torch.compiler.is_compiling():
        return _ExpertPool.apply(hidden_states, indices, weights, up, gate, down, act_fn, kernels, exchange)
    inputs = [up] if gate is None else [up, gate]
    (neurons, *gates), entries = _run_traced(expert_up, hidden_states, indices, inputs, kernels)
    weights = weights * _activations(act_fn, neurons, *gates)
    (output,), _ = _run_traced(expert_down, weights, indices, [down], kernels, entries)
    return output
