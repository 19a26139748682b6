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
The operators in front of the experts: autograd, compilers, checkpointing, autocast and the transforms of `torch.func`.
"""

from contextlib import nullcontext

import pytest
import torch
from kernel_cases import IMPLEMENTATIONS, experts
from table_gradients import dense
from tiny_models import random_tokens, tiny_config, tiny_model
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from modeling_peer import product_key_retrieval as product_key_retrieval_module
from modeling_peer.expert_kernels_torch import EagerKernels
from modeling_peer.expert_operators import expert_down, expert_row_gradient, expert_up
from modeling_peer.factored_gradient import FactoredGradient
from modeling_peer.gradient_outlet import leave_graph
from modeling_peer.product_key_retrieval import product_key_retrieval, product_key_retrieval_gradients, retrieve


def samples(kernels):
    """Every operator with arguments."""
    hidden_states, weights, indices, table = experts(5, 6, 24, 36, torch.float32)
    hidden_states, weights, table = (x.requires_grad_() for x in (hidden_states, weights, table))
    yield expert_up, (hidden_states, indices, table, kernels, False)
    yield expert_down, (weights, indices, table, kernels, False)
    values, outlet = torch.randn(5, 6, requires_grad=True), torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    entries = torch.zeros_like(outlet)
    yield leave_graph, ([values], hidden_states.detach(), indices, [outlet], entries, 36, kernels, False)
    yield expert_row_gradient, (weights.detach(), hidden_states.detach(), indices, 36, torch.float32, kernels)
    if kernels == "cpu":
        queries, sub_keys = torch.randn(5, 2, 2, 8, requires_grad=True), torch.randn(1, 2, 6, 8, requires_grad=True)
        yield product_key_retrieval, (queries, sub_keys, 3, kernels)
        indices, scores = retrieve(queries.detach(), sub_keys.detach(), 3, kernels)
        for wanted in ([True, True], [False, True], [True, False]):
            leaves = queries.detach(), sub_keys.detach()
            yield product_key_retrieval_gradients, (scores, indices, *leaves, wanted, kernels)


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
class TestOperators:
    def test_opcheck(self, kernels):
        for operator, arguments in samples(kernels):
            torch.library.opcheck(operator, arguments)

    @pytest.mark.parametrize("factored", [False, True], ids=["dense", "factored"])
    def test_gradients_are_those_of_the_literal_ones(self, kernels, factored):
        hidden_states, weights, indices, table = experts(7, 6, 24, 36, torch.float64)
        literal = {expert_up: EagerKernels.up, expert_down: EagerKernels.down}
        for operator, first in ((expert_up, hidden_states), (expert_down, weights)):
            first, leaf = first.clone().requires_grad_(), table.clone().requires_grad_()
            output = operator(first, indices, leaf, kernels, factored)
            direction = torch.randn_like(output)
            actual = torch.autograd.grad(output, (first, leaf), direction)
            expected = torch.autograd.grad(literal[operator](first, indices, leaf), (first, leaf), direction)
            assert isinstance(actual[1], FactoredGradient) == factored
            for x, y in zip(actual, expected, strict=True):
                torch.testing.assert_close(dense(x), y, rtol=1e-10, atol=1e-10)

    def test_double_backward_is_refused(self, kernels):
        for operator, arguments in samples(kernels):
            if operator in (expert_row_gradient, product_key_retrieval_gradients):
                continue
            outputs = operator(*arguments)
            output = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
            with pytest.raises(RuntimeError, match=r'second derivative.*expert_kernels="eager"'):
                torch.autograd.grad(output.sum(), arguments[0], create_graph=True)

    def test_frozen_inputs_get_no_gradient(self, kernels, used_kernels):
        hidden_states, _, indices, table = experts(5, 6, 24, 36, torch.float32)
        output = expert_up(hidden_states.requires_grad_(), indices, table, kernels, False)
        output.sum().backward()
        assert hidden_states.grad is not None
        assert table.grad is None
        assert used_kernels == {(kernels, "up"), (kernels, "down")}  # and none is computed

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_activation_checkpointing(self, kernels, use_reentrant):
        hidden_states, _, indices, table = experts(5, 6, 24, 36, torch.float64)
        grads = []
        for run in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=use_reentrant)):
            leaves = hidden_states.clone().requires_grad_(), table.clone().requires_grad_()
            run(lambda x, t: expert_up(x, indices, t, kernels, False).square(), *leaves).sum().backward()
            grads.append([leaf.grad for leaf in leaves])
        assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


class Recorded(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*arguments, **(keywords or {}))


class TestPlainRetrieval:
    """In training that nothing but autograd observes, retrieval is no operator."""

    def run(self, mode=nullcontext):
        generator = torch.Generator().manual_seed(0)
        leaves = [torch.randn(*shape, generator=generator).requires_grad_() for shape in ((5, 2, 2, 8), (1, 2, 6, 8))]
        with mode():
            indices, scores = retrieve(*leaves, 3, "cpu")
            return indices, scores, *torch.autograd.grad(scores.square().sum(), leaves)

    def test_it_equals_the_operators_to_the_bit(self):
        mode = Recorded()
        observed = self.run(lambda: mode)
        assert {"product_key_retrieval", "product_key_retrieval_gradients"} <= set(mode.names)
        assert all(torch.equal(x, y) for x, y in zip(self.run(), observed, strict=True))

    def test_it_calls_no_operator(self, monkeypatch):
        def refuse(*arguments):
            raise AssertionError

        for name in ("product_key_retrieval", "product_key_retrieval_gradients"):
            monkeypatch.setattr(product_key_retrieval_module, name, refuse)
        self.run()

    def test_indices_have_no_gradient(self):
        queries, sub_keys = torch.randn(5, 2, 2, 8, requires_grad=True), torch.randn(1, 2, 6, 8)
        indices, scores = retrieve(queries, sub_keys, 3, "cpu")
        assert scores.requires_grad
        assert not indices.requires_grad

    def test_double_backward_is_refused(self):
        queries, sub_keys = torch.randn(5, 2, 2, 8, requires_grad=True), torch.randn(1, 2, 6, 8)
        scores = retrieve(queries, sub_keys, 3, "cpu")[1]
        with pytest.raises(RuntimeError, match=r'second derivative.*expert_kernels="eager"'):
            torch.autograd.grad(scores.sum(), queries, create_graph=True)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_activation_checkpointing(self, use_reentrant):
        leaves = torch.randn(5, 2, 2, 8), torch.randn(1, 2, 6, 8)
        grads = []
        for run in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=use_reentrant)):
            mine = [leaf.clone().requires_grad_() for leaf in leaves]
            run(lambda q, c: retrieve(q, c, 3, "cpu")[1].square(), *mine).sum().backward()
            grads.append([leaf.grad for leaf in mine])
        assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


def test_compiled_without_a_graph_break():
    torch._dynamo.reset()
    model = tiny_model(tiny_config("peer", "pkm")).train()
    tokens = random_tokens(3, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outcomes = []
    for run in (compiled, model):
        model.zero_grad()
        loss = run(tokens, labels=tokens).loss
        loss.backward()
        outcomes.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for actual, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_exported_with_kernels_that_were_chosen():
    """Behind operators. Those that are chosen for a user are not exported: see `tests/model/test_export.py`."""
    layer = tiny_model(tiny_config(expert_kernels="torch")).model.layers[0].mlp
    hidden_states = torch.randn(2, 5, 24)
    program = torch.export.export(
        layer, (hidden_states,), dynamic_shapes=({1: torch.export.Dim("length", min=2, max=64)},)
    )
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {name.partition(".")[2].partition(".")[0] for name in operators} >= {"expert_up", "expert_down"}
    longer = torch.randn(2, 11, 24)
    torch.testing.assert_close(program.module()(longer), layer(longer))


@pytest.mark.parametrize("kernels", ["eager", *IMPLEMENTATIONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(kernels, dtype):
    """Whatever dtype the tokens come in, tables stay in theirs, and so do their gradients."""
    config = tiny_config(expert_kernels=kernels)
    pool = tiny_model(config).model.layers[0].mlp.expert_pool
    hidden_states, weights, indices, _ = experts(5, 6, 24, 36, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = pool(hidden_states.to(dtype), indices, weights.to(dtype))
    output.float().sum().backward()
    config.expert_kernels = "eager"
    torch.testing.assert_close(output.float(), pool(hidden_states, indices, weights), rtol=0.05, atol=0.1)
    assert pool.up_proj.weight.grad.dtype == torch.float32


class TestTransforms:
    """Transforms of `torch.func` and forward mode: right, or refused, but never a gradient of zero."""

    @pytest.fixture(params=[True, False], ids=["grad", "no_grad"], autouse=True)
    def grad_mode(self, request):
        with torch.set_grad_enabled(request.param):
            yield

    @staticmethod
    def layer(kernels):
        return tiny_model(tiny_config(expert_kernels=kernels)).double().model.layers[0].mlp

    def parts(self, kernels):
        """Functions of one tensor, float32 for retrieval in C, with an argument."""
        layer = self.layer(kernels)
        hidden_states, weights, indices, _ = experts(5, 6, 24, 36, torch.float64)
        yield lambda x: layer.expert_pool.up_proj(x, indices), hidden_states
        yield lambda x: layer.expert_pool.down_proj(x, indices), weights
        sub_keys = torch.randn(1, 2, 6, 8)
        yield lambda x: retrieve(x, sub_keys, 3, kernels)[1], torch.randn(5, 2, 2, 8)

    @staticmethod
    def forward_mode(function, x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    def test_forward_mode_needs_the_literal_experts(self):
        for function, x in self.parts("cpu"):
            for run in (
                lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
                self.forward_mode,
                lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
                lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(torch.stack([x, x])),
            ):
                with pytest.raises(RuntimeError, match=r'Forward-mode.*need `expert_kernels="eager"`'):
                    run(function, x)

    def test_the_literal_experts_have_forward_mode(self):
        layer = self.layer("eager")
        x, direction = torch.randn(2, 1, 3, 24, dtype=torch.float64)
        difference = (layer(x + 1e-6 * direction) - layer(x - 1e-6 * direction)) / 2e-6
        tangent = torch.func.jvp(layer, (x,), (direction,))[1]
        torch.testing.assert_close(tangent, difference, rtol=1e-5, atol=1e-7)

    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    def test_vmap(self):
        for function, x in self.parts("cpu"):
            several = torch.stack([x, 2 * x, -x])
            expected = torch.stack([function(each) for each in several])
            torch.testing.assert_close(torch.func.vmap(function)(several), expected)
