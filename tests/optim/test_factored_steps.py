# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A step on a gradient in factors is that on the rows that they sum to."""

import pytest
import torch
from row_tables import OPTIONS, assert_same, copied, random_table, rows_of, take_steps
from table_gradients import literal_rows, random_parts
from torch.testing import assert_close

from modeling_peer.ops.factored_gradient import FactoredGradient
from modeling_peer.ops.gradient_factors import Assignments, Factors


NUM_ROWS = 60
LAYOUTS = torch.Tensor.detach, FactoredGradient.to_rows  # factored and dense


def random_gradient(table, seed=0):
    """Of three backwards of different sizes, the second of which has no token."""
    return FactoredGradient(table, random_parts(seed, *table.shape, [(9, 4), (0, 3), (5, 7)], table.dtype))


@pytest.mark.parametrize("second_moment", ["full", "row"])
@pytest.mark.parametrize("width", [1, 3, 16, 37, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_that_on_the_rows_to_the_bit(path, dtype, width, second_moment):
    """With the same kernels the sums are the same, and so is all that follows. Clipping scales one or the other."""
    states = []
    for layout in LAYOUTS:
        table = random_table(dtype, NUM_ROWS, width)
        optimizer = rows_of(table, second_moment=second_moment)
        take_steps(optimizer, table, [layout(random_gradient(table, step)) for step in range(5)])
        states.append(copied(optimizer, table))
    assert_same(*states)
    assert len(states[0]["row_steps"].unique()) > 2


@pytest.mark.parametrize("second_moment", ["full", "row"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_of_a_table_in_16_bits_is_on_sums_that_are_not_rounded(path, dtype, second_moment):
    table = random_table(dtype, NUM_ROWS)
    optimizer = rows_of(table, second_moment=second_moment)
    gradient = random_gradient(table)
    exact = literal_rows(gradient._sum.factors, *table.shape)
    take_steps(optimizer, table, [gradient])
    state, (beta1, beta2) = optimizer.state[table], OPTIONS["betas"]
    assert_close(state["exp_avg"].double(), (1 - beta1) * exact, rtol=1e-5, atol=1e-6)
    squares = exact.square() if second_moment == "full" else exact.square().mean(1, keepdim=True)
    assert_close(state["exp_avg_sq"].double(), (1 - beta2) * squares, rtol=1e-5, atol=1e-6)
    assert torch.equal(state["row_steps"] > 0, exact.ne(0).any(1))


@pytest.mark.parametrize("second_moment", ["full", "row"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_whose_entries_cancel_are_not_touched(path, dtype, second_moment):
    """Nor are those that no entry names, and those whose coefficients are zero."""
    table = random_table(dtype, NUM_ROWS)
    optimizer = rows_of(table, second_moment=second_moment)
    before = table.detach().clone()
    indices = torch.tensor([[4, 9, 30], [4, 9, 31], [59, 7, 7]])
    coefficients = torch.tensor([[2.0, 1.0, 0.0], [-2.0, 1.0, 0.0], [0.5, 3.0, -3.0]])
    factors = Factors(coefficients, table.new_ones(3, 37), Assignments(indices, NUM_ROWS, "cpu"))
    take_steps(optimizer, table, [FactoredGradient(table, [factors])])
    moved = [9, 59]
    assert table.ne(before).any(1).nonzero()[:, 0].tolist() == moved
    for name, value in optimizer.state[table].items():
        assert value.view(NUM_ROWS, -1).ne(0).any(1).nonzero()[:, 0].tolist() == moved, name


def test_without_entries_moves_nothing(path):
    table = random_table(num_rows=NUM_ROWS)
    optimizer = rows_of(table)
    before = table.detach().clone()
    without = [], [Factors.empty(table)], random_parts(0, NUM_ROWS, 37, [(0, 3)])
    take_steps(optimizer, table, [FactoredGradient(table, parts) for parts in without])
    assert torch.equal(table, before) and not optimizer.state[table]["row_steps"].any()
