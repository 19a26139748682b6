# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The default dtype and device that a process sets change neither what kernels compute nor what an optimizer keeps."""

import contextlib

import pytest
import torch
from row_tables import assert_same, random_gradients, random_table, rows_of, take_steps
from table_gradients import in_factors, random_parts
from torch import nn

from modeling_peer import RowAdamW
from modeling_peer.ops.factored_gradient import FactoredGradient
from modeling_peer.ops.kernels import KERNELS
from modeling_peer.ops.native import call
from modeling_peer.ops.quantized_rows import quantize


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
    kernels = KERNELS["cpu"]
    expected = kernels.up(hidden_states, indices, rows), kernels.down(weights, indices, rows)
    set_defaults()
    assert_same(kernels.up(hidden_states, indices, rows), expected[0])
    assert_same(kernels.down(weights, indices, rows), expected[1])


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
def test_factors_of_a_gradient(kernels, set_defaults):
    def gradient():
        return FactoredGradient(torch.empty(30, 37, dtype=torch.float32, device="cpu"), parts)

    parts = random_parts(0, 30, 37, [(5, 3), (7, 2)], kernels=kernels)
    expected = gradient().to_rows(), gradient().total_norm()
    set_defaults()
    assert_same((gradient().to_rows(), gradient().total_norm()), expected)


@pytest.mark.parametrize("layout", [torch.clone, in_factors])
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
    with pytest.raises(RuntimeError):
        call("up_8", torch.empty(3, 4, device="meta"))
