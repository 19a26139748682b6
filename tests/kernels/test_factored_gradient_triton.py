# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Factored gradients in Triton, in its interpreter, against sums in float64."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from modeling_peer.ops import gradient_triton
from modeling_peer.ops.factored_gradient import FactoredGradient
from modeling_peer.ops.gradient_factors import Assignments, Factors
from modeling_peer.ops.kernels_torch import TorchKernels
from modeling_peer.ops.kernels_triton import TritonKernels


pytestmark = pytest.mark.interpreted

NUM_ROWS = 12
SIZES = [
    (1, 24, torch.float32),
    (17, 1, torch.float32),
    (17, 64, torch.float32),
    (17, 130, torch.bfloat16),
    (9, 130, torch.float16),
]
each_size = pytest.mark.parametrize("num_tokens, width, dtype", SIZES, ids=str)


@pytest.fixture(params=[4, 256], ids=["in-chunks", "in-one"])
def chunk(request, monkeypatch):
    """Entries of a row are summed in chunks of a few, or all at once."""
    monkeypatch.setattr(gradient_triton, "CHUNK", request.param)


def indices_of(num_tokens, active=7, num_rows=NUM_ROWS, seed=0):
    """Rows of which one is named by half of all assignments, and some by none."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(num_rows - 2, (num_tokens, active), generator=generator)
    return indices.masked_fill_(torch.rand(indices.shape, generator=generator) < 0.5, 3)


def factors_of(num_tokens, width, dtype=torch.float32, kernels="triton", seed=0, **sizes):
    generator = torch.Generator().manual_seed(seed + 1)
    indices = indices_of(num_tokens, seed=seed, **sizes)
    coefficients = torch.randn(indices.shape, generator=generator)
    tokens = torch.randn(num_tokens, width, generator=generator).to(dtype)
    return Factors(coefficients, tokens, Assignments(indices, sizes.get("num_rows", NUM_ROWS), kernels))


def changed(factors, tokens=None, coefficients=None):
    """With other tokens and coefficients at some places."""
    new = {"tokens": factors.tokens.clone(), "coefficients": factors.coefficients.clone()}
    for name, changes in (("tokens", tokens or {}), ("coefficients", coefficients or {})):
        for place, value in changes.items():
            new[name][place] = value
    return Factors(**new, assignments=factors.assignments)


def expected_rows(factors):
    """The dense gradient in float64, by the letter. Coefficients of zero do not count."""
    rows = torch.zeros(factors.assignments.num_rows, factors.tokens.shape[1], dtype=torch.float64)
    indices = factors.assignments.rows.view_as(factors.coefficients)
    for token, (of_token, named) in enumerate(zip(factors.coefficients.tolist(), indices.tolist(), strict=True)):
        for coefficient, row in zip(of_token, named, strict=True):
            if coefficient != 0:
                rows[row] += coefficient * factors.tokens[token].double()
    return rows


def assert_rows(actual, expected):
    eps = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(actual.dtype, 1e-6)
    assert_close(actual.double(), expected, rtol=eps, atol=1e-5)


class TestGroups:
    @pytest.mark.parametrize("num_tokens", [0, 1, 2, 33])
    def test_are_those_of_torch_and_empty_ones(self, num_tokens):
        indices = indices_of(num_tokens).flatten()
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


class TestRows:
    @each_size
    def test_are_sums(self, chunk, num_tokens, width, dtype):
        factors = factors_of(num_tokens, width, dtype)
        expected = expected_rows(factors)
        rows = factors.to_rows(dtype)
        assert rows.dtype == dtype
        assert_rows(rows, expected)
        groups, sums = factors.assignments.by_row, factors.sums()
        assert sums.dtype == torch.float32
        assert_rows(sums, expected[groups.rows.long()] * (groups.starts.diff() > 0)[:, None])

    def test_of_no_assignments(self):
        factors = factors_of(0, 24)
        assert factors.sums().shape == (0, 24)
        assert not factors.to_rows(torch.float32).any()

    def test_a_row_that_all_name(self, chunk):
        factors = factors_of(50, 24)
        factors.assignments.rows.fill_(5)
        rows = factors.to_rows(torch.float32)
        assert_rows(rows, expected_rows(factors))
        assert rows.any(1).nonzero().tolist() == [[5]]

    @pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 13])
    @pytest.mark.parametrize("start", [0, 1, 3])
    def test_wherever_chunks_begin_and_end(self, monkeypatch, start, length):
        monkeypatch.setattr(gradient_triton, "CHUNK", 4)
        indices = torch.tensor([0] * start + [1] * length + [2] * 3)[:, None]
        coefficients = torch.arange(1.0, len(indices) + 1)[:, None]
        tokens = torch.ones(len(indices), 3)
        factors = Factors(coefficients, tokens, Assignments(indices, 3, "triton"))
        assert factors.to_rows(torch.float32).double().equal(expected_rows(factors))

    def test_wider_than_a_program(self, chunk, monkeypatch):
        monkeypatch.setattr(
            gradient_triton,
            "row_blocks",
            lambda width, rows: {"WIDTH": width, "ROWS": rows, "COLUMNS": 32, "num_warps": 1},
        )
        factors = factors_of(9, 130)
        expected = expected_rows(factors)
        assert_rows(factors.to_rows(torch.float32), expected)
        norm = TritonKernels.squared_norm(*factors.in_groups())
        assert_close(norm, expected.square().sum(), rtol=1e-6, atol=0)

    def test_zero_coefficients_pass_over_what_is_no_number(self, chunk):
        factors = changed(factors_of(33, 24), {4: math.nan, (7, 0): math.inf}, {4: 0, 7: 0})
        assert_rows(factors.to_rows(torch.float32), expected_rows(factors))
        assert TritonKernels.squared_norm(*factors.in_groups()).isfinite()
        factors = changed(factors, coefficients={(4, 2): 1})
        row = factors.assignments.rows[4, 2]
        assert factors.to_rows(torch.float32).isnan().any(1).nonzero().tolist() == [[row.item()]]
        assert TritonKernels.squared_norm(*factors.in_groups()).isnan()

    def test_other_rows_are_left_as_they_are(self):
        factors = factors_of(5, 24)
        out = torch.full((NUM_ROWS, 24), 7.0)
        groups = factors.assignments.by_row
        TritonKernels.row_gradient(*factors.in_groups(), out, groups.rows)
        named = torch.zeros(NUM_ROWS, dtype=torch.bool)
        named[factors.assignments.rows.flatten()] = True
        assert not named.all() and not (groups.starts.diff() > 0).all()
        assert (out[~named] == 7).all()
        assert_rows(out[named], expected_rows(factors)[named])

    def test_into_a_table_of_more_than_2_31_elements(self):
        out = torch.from_numpy(np.zeros((2**25 + 8, 64), np.float16))
        last = len(out) - 1
        ones = torch.ones(2, 64)
        factors = Factors(
            ones[:, :2], ones, Assignments(torch.tensor([[last, 0], [last - 1, last]]), len(out), "triton")
        )
        TritonKernels.row_gradient(*factors.in_groups(), out, factors.assignments.by_row.rows)
        assert out[-2:].tolist() == [[1] * 64, [2] * 64]


class TestNorm:
    @each_size
    def test_is_that_of_all_rows(self, chunk, num_tokens, width, dtype):
        factors = factors_of(num_tokens, width, dtype)
        norm = TritonKernels.squared_norm(*factors.in_groups())
        assert norm.dtype == torch.float64 and norm.shape == ()
        assert_close(norm, expected_rows(factors).square().sum(), rtol=1e-6, atol=0)

    def test_of_rows_that_one_assignment_names(self):
        factors = factors_of(6, 24, active=1)
        factors.assignments.rows[:] = torch.arange(6)[:, None]
        norm = TritonKernels.squared_norm(*factors.in_groups())
        assert_close(norm, expected_rows(factors).square().sum(), rtol=1e-6, atol=0)
        factors = changed(factors, {3: math.nan}, {3: 0})
        norm = TritonKernels.squared_norm(*factors.in_groups())
        assert_close(norm, expected_rows(factors).square().sum(), rtol=1e-6, atol=0)


class TestGradients:
    """What accumulates and clips gradients does so with empty groups too."""

    def gradient(self, *seeds, num_tokens=5):
        factors = [factors_of(num_tokens, 24, seed=seed) for seed in seeds]
        return FactoredGradient(torch.empty(NUM_ROWS, 24), factors), sum(map(expected_rows, factors))

    def test_of_several_backwards(self):
        gradient, expected = self.gradient(0, 1, 2)
        assert_rows(gradient.to_rows(), expected)
        assert_close(gradient.norm().double(), expected.norm(), rtol=1e-6, atol=0)

    def test_summed(self):
        gradient, expected = self.gradient(0)
        factors = gradient.factors
        assert not (factors.assignments.by_row.starts.diff() > 0).all()
        summed = factors.summed()
        assert_rows(summed.to_rows(torch.float32), expected)
        assert_close(TritonKernels.squared_norm(*summed.in_groups()).sqrt(), expected.norm(), rtol=1e-6, atol=0)
        assert FactoredGradient(gradient, [summed]).is_finite()
        sums = summed.sums()
        assert_rows(
            sums,
            expected[summed.assignments.by_row.rows.long()] * (summed.assignments.by_row.starts.diff() > 0)[:, None],
        )

    def test_are_summed_where_they_take_more_memory_than_rows(self):
        gradient, expected = self.gradient(0, num_tokens=40)
        for seed in range(1, 4):
            other, more = self.gradient(seed, num_tokens=40)
            gradient += other
            expected = expected + more
        assert len(gradient._sum.factors) == 1 and len(gradient._sum.factors[0].tokens) == NUM_ROWS
        assert_rows(gradient.to_rows(), expected)

    def test_without_rows(self):
        gradient, expected = self.gradient(0, num_tokens=20)
        frozen = torch.arange(NUM_ROWS) % 3 == 0
        gradient.set_factors([changed(gradient.factors, {2: math.nan})])
        named = torch.zeros(NUM_ROWS, dtype=torch.bool)
        named[gradient.factors.assignments.rows[2]] = True
        gradient.zero_rows(frozen | named)
        assert_rows(gradient.to_rows(), expected.masked_fill((frozen | named)[:, None], 0))
