# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Experts and retrieval on kernels: autograd, compilers, checkpointing, autocast and the transforms of `torch.func`."""

from functools import partial

import pytest
import torch
from kernel_cases import IMPLEMENTATIONS, experts
from kernels_used import record_kernels
from table_gradients import dense
from tiny_models import tiny_config, tiny_model
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from modeling_peer import RowAdamW
from modeling_peer import experts as core
from modeling_peer.experts import retrieve, run_experts, run_experts_eager
from modeling_peer.ops.experts import expert_down, expert_row_gradient, expert_up, run_expert_pool
from modeling_peer.ops.factored_gradient import FactoredGradient
from modeling_peer.ops.quantized_rows import dequantize, quantize
from modeling_peer.ops.retrieval import product_key_retrieval, product_key_retrieval_gradients, retrieve_on_kernels


retrieve_on_cpu = partial(retrieve_on_kernels, kernels="cpu")


def samples(kernels):
    """Every operator with arguments."""
    hidden_states, weights, rows, table = experts(5, 6, 24, 36, torch.float32)
    hidden_states, weights, table = (x.requires_grad_() for x in (hidden_states, weights, table))
    quantized = quantize(table.detach(), 4, 8)
    yield expert_up, (hidden_states, rows, table, None, 24, 1, kernels)
    yield expert_down, (weights, rows, table, None, 24, 1, kernels)
    yield expert_up, (hidden_states, rows, quantized.integers, quantized.scales, 24, 4, kernels)
    yield expert_down, (weights, rows, quantized.integers, quantized.scales, 24, 4, kernels)
    yield expert_row_gradient, (weights.detach(), hidden_states.detach(), rows, 36, torch.float32, kernels)
    if kernels == "cpu":
        queries, sub_keys = torch.randn(5, 2, 2, 8, requires_grad=True), torch.randn(1, 2, 6, 8, requires_grad=True)
        yield product_key_retrieval, (queries, sub_keys, 3, kernels)
        indices, scores = retrieve(queries.detach(), sub_keys.detach(), 3)
        for wanted in ([True, True], [False, True], [True, False]):
            leaves = queries.detach(), sub_keys.detach()
            yield product_key_retrieval_gradients, (scores, indices, *leaves, wanted, kernels)


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
def test_operators_are_as_torch_wants_them(kernels):
    for operator, arguments in samples(kernels):
        torch.library.opcheck(operator, arguments)


def tables_of(kind):
    """Weights of up, gate and down, or `None`; float64."""
    generator = torch.Generator().manual_seed(1)
    tables = [torch.randn(36, 24, generator=generator, dtype=torch.float64) for _ in range(3)]
    kept = {"plain": (0, 2), "gated": (0, 1, 2), "values": (2,)}[kind]
    return [table if place in kept else None for place, table in enumerate(tables)]


def literal(hidden_states, rows, weights, tables, act_fn):
    modules = [None if table is None else (lambda rows, table=table: table[rows]) for table in tables]
    return run_experts_eager(hidden_states, rows, weights, *modules, act_fn)


class TestPools:
    @pytest.mark.parametrize("kind", ["plain", "gated", "values"])
    @pytest.mark.parametrize("factored", [False, True], ids=["dense", "factored"])
    @pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
    def test_gradients_are_those_of_the_literal_algorithm(self, kernels, factored, kind):
        hidden_states, weights, rows, _ = experts(7, 6, 24, 36, torch.float64)
        tables = [None if table is None else nn.Parameter(table) for table in tables_of(kind)]
        leaves = [hidden_states.requires_grad_(), weights.requires_grad_(), *filter(lambda t: t is not None, tables)]
        expected = literal(hidden_states, rows, weights, tables, F.gelu)
        _optimizer = RowAdamW([{"params": leaves[2:], "rows": factored}])
        actual = run_expert_pool(hidden_states, rows, weights, *tables, F.gelu, kernels)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            assert torch.equal(run_expert_pool(hidden_states, rows, weights, *tables, F.gelu, kernels), actual)
        direction = torch.randn_like(expected)
        found, exact = (torch.autograd.grad(y, leaves, direction, allow_unused=True) for y in (actual, expected))
        assert all(isinstance(each, FactoredGradient) == factored for each in found[2:])
        assert (found[0] is None) == (kind == "values")
        for mine, its in zip(found, exact, strict=True):
            if its is not None:
                torch.testing.assert_close(dense(mine), its, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("trained", [0, 1, 2])
    @pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
    def test_of_quantized_tables(self, kernels, trained):
        """One of which is plain and trained."""
        hidden_states, weights, rows, _ = experts(7, 6, 24, 36, torch.float64)
        hidden_states.requires_grad_()
        quantized = [quantize(table, 8, None) for table in tables_of("gated")]
        plain = [dequantize(table, torch.float64) for table in quantized]
        quantized[trained] = plain[trained].requires_grad_()
        expected = literal(hidden_states, rows, weights, plain, F.gelu)
        actual = run_expert_pool(hidden_states, rows, weights, *quantized, F.gelu, kernels)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)  # sums of quantized rows are in float32
        leaves = hidden_states, plain[trained]
        for mine, its in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (actual, expected)), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-3)

    def test_frozen_tables_get_no_gradient(self, monkeypatch):
        used_kernels = record_kernels(monkeypatch.setattr)
        hidden_states, weights, rows, table = experts(5, 6, 24, 36, torch.float32)
        output = run_expert_pool(hidden_states.requires_grad_(), rows, weights, table, None, table, F.gelu, "cpu")
        output.sum().backward()
        assert hidden_states.grad is not None
        assert used_kernels == {("cpu", "up"), ("cpu", "down")}  # and none is computed


