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
"""Experts whose tables are quantized, on every implementation, against Algorithm 1 in float64 on what they mean."""

import pytest
import torch
from kernel_cases import experts

from modeling_peer import expert_kernels_torch
from modeling_peer.expert_kernels import ALL_EXPERT_KERNELS
from modeling_peer.expert_kernels_cpu import CpuKernels
from modeling_peer.expert_kernels_torch import EagerKernels
from modeling_peer.native_calls import call
from modeling_peer.quantized_kernels_cpu import SOURCE
from modeling_peer.quantized_operators import quantized_down, quantized_up
from modeling_peer.quantized_rows import dequantize, quantize


FORMATS = [(8, None), (8, 24), (4, None), (4, 16), (4, 64)]

# tokens, active experts, width, experts: several vectors and a rest, no token, fewer tokens than threads, odd widths.
SHAPES = [(33, 16, 150, 50), (0, 6, 24, 36), (1, 128, 512, 100), (5, 1, 1, 1), (9, 12, 577, 7)]


def quantized_experts(shape, bits, group_size, dtype=torch.float32):
    """hidden states, weights, indices, quantized table, and in float64 what it means"""
    hidden_states, weights, indices, table = experts(*shape, dtype)
    rows = quantize(table, bits, group_size)
    if bits == 4 and shape[2] % 2:
        rows.integers[:, -1] |= 0x70  # of no column: nobody reads it
    return hidden_states, weights, indices, rows, dequantize(rows, torch.float64)


def assert_near(actual, run, first, indices, table):
    expected, terms = (
        run(each, indices, of) for each, of in ((first.double(), table), (first.double().abs(), table.abs()))
    )
    rounding = torch.finfo(actual.dtype).eps if actual.dtype != torch.float64 else 0
    accumulation = 1e-13 if actual.dtype == torch.float64 else 2e-6
    assert actual.shape == expected.shape and actual.dtype == first.dtype
    assert ((actual.double() - expected).abs() <= rounding * expected.abs() + accumulation * terms + 1e-30).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits, group_size", FORMATS)
@pytest.mark.parametrize("name, threads", [("torch", 1), ("cpu", 1), ("cpu", 2)], indirect=["threads"])
def test_implementations(name, threads, bits, group_size, shape, monkeypatch):
    monkeypatch.setattr(expert_kernels_torch, "PIECE_SIZE", 5000)  # several pieces, as of many tokens
    hidden_states, weights, indices, rows, table = quantized_experts(shape, bits, group_size)
    kernels = ALL_EXPERT_KERNELS[name]
    assert_near(kernels.quantized_up(hidden_states, indices, rows), EagerKernels.up, hidden_states, indices, table)
    assert_near(kernels.quantized_down(weights, indices, rows), EagerKernels.down, weights, indices, table)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bits, group_size", [(8, None), (4, 16)])
@pytest.mark.parametrize("name", ["eager", "torch", "cpu"])
def test_tokens_of_other_dtypes(name, bits, group_size, dtype):
    shape = 9, 4, 40, 20
    hidden_states, weights, indices, rows, table = quantized_experts(shape, bits, group_size, dtype)
    kernels, wide = ALL_EXPERT_KERNELS[name], torch.float32 if name == "cpu" else torch.float64
    up, down = kernels.quantized_up(hidden_states, indices, rows), kernels.quantized_down(weights, indices, rows)
    assert up.dtype == down.dtype == dtype
    tolerance = {"rtol": 20 * torch.finfo(dtype).eps, "atol": 20 * torch.finfo(dtype).eps}
    if dtype == wide == torch.float64:
        tolerance = {"rtol": 1e-12, "atol": 1e-12}
    elif dtype == torch.float64:  # C sums in float32
        tolerance = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(up.double(), EagerKernels.up(hidden_states.double(), indices, table), **tolerance)
    torch.testing.assert_close(down.double(), EagerKernels.down(weights.double(), indices, table), **tolerance)


