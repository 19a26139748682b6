# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A step on a gradient in factors is that on the rows that they sum to."""

import pytest
import torch
from row_tables import OPTIONS, assert_same, copied, rows_of
from table_gradients import literal_rows, random_parts
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.testing import assert_close

from modeling_peer.ops.factored_gradient import FactoredGradient
from modeling_peer.ops.gradient_factors import Assignments, Factors
from modeling_peer.optim import row_adamw


NUM_ROWS = 60
SHAPES = [(9, 4), (0, 3), (5, 7)]  # tokens and entries of each, of three backwards


@pytest.fixture(params=["cpu", "torch"])
def path(request, monkeypatch):
    """What moves the rows: the compiled kernel or torch operations, these in several chunks."""
    if request.param == "torch":
        monkeypatch.setattr(row_adamw.cpu, "can_update", lambda *tensors: False)
        monkeypatch.setattr(row_adamw, "CHUNK_ELEMENTS", 100)
    return request.param


def random_table(width, dtype):
    return nn.Parameter(torch.randn(NUM_ROWS, width, generator=torch.Generator().manual_seed(0)).to(dtype))


@pytest.mark.parametrize("second_moment", ["full", "row"])
@pytest.mark.parametrize("width", [1, 3, 16, 37, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_that_on_the_rows_to_the_bit(path, dtype, width, second_moment):
    """With the same kernels the sums are the same, and so is all that follows. Clipping scales one or the other."""
    states = []
    for in_factors in (True, False):
        table = random_table(width, dtype)
        optimizer = rows_of(table, second_moment=second_moment)
        for step in range(5):
            parts = random_parts(step, NUM_ROWS, width, SHAPES, dtype)
            gradient = FactoredGradient(table, parts)
            table.grad = gradient if in_factors else gradient.to_rows()
            optimizer.step()
        states.append(copied(optimizer, table))
    assert_same(*states)
    assert len(states[0]["row_steps"].unique()) > 2


@pytest.mark.parametrize("second_moment", ["full", "row"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_of_a_table_in_16_bits_is_on_sums_that_are_not_rounded(path, dtype, second_moment):
    table = random_table(37, dtype)
    optimizer = rows_of(table, second_moment=second_moment)
    parts = random_parts(0, NUM_ROWS, 37, SHAPES, dtype)
    exact = literal_rows(parts, NUM_ROWS, 37)
    table.grad = FactoredGradient(table, parts)
    optimizer.step()
    state, (beta1, beta2) = optimizer.state[table], OPTIONS["betas"]
    assert_close(state["exp_avg"].double(), (1 - beta1) * exact, rtol=1e-5, atol=1e-6)
    squares = exact.square() if second_moment == "full" else exact.square().mean(1, keepdim=True)
    assert_close(state["exp_avg_sq"].double(), (1 - beta2) * squares, rtol=1e-5, atol=1e-6)
    assert torch.equal(state["row_steps"] > 0, exact.ne(0).any(1))


def test_after_clipping_is_that_on_clipped_rows(path):
    tables = []
    for in_factors in (True, False):
        table = random_table(37, torch.float64)
        optimizer = rows_of(table)
        for step in range(3):
            gradient = FactoredGradient(table, random_parts(step, NUM_ROWS, 37, SHAPES, torch.float64))
            table.grad = gradient if in_factors else gradient.to_rows()
            assert clip_grad_norm_([table], 0.5) > 0.5
            optimizer.step()
        tables.append(table.detach())
    assert_close(*tables, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("second_moment", ["full", "row"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_whose_entries_cancel_are_not_touched(path, dtype, second_moment):
    """Nor are those that no entry names, and those whose coefficients are zero."""
    table = random_table(37, dtype)
    optimizer = rows_of(table, second_moment=second_moment)
    before = table.detach().clone()
    tokens = torch.ones(3, 37).to(dtype)
    indices = torch.tensor([[4, 9, 30], [4, 9, 31], [59, 7, 7]])
    coefficients = torch.tensor([[2.0, 1.0, 0.0], [-2.0, 1.0, 0.0], [0.5, 3.0, -3.0]])
    table.grad = FactoredGradient(table, [Factors(coefficients, tokens, Assignments(indices, NUM_ROWS, "cpu"))])
    optimizer.step()
    moved = [9, 59]
    assert table.ne(before).any(1).nonzero()[:, 0].tolist() == moved
    for name, value in optimizer.state[table].items():
        assert value.view(NUM_ROWS, -1).ne(0).any(1).nonzero()[:, 0].tolist() == moved, name


def test_without_entries_moves_nothing(path):
    table = random_table(37, torch.float32)
    optimizer = rows_of(table)
    before = table.detach().clone()
    for parts in ([], [Factors.empty(table)], random_parts(0, NUM_ROWS, 37, [(0, 3)])):
        table.grad = FactoredGradient(table, parts)
        optimizer.step()
    assert torch.equal(table, before) and not optimizer.state[table]["row_steps"].any()
