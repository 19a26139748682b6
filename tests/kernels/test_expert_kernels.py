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
"""Every implementation of the experts against the literal one in float64, and the operators in front of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from optimum.quanto import freeze, qint8, quantize
from tiny_models import random_tokens, tiny_config, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from modeling_peer import ExpertKernelsInterface, PeerForCausalLM
from modeling_peer.expert_kernels import (
    ALL_EXPERT_KERNELS,
    expert_down,
    expert_row_gradient,
    expert_up,
    resolve_kernels,
)
from modeling_peer.expert_kernels_cpu import CpuKernels
from modeling_peer.expert_kernels_torch import EagerKernels, TorchKernels
from modeling_peer.key_grid import expert_cell, expert_index
from modeling_peer.product_key_retrieval import product_key_retrieval, product_key_retrieval_gradients, retrieve
from modeling_peer.sparse_gradients import check_sparse_gradients


ROOT = Path(__file__).parents[2]
IMPLEMENTATIONS = ["torch", "cpu"]

# tokens, active experts, width, experts: none, one, widths with and without a rest, far more repeats than experts.
SHAPES = [(0, 6, 24, 36), (1, 6, 7, 36), (1, 128, 512, 1000), (5, 1, 1, 1), (33, 16, 130, 50), (300, 12, 64, 7)]

# A unit in the last place of what is stored; sums are taken in more.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(autouse=True, params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def experts(num_tokens, active, width, num_experts, dtype, seed=0):
    """hidden states, weights, indices, table"""
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(num_tokens, width, generator=generator).to(dtype)
    weights = torch.randn(num_tokens, active, generator=generator).to(dtype)
    indices = torch.randint(num_experts, (num_tokens, active), generator=generator)
    return hidden_states, weights, indices, torch.randn(num_experts, width, generator=generator).to(dtype)


def assert_near(actual, expected, terms, dtype):
    """`expected` in float64; `terms` bounds the sum of the sizes of what was added up."""
    assert actual.dtype == dtype
    bound = (
        TOLERANCES[dtype] * expected.abs().clamp(min=torch.finfo(dtype).tiny)
        + 2 * TOLERANCES[torch.promote_types(dtype, torch.float32)] * terms
    )
    assert ((actual.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
class TestImplementations:
    def test_up(self, name, shape, dtype):
        hidden_states, _, indices, table = experts(*shape, dtype)
        exact = hidden_states.double(), indices, table.double()
        terms = EagerKernels.up(exact[0].abs(), indices, exact[2].abs())
        actual = ALL_EXPERT_KERNELS[name].up(hidden_states, indices, table)
        assert_near(actual, EagerKernels.up(*exact), terms, dtype)

    def test_down(self, name, shape, dtype):
        _, weights, indices, table = experts(*shape, dtype)
        exact = weights.double(), indices, table.double()
        terms = EagerKernels.down(exact[0].abs(), indices, exact[2].abs())
        actual = ALL_EXPERT_KERNELS[name].down(weights, indices, table)
        assert_near(actual, EagerKernels.down(*exact), terms, dtype)

    def test_row_gradient(self, name, shape, dtype):
        tokens, coefficients, indices, table = experts(*shape, dtype)
        exact, sizes = torch.zeros(table.shape).double(), torch.zeros(table.shape).double()
        for t in range(shape[0]):
            for a in range(shape[1]):
                product = coefficients[t, a].double() * tokens[t].double()
                exact[indices[t, a]] += product
                sizes[indices[t, a]] += product.abs()
        rows, values = ALL_EXPERT_KERNELS[name].row_gradient(coefficients, tokens, indices, dtype)
        assert torch.equal(rows, indices.unique())
        assert_near(values, exact[rows], sizes[rows], dtype)
        out = torch.zeros_like(table)
        assert ALL_EXPERT_KERNELS[name].row_gradient(coefficients, tokens, indices, dtype, out=out) is None
        assert_near(out, exact, sizes, dtype)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "tokens_dtype, table_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_tokens_and_table_may_differ_in_dtype(name, tokens_dtype, table_dtype):
    hidden_states, weights, indices, table = experts(9, 4, 40, 20, torch.float32)
    hidden_states, weights, table = hidden_states.to(tokens_dtype), weights.to(tokens_dtype), table.to(table_dtype)
    up = ALL_EXPERT_KERNELS[name].up(hidden_states, indices, table)
    down = ALL_EXPERT_KERNELS[name].down(weights, indices, table)
    assert up.dtype == down.dtype == tokens_dtype
    tolerance = {"rtol": 2**-7, "atol": 2**-7}
    torch.testing.assert_close(
        up.double(), EagerKernels.up(hidden_states.double(), indices, table.double()), **tolerance
    )
    torch.testing.assert_close(
        down.double(), EagerKernels.down(weights.double(), indices, table.double()), **tolerance
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_as_torch_rounds(dtype):
    """Every number there is comes in as it is; subnormal, huge and special ones go out as torch rounds them."""
    bits = torch.arange(2**16).to(torch.uint16).view(dtype)
    table = bits[:, None].expand(-1, 33).contiguous()  # a vector, or two, and a rest
    every = torch.arange(2**16)[:, None]
    one = torch.ones(2**16, 1)
    rows = ALL_EXPERT_KERNELS["cpu"].down(one, every, table)
    torch.testing.assert_close(rows, table.float(), rtol=0, atol=0, equal_nan=True)

    numbers = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0)).int()
    numbers = torch.cat(
        [numbers.view(torch.float32), bits.float(), torch.tensor([65519.9, 65520.0, 2**-25, 3 * 2**-26])]
    )
    tokens = numbers[:, None].expand(-1, 33).contiguous()
    every = torch.arange(len(numbers))[:, None]
    _, values = ALL_EXPERT_KERNELS["cpu"].row_gradient(torch.ones_like(numbers)[:, None], tokens, every, dtype)
    torch.testing.assert_close(values, tokens.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_tokens_need_not_be_contiguous(name):
    hidden_states, weights, indices, table = experts(8, 5, 24, 36, torch.float64)
    kernels = ALL_EXPERT_KERNELS[name]
    strided = [torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in (hidden_states, weights, indices, table)]
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert torch.equal(kernels.up(strided[0], strided[2], strided[3]), kernels.up(hidden_states, indices, table))
    assert torch.equal(kernels.down(strided[1], strided[2], strided[3]), kernels.down(weights, indices, table))
    dense = kernels.row_gradient(weights, hidden_states, indices, torch.float64)
    for actual, expected in zip(
        kernels.row_gradient(strided[1], strided[0], strided[2], torch.float64), dense, strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("index", [-1, 36])
def test_an_index_outside_of_the_table_is_refused(index):
    hidden_states, weights, indices, table = experts(3, 5, 24, 36, torch.float32)
    indices[1, 2] = index
    for run in (
        lambda: expert_up(hidden_states, indices, table, "cpu", False),
        lambda: expert_down(weights, indices, table, "cpu", False),
        lambda: expert_row_gradient(weights, hidden_states, indices, 36, torch.float32, "cpu"),
    ):
        with pytest.raises(IndexError, match=f"below their number 36, got {index}"):
            run()


class TestWithoutGradients:
    """Kernels are called themselves where no operator is needed: nothing may reach them that C would misread."""

    @pytest.fixture(autouse=True)
    def no_grad(self):
        with torch.no_grad():
            yield

    def test_traced(self):
        layer = tiny_model(tiny_config()).model.layers[0].mlp
        hidden_states = torch.randn(1, 4, 24)
        traced = torch.jit.trace(layer, hidden_states)
        torch.testing.assert_close(traced(hidden_states), layer(hidden_states))

    def test_quantized(self):
        model = tiny_model(tiny_config("dense", "peer"))
        tokens, expected = random_tokens(2, 5), None
        quantize(model, weights=qint8)
        freeze(model)
        with torch.enable_grad():
            expected = model(tokens).logits
        torch.testing.assert_close(model(tokens).logits, expected)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"hidden_states": torch.randn(3, 24)}, r"hidden_states.*\(5, 24\).*\(3, 24\)"),
            ({"hidden_states": torch.randn(5, 20)}, r"hidden_states.*\(5, 24\).*\(5, 20\)"),
            ({"weights": torch.randn(5, 7)}, r"weights.*\(5, 6\).*\(5, 7\)"),
            ({"indices": torch.zeros(5, 6, dtype=torch.int32)}, "indices.*int64.*int32"),
            ({"hidden_states": torch.randn(5, 24, device="meta")}, "CPU together.*meta"),
        ],
    )
    def test_refused(self, changes, message):
        hidden_states, weights, indices, _ = experts(5, 6, 24, 36, torch.float32)
        arguments = {"hidden_states": hidden_states, "weights": weights, "indices": indices} | changes
        pool = tiny_model(tiny_config()).model.layers[0].mlp.expert_pool
        with pytest.raises(ValueError, match=message):
            pool.up_proj(arguments["hidden_states"], arguments["indices"])
            pool.down_proj(arguments["weights"], arguments["indices"])

    def test_a_weight_that_is_computed_is_computed_once(self):
        class Counted(torch.nn.Module):
            calls = 0

            def forward(self, weight):
                self.calls += 1
                return weight

        table = tiny_model(tiny_config()).model.layers[0].mlp.expert_pool.up_proj
        counted = Counted()
        torch.nn.utils.parametrize.register_parametrization(table, "weight", counted, unsafe=True)
        counted.calls = 0
        table(torch.randn(2, 24), torch.zeros(2, 3, dtype=torch.int64))
        assert counted.calls == 1


class TestRegistry:
    def test_on_a_cpu_auto_is_cpu(self):
        """Or the suite would not have tested what users run. A compiler is a part of this project's environment."""
        for dtype in TOLERANCES:
            assert resolve_kernels("auto", torch.empty(1, 1, dtype=dtype)) == "cpu"

    def test_auto_takes_what_any_device_has(self):
        assert resolve_kernels("auto", torch.empty(1, 1, device="meta")) == "torch"
        assert resolve_kernels("auto", torch.empty(1, 1, dtype=torch.complex64)) == "torch"

    def test_one_that_cannot_run_is_refused_by_name(self):
        with pytest.raises(RuntimeError, match=r'expert_kernels="triton".*"auto"'):
            resolve_kernels("triton", torch.empty(1, 1))
        with pytest.raises(RuntimeError, match=r'expert_kernels="cpu".*meta'):
            resolve_kernels("cpu", torch.empty(1, 1, device="meta"))

    def test_ones_own_runs_in_a_model(self):
        class Doubled(TorchKernels):
            @staticmethod
            def up(hidden_states, indices, table):
                return 2 * TorchKernels.up(hidden_states, indices, table)

        ExpertKernelsInterface.register("doubled", Doubled)
        try:
            model = tiny_model(tiny_config(expert_act=None))
            hidden_states = torch.randn(1, 4, 24)
            expected = 2 * model.model.layers[0].mlp(hidden_states)
            model.config.expert_kernels = "doubled"
            torch.testing.assert_close(model.model.layers[0].mlp(hidden_states), expected)
        finally:
            del ALL_EXPERT_KERNELS._global_mapping["doubled"]

    @pytest.mark.parametrize("name", ["eager", "torch", "cpu"])
    def test_a_model_does_not_depend_on_it(self, name):
        model = tiny_model(tiny_config("peer", "pkm", gated_experts=True)).double().train()
        tokens = random_tokens(3, 9)
        outcomes = []
        for kernels in ("eager", name):
            model.config.expert_kernels = kernels
            assert model.model.layers[0].mlp.expert_pool.up_proj.kernels == kernels
            model.zero_grad()
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            outcomes.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        for actual, expected in zip(*outcomes, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def samples(kernels, sparse=False):
    """Every operator with arguments."""
    hidden_states, weights, indices, table = experts(5, 6, 24, 36, torch.float32)
    hidden_states, weights, table = (x.requires_grad_() for x in (hidden_states, weights, table))
    yield expert_up, (hidden_states, indices, table, kernels, sparse)
    yield expert_down, (weights, indices, table, kernels, sparse)
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

    @pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
    def test_gradients_are_those_of_the_literal_ones(self, kernels, sparse):
        hidden_states, weights, indices, table = experts(7, 6, 24, 36, torch.float64)
        literal = {expert_up: EagerKernels.up, expert_down: EagerKernels.down}
        for operator, first in ((expert_up, hidden_states), (expert_down, weights)):
            first, leaf = first.clone().requires_grad_(), table.clone().requires_grad_()
            output = operator(first, indices, leaf, kernels, sparse)
            direction = torch.randn_like(output)
            actual = torch.autograd.grad(output, (first, leaf), direction)
            expected = torch.autograd.grad(literal[operator](first, indices, leaf), (first, leaf), direction)
            assert actual[1].is_sparse == sparse
            if sparse:
                assert actual[1].is_coalesced()
                assert torch.equal(actual[1].indices()[0], indices.unique())
                assert torch.equal(actual[1].to_dense(), actual[1].clone().coalesce().to_dense())
            for x, y in zip(actual, expected, strict=True):
                torch.testing.assert_close(x.to_dense(), y, rtol=1e-10, atol=1e-10)

    def test_double_backward_is_refused(self, kernels):
        for operator, arguments in samples(kernels):
            if operator in (expert_row_gradient, product_key_retrieval_gradients):
                continue
            outputs = operator(*arguments)
            output = outputs[0] if isinstance(outputs, tuple) else outputs
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


def test_exported():
    layer = tiny_model(tiny_config()).model.layers[0].mlp
    hidden_states = torch.randn(2, 5, 24)
    program = torch.export.export(
        layer, (hidden_states,), dynamic_shapes=({1: torch.export.Dim("length", min=2, max=64)},)
    )
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {name.partition(".")[2].partition(".")[0] for name in operators} >= {
        "expert_up",
        "expert_down",
        "product_key_retrieval",
    }
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


class TestRetrieval:
    """`product_key_topk` is held against brute force in `test_product_key_retrieval.py`, and the rest against it here."""

    @pytest.mark.parametrize(
        "num_tokens, num_heads, num_sets, size, half_size, k",
        [
            (5, 2, 1, 6, 4, 3),
            (7, 2, 2, 6, 4, 6),
            (0, 2, 1, 6, 4, 2),
            (1, 8, 1, 256, 128, 16),
            (33, 8, 8, 100, 20, 16),
            (64, 3, 3, 37, 5, 37),
            (100, 1, 1, 300, 16, 1),
            (50, 2, 1, 512, 64, 128),
            (3, 1, 1, 1, 1, 1),
        ],
    )
    def test_cpu_equals_the_reference(self, num_tokens, num_heads, num_sets, size, half_size, k):
        generator = torch.Generator().manual_seed(num_tokens)
        queries = torch.randn(num_tokens, num_heads, 2, half_size, generator=generator).requires_grad_()
        sub_keys = torch.randn(num_sets, 2, size, half_size, generator=generator).requires_grad_()
        indices, scores = retrieve(queries, sub_keys, k, "cpu")
        exact = [x.detach().double().requires_grad_() for x in (queries, sub_keys)]
        exact_indices, exact_scores = retrieve(*exact, k, "eager")
        assert torch.equal(indices, exact_indices)
        torch.testing.assert_close(scores.double(), exact_scores, rtol=1e-5, atol=1e-5)
        direction = torch.randn(scores.shape, generator=generator)
        actual = torch.autograd.grad(scores, (queries, sub_keys), direction)
        expected = torch.autograd.grad(exact_scores, exact, direction.double())
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)

    def test_ties(self):
        """Any of equal experts will do; none twice, and none that is worse."""
        queries = torch.randint(0, 2, (50, 3, 2, 4)).float()
        sub_keys = torch.randint(0, 2, (1, 2, 40, 4)).float()
        indices, scores = retrieve(queries, sub_keys, 8, "cpu")
        assert torch.equal(scores, retrieve(queries, sub_keys, 8, "torch")[1])
        rows, columns = expert_cell(indices)
        assert torch.equal(expert_index(rows, columns), indices)
        halves = torch.einsum("thpc,pnc->thpn", queries, sub_keys[0])
        assert torch.equal(scores, halves[:, :, 0].gather(-1, rows) + halves[:, :, 1].gather(-1, columns))
        assert all(len(set(row.tolist())) == 8 for row in indices.flatten(0, 1))

    def test_all_equal_and_minus_infinity(self):
        for value in (0.0, float("-inf")):
            queries, sub_keys = torch.ones(4, 2, 2, 1), torch.full((1, 2, 37, 1), value)
            sub_keys[0, :, 3] = 1.0
            indices, scores = retrieve(queries, sub_keys, 5, "cpu")
            assert (indices[..., 0] == expert_index(torch.tensor(3), torch.tensor(3))).all()
            assert (scores[..., 0] == 2.0).all()
            assert indices.min() >= 0
            assert indices.max() < 37**2

    def test_not_a_number_is_seen(self):
        queries, sub_keys = torch.randn(4, 2, 2, 3), torch.randn(1, 2, 37, 3)
        queries[1, 0] = float("nan")
        indices, scores = retrieve(queries, sub_keys, 5, "cpu")
        assert indices.min() >= 0
        assert indices.max() < 37**2
        weights = scores.softmax(-1)
        assert weights[1, 0].isnan().any()
        assert weights[0].isfinite().all()

    @pytest.mark.parametrize("query", [3e38, float("inf"), float("nan")])
    def test_opposite_infinities(self, query):
        """The sum of a pair may be no number though both its scores are."""
        queries, sub_keys = torch.full((1, 1, 2, 2), query), torch.rand(1, 2, 256, 2) * 5 + 1
        sub_keys[0, 1] *= -1
        indices, scores = retrieve(queries, sub_keys, 16, "cpu")
        assert indices.min() >= 0
        assert indices.max() < 256**2
        assert scores.softmax(-1).isnan().any()

    @pytest.mark.parametrize("frozen", [0, 1], ids=["queries", "sub_keys"])
    def test_what_is_frozen_gets_no_gradient(self, frozen, monkeypatch):
        """Nor is it computed."""
        computed = []

        def gradients(*arguments):
            computed.append([each.numel() > 0 for each in retrieval_gradients(*arguments)])
            return retrieval_gradients(*arguments)

        retrieval_gradients = CpuKernels.retrieval_gradients
        monkeypatch.setattr(CpuKernels, "retrieval_gradients", staticmethod(gradients))
        leaves = [torch.randn(9, 2, 2, 8, requires_grad=True), torch.randn(2, 2, 6, 8, requires_grad=True)]
        _, scores = retrieve(*leaves, 3, "cpu")
        gradient = torch.randn_like(scores)
        expected = torch.autograd.grad(scores, leaves, gradient)[1 - frozen]
        leaves[frozen].requires_grad_(False)
        retrieve(*leaves, 3, "cpu")[1].backward(gradient)
        assert leaves[frozen].grad is None
        assert torch.equal(leaves[1 - frozen].grad, expected)
        assert computed == [[True, True], [which != frozen for which in range(2)]]

    @pytest.mark.parametrize("number", [-1, 36])
    def test_gradients_of_an_expert_that_is_not_there(self, number):
        queries, sub_keys = torch.randn(2, 1, 2, 3), torch.randn(1, 2, 6, 3)
        indices = torch.tensor([[[0, 35]], [[number, 1]]])
        with pytest.raises(IndexError, match=rf"at least 0 and below their number 36, got {number}"):
            CpuKernels.retrieval_gradients(torch.randn(2, 1, 2), indices, queries, sub_keys)

    @pytest.mark.parametrize("flags", ["-mno-avx512f", "-mno-avx512f -mno-avx2 -mno-avx"])
    def test_on_processors_with_narrower_registers(self, flags):
        test = f"{__file__}::TestRetrieval::test_cpu_equals_the_reference"
        environment = os.environ | {"CC": f"{os.environ.get('CC') or 'cc'} {flags}"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
            env=environment,
            capture_output=True,
        )
        assert done.returncode == 0, done.stdout[-2000:].decode()

    def test_the_backward_leaves_other_sub_keys_alone(self):
        queries, sub_keys = torch.randn(3, 2, 2, 8), torch.randn(1, 2, 100, 8, requires_grad=True)
        indices, scores = retrieve(queries, sub_keys, 4, "cpu")
        scores.square().sum().backward()
        touched = sub_keys.grad[0].abs().sum(-1) > 0
        for half, selected in enumerate(expert_cell(indices)):
            assert set(touched[half].nonzero().flatten().tolist()) == set(selected.flatten().tolist())