@pytest.mark.parametrize("bits, group_size", [(8, None), (4, 16)])
class TestOperators:
    @pytest.mark.parametrize("name", ["torch", "cpu"])
    def test_gradients_are_those_of_the_literal_algorithm(self, name, bits, group_size):
        hidden_states, weights, indices, rows, table = quantized_experts((9, 4, 41, 20), bits, group_size)
        leaves = [each.clone().requires_grad_() for each in (hidden_states, weights)]
        exact = [each.double().requires_grad_() for each in (hidden_states, weights)]
        neurons = quantized_up(leaves[0], indices, *rows, name)
        quantized_down(leaves[1] * neurons.relu(), indices, *rows, name).square().sum().backward()
        neurons = EagerKernels.up(exact[0], indices, table)
        EagerKernels.down(exact[1] * neurons.relu(), indices, table).square().sum().backward()
        for leaf, reference in zip(leaves, exact, strict=True):
            torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=1e-4, atol=1e-3)

    def test_a_second_derivative_is_refused(self, bits, group_size):
        hidden_states, _, indices, rows, _ = quantized_experts((3, 4, 24, 20), bits, group_size)
        output = quantized_up(hidden_states.requires_grad_(), indices, *rows, "cpu")
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(output.sum(), hidden_states, create_graph=True)

    def test_as_torch_wants_operators(self, bits, group_size):
        hidden_states, weights, indices, rows, _ = quantized_experts((3, 4, 25, 20), bits, group_size)
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        for operator, first in ((quantized_up, hidden_states), (quantized_down, weights)):
            arguments = (first.requires_grad_(), indices, *rows, "cpu")
            torch.library.opcheck(operator, arguments, test_utils=checks)

    @pytest.mark.parametrize("index", [-1, 20])
    def test_an_index_outside_of_the_table_is_refused(self, bits, group_size, index):
        hidden_states, weights, indices, rows, _ = quantized_experts((3, 4, 24, 20), bits, group_size)
        indices[1, 2] = index
        for operator, first in ((quantized_up, hidden_states), (quantized_down, weights)):
            with pytest.raises(IndexError, match=f"below the number of experts 20, got {index}"):
                operator(first, indices, *rows, "cpu")


def test_nothing_is_written_behind_an_odd_row():
    """Where the upper half of the last byte is of no column."""
    _, weights, indices, rows, table = quantized_experts((3, 4, 25, 20), 4, None)
    output = torch.full((3 * 25 + 1,), 7.0)
    sizes = 20, 3, 4, 25, 13, rows.bytes_per_scale
    assert call(SOURCE, "down_4", weights, indices, rows.integers, rows.scales, output, *sizes) == 0
    assert_near(output[:-1].view(3, 25), EagerKernels.down, weights, indices, table)
    assert output[-1] == 7


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": torch.randn(3, 23)}, r"`hidden_states`.*\(3, 24\), got \(3, 23\)"),
        ({"tokens": torch.randn(3, 24, device="meta")}, "`hidden_states`.*on the CPU, got.*meta"),
        ({"indices": torch.zeros(3, 4, dtype=torch.int32)}, "`indices`.*torch.int64, got torch.int32"),
        ({"integers": torch.zeros(20, 24)}, "`integers`.*torch.int8 or torch.uint8, got torch.float32"),
        ({"integers": torch.zeros(19, 24, dtype=torch.int8)}, r"`scales`.*\(19, 1\), got \(20, 1\)"),
        ({"integers": torch.zeros(20, 25, dtype=torch.int8)}, r"`integers`.*\(20, 24\), got \(20, 25\)"),
        ({"scales": torch.ones(20, 2).bfloat16()}, r"`scales`.*\(20, 1\), got \(20, 2\)"),
        ({"integers": torch.zeros(20, 11, dtype=torch.int8)}, r"`integers`.*\(20, 24\), got \(20, 11\)"),
        ({"scales": torch.ones(20, 1)}, "`scales`.*torch.bfloat16, got torch.float32"),
    ],
)
def test_nothing_else_reaches_c(changes, message):
    hidden_states, _, indices, rows, _ = quantized_experts((3, 4, 24, 20), 8, None)
    tensors = {"tokens": hidden_states, "indices": indices, "integers": rows.integers, "scales": rows.scales} | changes
    table = rows._replace(integers=tensors["integers"], scales=tensors["scales"])
    with pytest.raises(ValueError, match=message):
        CpuKernels.quantized_up(tensors["tokens"], tensors["indices"], table)
