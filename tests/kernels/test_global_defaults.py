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


def halves_of_experts(table):
    """C writes float32: into a buffer of another dtype it would write too much, or too little."""
    hidden_states, weights, indices = torch.randn(50, 512), torch.randn(50, 8), torch.randint(36, (50, 8))
    return lambda: (KERNELS["cpu"].up(hidden_states, indices, table), KERNELS["cpu"].down(weights, indices, table))


def factors_of_a_gradient(kernels):
    parts = random_parts(0, 30, 37, [(5, 3), (7, 2)], kernels=kernels)
    gradient = FactoredGradient(torch.empty(30, 37), parts)
    return lambda: (FactoredGradient(gradient, parts).to_rows(), FactoredGradient(gradient, parts).total_norm())


def steps_of_rows(layout):
    tables, gradients = [random_table(), random_table()], list(map(layout, random_gradients(3)))

    def run():
        table = tables.pop()
        take_steps(rows_of(table), table, gradients)
        return table.detach()

    return run


def steps_of_dense_parameters(gradient):
    """Counted in float32: those in bfloat16 would not be counted beyond 256."""
    parameters = [nn.Parameter(torch.ones(4)) for _ in range(2)]

    def run():
        parameter = parameters.pop()
        optimizer = RowAdamW([parameter])
        take_steps(optimizer, parameter, 300 * [gradient])
        assert optimizer.state[parameter]["step"].item() == 300
        return parameter.detach(), optimizer.state[parameter]["step"]

    return run


@pytest.mark.parametrize(
    "make, argument",
    [
        (halves_of_experts, quantize(torch.randn(36, 512), 8, None)),
        (halves_of_experts, quantize(torch.randn(36, 512), 4, None)),
        (factors_of_a_gradient, "cpu"),
        (factors_of_a_gradient, "torch"),
        (steps_of_rows, torch.clone),
        (steps_of_rows, in_factors),
        (steps_of_dense_parameters, torch.tensor([0.5, 0.5, -1.0, 2.0])),
    ],
)
def test_results_do_not_depend_on_them(make, argument, set_defaults):
    run = make(argument)
    expected = run()
    set_defaults()
    assert_same(run(), expected)