class TestSparseGradients:
    def test_of_a_model_equal_the_dense_ones(self):
        model = tiny_model(tiny_config("peer", "pkm", "peer", share_experts_across_layers=True)).double().train()
        tokens, grads = random_tokens(3, 9), []
        for sparse in (False, True):
            model.config.sparse_expert_gradients = sparse
            model.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
        for name, dense in grads[0].items():
            is_table = any(part in name for part in ("expert_pool", "values"))
            assert grads[1][name].is_sparse == is_table
            torch.testing.assert_close(grads[1][name].to_dense(), dense, rtol=1e-12, atol=1e-15)

    def test_the_literal_experts_have_them_too(self):
        model = tiny_model(tiny_config(expert_kernels="eager", sparse_expert_gradients=True)).train()
        tokens = random_tokens(3, 9)
        model(tokens, labels=tokens).loss.backward()
        assert model.model.layers[0].mlp.expert_pool.up_proj.weight.grad.is_sparse

    def test_the_norm_is_that_of_the_dense_gradient(self):
        gradient = torch.sparse_coo_tensor(
            [[0, 2, 0]], torch.randn(3, 4, dtype=torch.float64), (5, 4), check_invariants=True
        )
        for order in (2, 1, float("inf")):
            actual = torch.linalg.vector_norm(gradient, order)
            torch.testing.assert_close(actual, torch.linalg.vector_norm(gradient.to_dense(), order))

    def test_refused_where_torch_compiles(self):
        torch._dynamo.reset()
        model = tiny_model(tiny_config(sparse_expert_gradients=True)).train()
        tokens = random_tokens(2, 5)
        with pytest.raises(Exception, match=r"sparse_expert_gradients.*torch\.compile.*False"):
            torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, labels=tokens)
        compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
        with torch.no_grad():  # nothing to refuse
            torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)

    @pytest.fixture
    def one_process(self):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        dist.destroy_process_group()

    def test_refused_under_fsdp2(self, one_process):
        model = PeerForCausalLM(tiny_config(sparse_expert_gradients=True))
        fully_shard(model.model.layers[0], mesh=one_process)
        tokens = random_tokens(2, 5)
        with pytest.raises(ValueError, match=r"sparse_expert_gradients.*FSDP2.*set it to False"):
            model.train()(tokens, labels=tokens)
        model.config.sparse_expert_gradients = False
        model(tokens, labels=tokens).loss.backward()

    def test_refused_where_tables_are_split(self, one_process):
        model = PeerForCausalLM(tiny_config(sparse_expert_gradients=True))
        table = model.model.layers[0].mlp.expert_pool.up_proj
        table.weight = torch.nn.Parameter(distribute_tensor(table.weight.data, one_process, [Shard(1)]))
        with pytest.raises(ValueError, match=r"sparse_expert_gradients.*tensor parallelism.*set it to False"):
            check_sparse_gradients(model.model)

    def test_refused_under_nccl(self, monkeypatch):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "get_backend", lambda: "cpu:gloo,cuda:nccl")
        with pytest.raises(ValueError, match=r"sparse_expert_gradients.*NCCL.*set it to False"):
            check_sparse_gradients(PeerForCausalLM(tiny_config(sparse_expert_gradients=True)))


# Forward and backward of a layer with 512² experts, 256 tokens of width 256, one thread: literal time over native time.
GAIN = 11
FASTER = """
import time, torch
from modeling_peer import PeerConfig
from modeling_peer.feed_forward_peer import PeerFeedForward
config = PeerConfig(hidden_size=256, num_attention_heads=4, num_experts=512**2)
layer = PeerFeedForward(config, 0)
for parameter in layer.parameters():
    torch.nn.init.normal_(parameter, std=0.05)
def seconds(kernels):
    config.expert_kernels, config.sparse_expert_gradients = kernels, kernels == "cpu"
    layer.zero_grad()
    start = time.perf_counter()
    layer(torch.randn(1, 256, 256)).square().sum().backward()
    return time.perf_counter() - start
times = [(seconds("eager"), seconds("cpu")) for _ in range(9)][2:]
literal, native = (sorted(column)[3] for column in zip(*times))
print(literal / native)
"""


def test_native_is_faster_than_literal():
    """A fifth of what was measured must stay, on any machine and under any load."""
    process = subprocess.run(
        [sys.executable, "-c", FASTER], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert float(process.stdout) > GAIN / 5
