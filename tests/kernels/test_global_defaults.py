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
"""The default dtype and device that a process sets change neither what kernels compute nor what an optimizer keeps."""

import contextlib

import pytest
import torch
from row_tables import assert_same, by_rows, random_gradients, random_table, rows_of, take_steps
from table_gradients import random_parts
from torch import nn

from modeling_peer import RowAdamW
from modeling_peer.expert_kernels import ALL_EXPERT_KERNELS
from modeling_peer.factored_gradient import FactoredGradient
from modeling_peer.native_calls import call
from modeling_peer.quantized_kernels_cpu import SOURCE
from modeling_peer.quantized_rows import quantize


DEFAULTS = [(torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")]


@pytest.fixture(params=DEFAULTS, ids=lambda default: f"{default[0]}-{default[1]}")
def set_defaults(request):
    """A function that sets the defaults. They are what they were after the test."""
    # A context: torch 2.9.0 does not undo `set_default_device` to its end.
    with contextlib.ExitStack() as stack:

        def set_them():
            torch.set_default_dtype(request.param[0])
            stack.enter_context(torch.device(request.param[1]))

        yield set_them
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_experts(bits, set_defaults):
    """C writes float32: into a buffer of another dtype it would write too much, or too little."""
    hidden_states, weights = torch.randn(50, 512), torch.randn(50, 8)
    indices, rows = torch.randint(36, (50, 8)), quantize(torch.randn(36, 512), bits, None)
    kernels = ALL_EXPERT_KERNELS["cpu"]
    expected = kernels.quantized_up(hidden_states, indices, rows), kernels.quantized_down(weights, indices, rows)
    set_defaults()
    assert_same(kernels.quantized_up(hidden_states, indices, rows), expected[0])
    assert_same(kernels.quantized_down(weights, indices, rows), expected[1])


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
def test_factors_of_a_gradient(kernels, set_defaults):
    def gradient():
        return FactoredGradient(torch.empty(30, 37, dtype=torch.float32, device="cpu"), parts)

    parts = random_parts(0, 30, 37, [(5, 3), (7, 2)], kernels=kernels)
    expected = gradient().to_rows(), gradient().total_norm()
    set_defaults()
    assert_same((gradient().to_rows(), gradient().total_norm()), expected)


@pytest.mark.parametrize("layout", [torch.clone, by_rows])
def test_steps_of_rows(layout, set_defaults):
    table, other = random_table(), random_table()
    gradients = list(map(layout, random_gradients(3)))
    take_steps(rows_of(other), other, gradients)
    set_defaults()
    take_steps(rows_of(table), table, gradients)
    assert_same(table, other)


def test_steps_of_dense_parameters_are_counted_in_float32(set_defaults):
    """Those in bfloat16 would not be counted beyond 256."""
    parameter, other = (nn.Parameter(torch.ones(4)) for _ in range(2))
    gradient = torch.tensor([0.5, 0.5, -1.0, 2.0])
    reference = torch.optim.AdamW([other], fused=True)
    for _ in range(300):
        other.grad = gradient
        reference.step()
    set_defaults()
    optimizer = RowAdamW([parameter])
    for _ in range(300):
        parameter.grad = gradient
        optimizer.step()
    assert optimizer.state[parameter]["step"].item() == 300
    assert optimizer.state[parameter]["step"].dtype == torch.float32
    assert_same(parameter, other)


def test_c_is_given_tensors_on_the_cpu_alone():
    """Wherever a caller made them: the address of another device is none that C could read."""
    with pytest.raises(RuntimeError, match="tensors on the CPU, got one on meta"):
        call(SOURCE, "up_8", torch.empty(3, 4, device="meta"))
