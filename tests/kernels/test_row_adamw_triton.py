# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""AdamW's step in Triton, in its interpreter, against the same step in torch operations."""

import copy
import math
from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from modeling_peer.ops import gradient_triton, triton_check
from modeling_peer.ops.gradient_factors import Assignments, Factors
from modeling_peer.ops.triton_launch import launch, tl, triton
from modeling_peer.optim import row_adamw, row_adamw_triton
from modeling_peer.optim.stochastic_rounding import random_bits, round_stochastically


pytestmark = pytest.mark.interpreted

NUM_ROWS, WIDTH = 11, 37
OPTIONS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "rounding_seed": 2**32 - 5}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

if triton is not None:

    @triton.jit(do_not_specialize=["seed"])
    def _draw(out, rows, steps, seed, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
        place = tl.program_id(0)
        columns = tl.arange(0, COLUMNS)
        row = tl.load(rows + place)
        bits = row_adamw_triton.random_bits(seed, row, tl.load(steps + place), columns)
        tl.store(out + place * WIDTH + columns, bits.to(tl.int64), mask=columns < WIDTH)

    @triton.jit
    def _round(values, bits, out, WIDTH: tl.constexpr):
        columns = tl.arange(0, WIDTH)
        random = tl.load(bits + columns).to(tl.uint32)
        rounded = row_adamw_triton.round_stochastically(tl.load(values + columns), random, out.dtype.element_ty)
        tl.store(out + columns, rounded)


@pytest.fixture(autouse=True)
def in_triton(monkeypatch):
    monkeypatch.setattr(row_adamw.cpu, "can_update", lambda *tensors: False)


@pytest.mark.parametrize("seed", [0, 1, 16, 123456789, 2**31, 2**32 - 1])
def test_random_bits(seed):
    rows, steps = torch.tensor([0, 1, 17, 2**31 - 1]), torch.tensor([1, 2, 30, 10**6], dtype=torch.int32)
    bits = torch.empty(len(rows), WIDTH, dtype=torch.int64)
    launch(_draw, (len(rows),), bits, rows, steps, seed - (seed >> 31 << 32), WIDTH=WIDTH, COLUMNS=64)
    assert bits.equal(random_bits(seed, rows, steps, WIDTH))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rounding(dtype):
    """To the bit, for numbers of every size, and for what is no number."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-(2**31), 2**31, (2**13,), generator=generator, dtype=torch.int32).view(torch.float32)
    values[: 2**12] = torch.randn(2**12, generator=generator) * 2.0 ** torch.randint(
        -30, 20, (2**12,), generator=generator
    )
    values[:8] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 65519.99, -65520.0, 6.1e-5])
    bits = torch.randint(2**32, values.shape, generator=generator)
    out = torch.empty_like(values, dtype=dtype)
    launch(_round, (1,), values, bits, out, WIDTH=len(values))
    assert out.view(torch.int16).equal(round_stochastically(values, dtype, bits).view(torch.int16))


def table_and_state(dtype=torch.float32, second_moment="full"):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(NUM_ROWS, WIDTH, generator=generator).to(dtype)
    second = torch.zeros(NUM_ROWS, WIDTH if second_moment == "full" else 1)
    steps = torch.zeros(NUM_ROWS, dtype=torch.int32)
    return table, {"row_steps": steps, "exp_avg": torch.zeros(NUM_ROWS, WIDTH), "exp_avg_sq": second}


def factors_of(step, num_tokens=4, kernels="triton"):
    """Of half of the rows, one of them with many assignments, one with a gradient of zero."""
    generator = torch.Generator().manual_seed(step)
    indices = torch.randint(NUM_ROWS // 2, (num_tokens, 3), generator=generator) + step % 4
    indices[:, 0] = 2
    coefficients = torch.randn(indices.shape, generator=generator) * (indices != 4)
    tokens = torch.randn(num_tokens, WIDTH, generator=generator)
    return Factors(coefficients, tokens, Assignments(indices, NUM_ROWS, kernels))


def take_steps(table, state, number, group, num_tokens=4):
    """Of the table and its state, and of copies of them in torch operations, which are returned."""
    expected, expected_state = copy.deepcopy((table, state))
    for step in range(number):
        row_adamw.update_by_factors(table, state, factors_of(step, num_tokens), group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_adamw.triton, "can_update", lambda *tensors: False)
        for step in range(number):
            factors = factors_of(step, num_tokens, "torch")
            row_adamw.update_by_factors(expected, expected_state, factors, group)
    return expected, expected_state


class TestSteps:
    @pytest.mark.parametrize("second_moment", ["full", "row"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("chunk", [4, 256])
    def test_are_those_of_torch(self, monkeypatch, chunk, dtype, second_moment):
        monkeypatch.setattr(gradient_triton, "CHUNK", chunk)
        table, state = table_and_state(dtype, second_moment)
        before, version = table.clone(), table._version
        expected, expected_state = take_steps(table, state, 6, OPTIONS, num_tokens=9)
        assert table._version > version  # it changed, for autograd too
        for name, value in state.items():
            assert_close(value, expected_state[name], rtol=2e-6, atol=1e-7)
        if dtype == torch.float32:
            assert_close(table, expected, rtol=1e-6, atol=1e-6)
        else:
            # The bits are the same: what differs lay within 1e-6 of where they round up.
            differs = table != expected
            assert differs.float().mean() < 0.005
            assert_close(table, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        touched = state["row_steps"] > 0
        assert len(state["row_steps"].unique()) > 3 and not touched.all()
        assert state["row_steps"][4] == 0
        assert table[~touched].equal(before[~touched])
        assert (table != before)[touched].any(1).all()

    @pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.9), (0.9, 0.0), (0.9, 0.999)])
    def test_with_betas(self, betas):
        table, state = table_and_state()
        # Of one assignment each: a sum that cancels out decides the direction of a step where there is no history.
        expected, _ = take_steps(table, state, 3, {**OPTIONS, "betas": betas, "eps": 1e-3}, num_tokens=1)
        assert_close(table, expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("beta", [0.9, 0.95, 0.999, 0.99999])
    def test_correct_for_bias_at_any_age(self, beta):
        group = {**OPTIONS, "betas": (beta, beta), "eps": 1e-8, "weight_decay": 0.0, "lr": 1.0}
        for count in (0, 1, 7, 50, 10**3, 10**6):
            table, state = torch.zeros(NUM_ROWS, WIDTH), table_and_state()[1]
            state["row_steps"].fill_(count)
            expected, _ = take_steps(table, state, 1, group)
            assert_close(table, expected, rtol=1e-6, atol=0)

    def test_a_zero_gradient_leaves_a_row_and_not_a_number_moves_it(self):
        table, state = table_and_state()
        before = table.clone()
        indices, tokens = torch.tensor([[1, 2], [1, 3]]), torch.ones(2, WIDTH)
        tokens[1, 5] = math.nan
        factors = Factors(torch.tensor([[1.0, -1.0], [0.0, 1.0]]), tokens, Assignments(indices, NUM_ROWS, "triton"))
        row_adamw.update_by_factors(table, state, factors, OPTIONS)
        assert state["row_steps"].nonzero().flatten().tolist() == [1, 2, 3]
        assert table.isnan().nonzero().tolist() == [[3, 5]]
        again, first = table.clone(), Assignments(indices[:, :1], NUM_ROWS, "triton")
        cancelled = Factors(torch.tensor([[1.0], [-1.0]]), torch.ones(2, WIDTH), first)
        row_adamw.update_by_factors(table, state, cancelled, OPTIONS)
        assert state["row_steps"][1] == 1
        assert table[1].equal(again[1]) and not table[1].equal(before[1])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_by_dense_gradients_are_the_same(self, dtype):
        """Rows that are named as touched move, whatever their gradient: part of it may be on another device."""
        (table, state), (other, other_state) = table_and_state(dtype), table_and_state(dtype)
        row_adamw.update_by_factors(table, state, factors_of(0), OPTIONS)
        gradient = factors_of(0).to_rows(torch.float32)
        rows = gradient.any(1).nonzero()[:, 0]
        row_adamw.update_rows(other, other_state, rows, gradient, rows, OPTIONS)
        assert_close(other_state["exp_avg"], state["exp_avg"], rtol=1e-6, atol=1e-7)
        assert_close(other, table, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        row_adamw.update_rows(
            other, other_state, torch.tensor([10]), torch.zeros(1, WIDTH), torch.tensor([0]), OPTIONS
        )
        assert other_state["row_steps"][10] == 1


def test_what_it_cannot_update():
    table, state = table_and_state()
    moments = state["exp_avg"], state["exp_avg_sq"]
    assert row_adamw_triton.can_update(table, None, moments)
    in_float64 = [moment.double() for moment in moments]
    for cannot in ((table.double(), moments), (table.T, moments), (table, in_float64), (torch.empty(2, 2**14), ())):
        assert not row_adamw_triton.can_update(cannot[0], None, cannot[1])


def test_on_a_gpu_a_step_is_compared_first(monkeypatch):
    """Here on the CPU, with moments that are not written."""
    compare = partial(triton_check._compare, row_adamw._results_of_a_step, torch.device("cpu"))
    assert [compare(dtype) for dtype in DTYPES] == [None] * 3
    monkeypatch.setattr(row_adamw.triton, "_step", lambda *arguments, **options: None)
    assert all("row_steps" in compare(dtype) for dtype in DTYPES)
    monkeypatch.setattr(row_adamw.triton, "can_update", lambda *tensors: True)
    with FakeTensorMode():  # a GPU that is not here
        parameter = torch.empty(1, 1, device="cuda")
    for is_right in (False, True):
        monkeypatch.setattr(row_adamw, "is_triton_right", lambda *arguments: is_right)  # noqa: B023
        assert row_adamw._kernels_for(parameter, None, {"exp_avg": None}) is (row_adamw.triton if is_right else None)
