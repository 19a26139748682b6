# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
That programs of a launch do not get in each other's way: their order changes nothing, and neither would running at the
same time. All other tests in the interpreter look for races too, see `conftest.py`.
"""

import pytest
import torch
from kernel_cases import experts
from retrieval_tests import random_inputs
from slow_tests import slow
from triton_programs import Race, watched_launches

from modeling_peer.ops import gradient_triton
from modeling_peer.ops.gradient_factors import Assignments, Factors
from modeling_peer.ops.kernels_triton import TritonKernels
from modeling_peer.ops.triton_launch import launch, tl, triton
from modeling_peer.optim import row_adamw_triton


pytestmark = pytest.mark.interpreted

if triton is not None:

    @triton.jit
    def _add_without_atomics(values, total, WIDTH: tl.constexpr):
        columns = tl.arange(0, WIDTH)
        value = tl.load(values + tl.program_id(0) * WIDTH + columns)
        tl.store(total + columns, tl.load(total + columns) + value)

    @triton.jit
    def _add(values, total, WIDTH: tl.constexpr):
        columns = tl.arange(0, WIDTH)
        tl.atomic_add(total + columns, tl.load(values + tl.program_id(0) * WIDTH + columns))

    @triton.jit
    def _add_and_read(values, total, WIDTH: tl.constexpr):
        columns = tl.arange(0, WIDTH)
        tl.atomic_add(total + columns, tl.load(values + tl.program_id(0) * WIDTH + columns))
        tl.load(total + columns)

    @triton.jit
    def _write_the_next(values, total, WIDTH: tl.constexpr):
        columns = tl.arange(0, WIDTH)
        tl.store(
            values + ((tl.program_id(0) + 1) % 2) * WIDTH + columns,
            tl.load(values + tl.program_id(0) * WIDTH + columns),
        )

    @triton.jit
    def _read_past_the_end(values, total, WIDTH: tl.constexpr):
        tl.load(values + (tl.program_id(0) + 1) * WIDTH + tl.arange(0, WIDTH))


@pytest.fixture(autouse=True)
def _watched():
    """The tests here watch for themselves."""


class TestTheWatch:
    @pytest.mark.parametrize("kernel", ["_add_without_atomics", "_add_and_read", "_write_the_next"])
    @pytest.mark.parametrize("seed", [None, 0])
    def test_finds_a_planted_race(self, kernel, seed):
        values, total = torch.ones(2, 4), torch.zeros(4)
        with pytest.raises(Race, match=f"{kernel}: [48] addresses"), watched_launches(seed):
            launch(globals()[kernel], (2,), values, total, WIDTH=4)

    def test_lets_atomics_pass(self):
        total = torch.zeros(4)
        with watched_launches() as launches:
            launch(_add, (2,), torch.ones(2, 4), total, WIDTH=4)
        assert total.tolist() == [2] * 4
        assert launches[0].pairs("added to").shape == (2, 8)

    def test_finds_what_is_outside(self):
        with pytest.raises(Exception, match="read outside"), watched_launches():
            launch(_read_past_the_end, (2,), torch.ones(2, 4), torch.ones(4), WIDTH=4)


HIDDEN, WEIGHTS, INDICES, TABLE = experts(9, 7, 24, 12, torch.float32)


def factors():
    return Factors(WEIGHTS, HIDDEN, Assignments(INDICES.clamp(max=6), len(TABLE), "triton"))


def gradient():
    one = factors()
    return [one.to_rows(torch.float32), one.sums(), TritonKernels.squared_norm(*one.in_groups())]


def step():
    table = TABLE.bfloat16()
    state = {"row_steps": torch.zeros(12, dtype=torch.int32)}
    state |= {"exp_avg": torch.zeros(12, 24), "exp_avg_sq": torch.zeros(12, 1)}
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "rounding_seed": 3}
    row_adamw_triton.update_by_factors(table, state, factors(), group)
    return [table, *state.values()]


def retrieval():
    queries, sub_keys = random_inputs(5, 2, 1, 40, 8)
    indices, scores = TritonKernels.retrieve(queries, sub_keys, 6)
    return [indices, scores, *TritonKernels.retrieval_gradients(scores, indices, queries, sub_keys)]


@pytest.mark.parametrize(
    "run, kernels",
    [
        (lambda: [TritonKernels.up(HIDDEN, INDICES, TABLE)], 1),
        (lambda: [TritonKernels.down(WEIGHTS, INDICES, TABLE)], 1),
        (gradient, 6),
        (step, 2),
        pytest.param(retrieval, 7, marks=slow),
    ],
    ids=["up", "down", "gradient", "step", "retrieval"],
)
def test_the_order_of_programs_does_not_matter(run, kernels, monkeypatch):
    monkeypatch.setattr(gradient_triton, "CHUNK", 4)
    results = []
    for seed in (None, 0, 1, 2):
        with watched_launches(seed) as launches:
            results.append(run())
        assert len(launches) == kernels
        assert all(each.pairs("written").shape[1] for each in launches)
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))
