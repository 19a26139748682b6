# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Factored gradients in Triton, in its interpreter, against sums in float64."""

import math

import numpy as np
import pytest
import torch
from table_gradients import literal_rows, random_parts
from torch.testing import assert_close

from modeling_peer.ops import gradient_triton
from modeling_peer.ops.factored_gradient import FactoredGradient
from modeling_peer.ops.gradient_factors import Assignments, Factors
from modeling_peer.ops.kernels_torch import TorchKernels
from modeling_peer.ops.kernels_triton import TritonKernels


pytestmark = pytest.mark.interpreted

NUM_ROWS = 12
SIZES = [
    (0, 24, torch.float32),
    (1, 24, torch.float32),
    (17, 1, torch.float32),
    (17, 64, torch.float32),
    (17, 130, torch.bfloat16),
    (9, 130, torch.float16),
]


@pytest.fixture(params=["in-chunks", "in-one", "in-columns"])
def blocks(request, monkeypatch):
    """Entries of a row are summed in chunks of a few or all at once, in several programs where rows are wide."""
    monkeypatch.setattr(gradient_triton, "CHUNK", 4 if request.param == "in-chunks" else 256)
    if request.param == "in-columns":
        monkeypatch.setattr(
            gradient_triton,
            "row_blocks",
            lambda width, rows: {"WIDTH": width, "ROWS": rows, "COLUMNS": 32, "num_warps": 1},
        )


def factors_of(num_tokens, width=24, dtype=torch.float32, seed=0):
    """Of rows of which some are named very often, and the last two by none."""
    (factors,) = random_parts(seed, NUM_ROWS, width, [(num_tokens, 7)], dtype, "triton")
    return of_other_rows(factors, factors.assignments.rows.clamp(max=NUM_ROWS - 3))


def of_other_rows(factors, rows):
    """With other rows for the same coefficients."""
    return Factors(factors.coefficients, factors.tokens, Assignments(rows, NUM_ROWS, "triton"))


def changed(factors, tokens=None, coefficients=None):
    """With other tokens and coefficients at some places."""
    new = {"tokens": factors.tokens.clone(), "coefficients": factors.coefficients.clone()}
    for name, changes in (("tokens", tokens or {}), ("coefficients", coefficients or {})):
        for place, value in changes.items():
            new[name][place] = value
    return Factors(**new, assignments=factors.assignments)


def assert_rows(actual, expected):
    eps = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(actual.dtype, 1e-6)
    assert_close(actual.double(), expected, rtol=eps, atol=1e-5)


def assert_sums(factors, dtype=torch.float32, exact=None):
    """That their rows, sums by group and norm are those of `exact`, or of themselves, in float64."""
    expected = literal_rows([factors] if exact is None else exact, NUM_ROWS, factors.tokens.shape[1])
    rows, sums, groups = factors.to_rows(dtype), factors.sums(), factors.assignments.by_row
    assert (rows.dtype, sums.dtype) == (dtype, torch.float32)
    assert_rows(rows, expected)
    assert_rows(sums, expected[groups.rows.long()] * (groups.starts.diff() > 0)[:, None])
    norm = TritonKernels.squared_norm(*factors.in_groups())
    assert norm.dtype == torch.float64 and norm.shape == ()
    assert_close(norm, expected.square().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 33])
def test_groups_are_those_of_torch_and_empty_ones(num_tokens):
    indices = factors_of(num_tokens).assignments.rows.flatten()
    rows, starts, order = TritonKernels.group(indices, NUM_ROWS)
    expected_rows, expected_starts, expected_order = TorchKernels.group(indices, NUM_ROWS)
    count = len(expected_rows)
    assert rows.dtype == starts.dtype == order.dtype == torch.int32
    assert len(rows) == len(starts) - 1 == min(len(indices), NUM_ROWS)
    assert rows[:count].equal(expected_rows)
    assert starts[: count + 1].equal(expected_starts)
    assert order.equal(expected_order)
    assert (starts[count:] == len(indices)).all()
    assert ((rows >= 0) & (rows < NUM_ROWS)).all()


