# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What Triton's compiler makes of the kernels: no spills, few registers, loads of 16 bytes where rows are aligned."""

from typing import NamedTuple

import pytest
import torch
from kernel_cases import needs_triton
from slow_tests import slow
from triton_compiler import compile_launch, missing_target, recorded_launches

from modeling_peer.ops import kernels_triton
from modeling_peer.ops.gradient_factors import Assignments, Factors, SortedAssignments
from modeling_peer.ops.kernels_triton import TritonKernels
from modeling_peer.ops.quantized_rows import quantize
from modeling_peer.ops.retrieval_triton import _select_pairs_of, score_halves, select
from modeling_peer.optim import row_adamw_triton


pytestmark = needs_triton


class Target(NamedTuple):
    capability: int
    dtype: torch.dtype
    width: int

    def __str__(self):
        return f"sm_{self.capability}-{str(self.dtype).removeprefix('torch.')}-d{self.width}"


TARGETS = [
    Target(90, torch.bfloat16, 2048),
    Target(90, torch.float32, 512),
    Target(80, torch.bfloat16, 520),  # a multiple of 8 but not of 16
    Target(80, torch.float32, 1),
    Target(100, torch.float16, 130),
    Target(100, torch.bfloat16, 1024),
    Target(100, torch.float32, 2048),
]
# One of each capability, of each dtype and of each kind of width.
SOME_TARGETS = {0, 2, 3, 4}


@pytest.fixture(
    params=[each if i in SOME_TARGETS else pytest.param(each, marks=slow) for i, each in enumerate(TARGETS)], ids=str
)
def target(request, monkeypatch, tmp_path):
    reason = missing_target(request.param.capability)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return request.param


def compiled(launches, target, folder):
    """Machine code by the name of the kernel, and the options of its launch."""
    return {launch[0].__name__: (compile_launch(launch, target.capability, folder), launch[2]) for launch in launches}


def assert_small(code, most_registers):
    assert code.spilled_bytes == 0
    assert code.registers <= most_registers


def assert_wide_loads(code, options, target):
    """That the rows that a program holds are read 16 bytes at a time, where they are aligned to that."""
    size = options["ROWS"] * options["COLUMNS"] * target.dtype.itemsize
    if target.width % 8 == 0:
        assert code.wide_loads >= size // (16 * 32 * options["num_warps"]) >= 1


def compiled_halves(table, target, many, monkeypatch, folder):
    """Of few tokens or of many."""
    monkeypatch.setattr(kernels_triton, "MANY_TOKENS", 0 if many else 100)
    hidden, weights = (torch.zeros(shape, dtype=target.dtype) for shape in ((2, target.width), (2, 32)))
    indices = torch.zeros(2, 32, dtype=torch.int64)
    launches = recorded_launches(
        lambda: (TritonKernels.up(hidden, indices, table), TritonKernels.down(weights, indices, table))
    )
    return compiled(launches, target, folder)


@pytest.mark.parametrize("many", [False, True], ids=["few-tokens", "many-tokens"])
def test_halves(target, many, monkeypatch, tmp_path):
    table = torch.zeros(4, target.width, dtype=target.dtype)
    codes = compiled_halves(table, target, many, monkeypatch, tmp_path)
    assert codes.keys() == {"_up", "_down"}
    for code, options in codes.values():
        assert_small(code, 96)
        assert_wide_loads(code, options, target)
        # Interpreted, bfloat16 is truncated. Compiled, it is rounded.
        assert ("cvt.rn.bf16" in code.ptx) == (target.dtype == torch.bfloat16)


@pytest.mark.parametrize(
    "target, bits, group_size, many",
    [
        (TARGETS[0], 8, None, True),
        (TARGETS[0], 4, 64, False),
        (TARGETS[2], 4, 64, True),
        (TARGETS[5], 8, None, False),
    ],
    indirect=["target"],
    ids=str,
)
def test_quantized_halves(target, bits, group_size, many, monkeypatch, tmp_path):
    table = quantize(torch.zeros(4, target.width), bits, group_size)
    codes = compiled_halves(table, target, many, monkeypatch, tmp_path)
    assert codes.keys() == {"_up", "_down"}
    for code, _ in codes.values():
        assert_small(code, 255)


def factors_of(target):
    indices = torch.zeros(2, 32, dtype=torch.int64)
    assignments = Assignments(indices, 4, "torch")
    assignments.by_row = SortedAssignments(*(torch.zeros(size, dtype=torch.int32) for size in (4, 5, 64, 64)))
    return Factors(torch.zeros(2, 32), torch.zeros(2, target.width, dtype=target.dtype), assignments)


def test_gradients(target, tmp_path):
    factors = factors_of(target)

    def run():
        out, places = torch.zeros(4, target.width, dtype=target.dtype), factors.assignments.by_row.rows
        TritonKernels.row_gradient(*factors.in_groups(), out, places)
        TritonKernels.squared_norm(*factors.in_groups())

    codes = compiled(recorded_launches(run), target, tmp_path)
    assert codes.keys() == {"_sum_chunk", "_row_gradient", "_squared_norm"}
    for code, options in codes.values():
        assert_small(code, 96)
        assert_wide_loads(code, options, target)


@pytest.mark.parametrize("second_moment", ["full", "row"])
def test_steps(target, second_moment, tmp_path):
    table = torch.zeros(4, target.width, dtype=target.dtype)
    second = torch.zeros(4, target.width if second_moment == "full" else 1)
    state = {"row_steps": torch.zeros(4, dtype=torch.int32), "exp_avg": torch.zeros(table.shape), "exp_avg_sq": second}
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "rounding_seed": 3}
    launches = recorded_launches(lambda: row_adamw_triton.update_by_factors(table, state, factors_of(target), group))
    code, options = compiled(launches, target, tmp_path)["_step_row"]
    assert_small(code, 96)
    assert_wide_loads(code, options, target)
    assert ("st.global.v4.b32" in code.ptx or "st.global.v8.b32" in code.ptx) == (target.width % 8 == 0)


@pytest.mark.parametrize(
    "target, size, k",
    [
        (TARGETS[0], 1024, 16),
        (TARGETS[2], 1024, 16),
        (TARGETS[-1], 1024, 16),
        pytest.param(TARGETS[2], 1000, 32, marks=slow),
    ],
    indirect=["target"],
    ids=str,
)
def test_retrieval(target, size, k, tmp_path):
    queries, sub_keys = torch.zeros(8, 2, 2, 128), torch.zeros(1, 2, size, 128)
    indices, scores = torch.zeros(8, 2, k, dtype=torch.int64), torch.zeros(8, 2, k)

    def run():
        _select_pairs_of(*select(score_halves(queries, sub_keys), k), indices, scores)

    codes = compiled(recorded_launches(run), target, tmp_path)
    assert codes.keys() == {"_score", "_select", "_select_pairs"}
    assert "tf32" in codes["_score"][0].ptx
    for name, most_registers in (("_score", 250), ("_select", 128), ("_select_pairs", 64)):
        assert_small(codes[name][0], most_registers)