def test_a_second_derivative_is_refused():
    hidden_states, weights, rows, table = experts(5, 6, 24, 36, torch.float32)
    leaf = hidden_states.requires_grad_()
    queries, sub_keys = torch.randn(5, 2, 2, 8, requires_grad=True), torch.randn(1, 2, 6, 8)
    for output, x in (
        (run_expert_pool(leaf, rows, weights, table, None, table, F.gelu, "cpu"), leaf),
        (retrieve_on_cpu(queries, sub_keys, 3)[1], queries),
    ):
        (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@pytest.mark.parametrize("kernels", ["eager", *IMPLEMENTATIONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(kernels, dtype):
    """Whatever dtype the tokens come in, tables stay in theirs, and so do their gradients."""
    pool = tiny_model(tiny_config(expert_kernels=kernels)).model.layers[0].mlp.expert_pool
    hidden_states, weights, rows, _ = experts(5, 6, 24, 36, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = pool(hidden_states.to(dtype), rows, weights.to(dtype))
    output.float().sum().backward()
    pool.config.expert_kernels = "eager"
    torch.testing.assert_close(output.float(), pool(hidden_states, rows, weights), rtol=0.05, atol=0.1)
    assert pool.up_proj.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("grad", [True, False])
class TestTransforms:
    """Transforms of `torch.func` and forward mode are refused, and never give a gradient of zero."""

    @staticmethod
    def forward_mode(function, x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    def test_kernels_refuse_them(self, grad):
        hidden_states, weights, rows, table = experts(5, 6, 24, 36, torch.float64)
        sub_keys = torch.randn(1, 2, 6, 8)
        for function, x in (
            (lambda x: run_expert_pool(x, rows, weights, table, None, table, F.gelu, "cpu"), hidden_states),
            (lambda x: retrieve_on_cpu(x, sub_keys, 3)[1], torch.randn(5, 2, 2, 8)),
        ):
            for run in (
                lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
                self.forward_mode,
                lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
                lambda f, x: torch.func.vmap(f)(torch.stack([x, x])),
            ):
                with torch.set_grad_enabled(grad), pytest.raises(RuntimeError):
                    run(function, x)

    def test_the_literal_experts_have_forward_mode(self, grad):
        layer = tiny_model(tiny_config(expert_kernels="eager")).double().model.layers[0].mlp
        x, direction = torch.randn(2, 1, 3, 24, dtype=torch.float64)
        with torch.set_grad_enabled(grad):
            difference = (layer(x + 1e-6 * direction) - layer(x - 1e-6 * direction)) / 2e-6
            tangent = torch.func.jvp(layer, (x,), (direction,))[1]
        torch.testing.assert_close(tangent, difference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("down_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("up_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_core_is_exact_for_tables_of_any_dtype(up_dtype, down_dtype, monkeypatch):
    """Without rounding what is in float32, in pieces of two tokens and a last one. Tables' gradients are rounded once."""
    monkeypatch.setattr(core, "PIECE_SIZE", 2 * 6 * 24)
    hidden_states, weights, rows, _ = experts(5, 6, 24, 36, torch.float32)
    dtypes = up_dtype, up_dtype, down_dtype
    tables = [table.to(dtype) for table, dtype in zip(tables_of("gated"), dtypes, strict=True)]
    modules = [nn.Embedding(36, 24, _weight=table) for table in tables]
    exact = [nn.Parameter(table.double()) for table in tables]
    own = hidden_states.requires_grad_(), weights.requires_grad_()
    double = [each.detach().double().requires_grad_() for each in own]
    actual = run_experts(own[0], rows, own[1], *modules, F.gelu)
    expected = literal(double[0], rows, double[1], exact, F.gelu)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad(actual, [*own, *(table.weight for table in modules)], direction.float())
    for mine, its in zip(gradients, torch.autograd.grad(expected, [*double, *exact], direction), strict=True):
        error = torch.finfo(mine.dtype).eps
        torch.testing.assert_close(mine.double(), its, rtol=max(error, 1e-4), atol=1e-3)