class TestSums:
    @pytest.mark.parametrize("num_tokens, width, dtype", SIZES, ids=str)
    def test_are_literal(self, blocks, num_tokens, width, dtype):
        assert_sums(factors_of(num_tokens, width, dtype), dtype)

    def test_of_a_row_that_all_name(self, blocks):
        factors = factors_of(50)
        assert_sums(of_other_rows(factors, torch.full_like(factors.assignments.rows, 5)))

    def test_of_rows_that_one_assignment_names(self):
        (factors,) = random_parts(0, NUM_ROWS, 24, [(6, 1)], kernels="triton")
        factors = of_other_rows(factors, torch.arange(6)[:, None])
        assert_sums(factors)
        unused = changed(factors, coefficients={3: 0})
        assert_sums(changed(unused, {3: math.nan}), exact=[unused])

    @pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 13])
    @pytest.mark.parametrize("start", [0, 1, 3])
    def test_wherever_chunks_begin_and_end(self, monkeypatch, start, length):
        monkeypatch.setattr(gradient_triton, "CHUNK", 4)
        indices = torch.tensor([0] * start + [1] * length + [2] * 3)[:, None]
        coefficients = torch.arange(1.0, len(indices) + 1)[:, None]
        factors = Factors(coefficients, torch.ones(len(indices), 3), Assignments(indices, 3, "triton"))
        assert factors.to_rows(torch.float32).double().equal(literal_rows([factors], 3, 3))

    def test_zero_coefficients_pass_over_what_is_no_number(self, blocks):
        unused = changed(factors_of(33), coefficients={4: 0, 7: 0})
        factors = changed(unused, {4: math.nan, (7, 0): math.inf})
        assert_sums(factors, exact=[unused])
        factors = changed(factors, coefficients={(4, 2): 1})
        row = factors.assignments.rows[4, 2]
        assert factors.to_rows(torch.float32).isnan().any(1).nonzero().tolist() == [[row.item()]]
        assert TritonKernels.squared_norm(*factors.in_groups()).isnan()

    def test_leave_other_rows_as_they_are(self):
        factors = factors_of(5)
        out = torch.full((NUM_ROWS, 24), 7.0)
        groups = factors.assignments.by_row
        TritonKernels.row_gradient(*factors.in_groups(), out, groups.rows)
        named = torch.zeros(NUM_ROWS, dtype=torch.bool)
        named[factors.assignments.rows.flatten()] = True
        assert not named.all() and not (groups.starts.diff() > 0).all()
        assert (out[~named] == 7).all()
        assert_rows(out[named], literal_rows([factors], NUM_ROWS, 24)[named])

    def test_into_a_table_of_more_than_2_31_elements(self):
        out = torch.from_numpy(np.zeros((2**25 + 8, 64), np.float16))
        last = len(out) - 1
        ones = torch.ones(2, 64)
        factors = Factors(
            ones[:, :2], ones, Assignments(torch.tensor([[last, 0], [last - 1, last]]), len(out), "triton")
        )
        TritonKernels.row_gradient(*factors.in_groups(), out, factors.assignments.by_row.rows)
        assert out[-2:].tolist() == [[1] * 64, [2] * 64]

    def test_of_several_backwards(self):
        """And summed, as they are where they take more memory than their rows, with empty groups too."""
        several = [factors_of(5, seed=seed) for seed in (0, 1, 2)]
        gradient = FactoredGradient(torch.empty(NUM_ROWS, 24), several)
        assert_sums(gradient.factors, exact=several)
        assert not (gradient.factors.assignments.by_row.starts.diff() > 0).all()
        assert_sums(gradient.factors.summed(), exact=several)
        assert FactoredGradient(gradient, [gradient.factors.summed()]).is_finite()
