# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
The linear halves of experts in Triton, without a GPU: what its interpreter computes, held against Algorithm 1 in
float64. See `test_triton_machine_code.py` for what its compiler makes of the kernels.
"""

import itertools
import math
import platform
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from kernel_cases import literal_down, literal_up
from torch.nn import functional as F

from modeling_peer.ops import kernels_triton
from modeling_peer.ops.experts import run_expert_pool
from modeling_peer.ops.kernels import resolve_kernels
from modeling_peer.ops.kernels_triton import TritonKernels
from modeling_peer.ops.quantized_rows import dequantize, quantize


NUM_EXPERTS = 20


class Case(NamedTuple):
    dtype: torch.dtype
    table_dtype: torch.dtype
    width: int
    num_tokens: int
    active: int

    def __str__(self):
        dtypes = "-".join(str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.table_dtype))
        return f"{dtypes}-d{self.width}-T{self.num_tokens}-A{self.active}"


DTYPES = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32, torch.bfloat16)]
CASES = [Case(*DTYPES[0], d, t, 7) for d, t in itertools.product((24, 64, 130), (0, 1, 9))]
CASES += [Case(*dtypes, 130, 5, 7) for dtypes in DTYPES[1:]]
CASES += [
    Case(torch.bfloat16, torch.float32, 130, 5, 7),
    Case(torch.float32, torch.float16, 300, 2, 40),  # more than a block, in columns and in experts of a token
    Case(torch.float32, torch.float32, 2100, 2, 5),  # more columns than a program holds
    Case(torch.float32, torch.float32, 1, 5, 1),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def inputs_of(case):
    """`hidden [T, d], weights [T, A], indices [T, A], table [N, d]`, rounded to their dtypes."""
    generator = torch.Generator().manual_seed(CASES.index(case))
    hidden, weights, table = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape, dtype in [
            ((case.num_tokens, case.width), case.dtype),
            ((case.num_tokens, case.active), case.dtype),
            ((NUM_EXPERTS, case.width), case.table_dtype),
        ]
    )
    return hidden, weights, torch.randint(NUM_EXPERTS, weights.shape, generator=generator), table


def double(*tensors):
    return [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]


def assert_rounded_once(actual, expected):
    """That `actual` is the float64 `expected` but for sums in float32 and one rounding to its dtype."""
    assert actual.shape == expected.shape
    # Halfway to the next value; the interpreter, unlike a GPU, truncates to bfloat16.
    distance = 1.01 if actual.dtype == torch.bfloat16 else 0.51
    tolerance = distance * torch.finfo(actual.dtype).eps * expected.abs() + 4e-5
    assert ((actual.double() - expected).abs() <= tolerance).all(), (actual, expected)


@pytest.mark.interpreted
class TestProjections:
    @each_case
    def test_up(self, case):
        hidden, _, indices, table = inputs_of(case)
        output = TritonKernels.up(hidden, indices, table)
        assert output.dtype == case.dtype
        assert_rounded_once(output, literal_up(hidden, indices, table))

    @pytest.mark.parametrize("many", [False, True], ids=["few-tokens", "many-tokens"])
    @each_case
    def test_down(self, case, many, monkeypatch):
        monkeypatch.setattr(kernels_triton, "MANY_TOKENS", 0 if many else math.inf)
        _, weights, indices, table = inputs_of(case)
        output = TritonKernels.down(weights, indices, table)
        assert output.dtype == case.dtype
        assert_rounded_once(output, literal_down(weights, indices, table))

    def test_tensors_need_not_be_contiguous(self):
        hidden, weights, indices, table = (tensor.T.contiguous().T for tensor in inputs_of(CASES[2]))
        up = literal_up(hidden, indices, table)
        assert_rounded_once(TritonKernels.up(hidden, indices, table), up)
        down = literal_down(weights, indices, table)
        assert_rounded_once(TritonKernels.down(weights, indices, table), down)

    def test_table_of_more_than_2_31_elements(self):
        """The last two rows; nothing else of it is ever touched."""
        table = torch.from_numpy(np.zeros((2**25 + 8, 64), np.float16))
        last = len(table) - 1
        table[last], table[last - 1] = 2, 3
        indices, ones = torch.tensor([[last, 0], [last - 1, last]]), torch.ones(2, 64)
        assert TritonKernels.up(ones, indices, table).tolist() == [[128, 0], [192, 128]]
        assert TritonKernels.down(ones[:, :2], indices, table).tolist() == [[2] * 64, [5] * 64]

    @pytest.mark.parametrize("index", [-1, NUM_EXPERTS])
    def test_indices_are_checked_on_demand(self, index, monkeypatch):
        hidden, weights, indices, table = inputs_of(CASES[2])
        indices[-1, -1] = index
        monkeypatch.setenv("MODELING_PEER_CHECK_INDICES", "1")
        for call in (
            lambda: TritonKernels.up(hidden, indices, table),
            lambda: TritonKernels.down(weights, indices, table),
            lambda: TritonKernels.group(indices.flatten(), NUM_EXPERTS),
        ):
            with pytest.raises(IndexError, match=f"got {index}"):
                call()


# tokens, active experts, width: a block and a rest, one token, an odd width, and more columns than a program holds.
QUANTIZED_SHAPES = [(9, 7, 130), (1, 7, 64), (2, 5, 25), (1, 2, 8200), (0, 7, 24)]


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", QUANTIZED_SHAPES, ids=str)
@pytest.mark.parametrize("bits, group_size", [(8, None), (8, 24), (4, 16)])
class TestQuantized:
    @staticmethod
    def inputs_of(shape, bits, group_size):
        num_tokens, active, width = shape
        generator = torch.Generator().manual_seed(0)
        hidden, weights, table = (
            torch.randn(each, generator=generator) / math.sqrt(width)
            for each in ((num_tokens, width), (num_tokens, active), (NUM_EXPERTS, width))
        )
        rows = quantize(table, bits, group_size)
        if bits == 4 and width % 2:
            rows.integers[:, -1] |= 0x70  # of no column: nobody reads it
        indices = torch.randint(NUM_EXPERTS, (num_tokens, active), generator=generator)
        return hidden, weights, indices, rows, dequantize(rows, torch.float64)

    def test_up(self, shape, bits, group_size):
        hidden, _, indices, rows, table = self.inputs_of(shape, bits, group_size)
        output = TritonKernels.up(hidden, indices, rows)
        assert_rounded_once(output, literal_up(hidden.double(), indices, table))

    @pytest.mark.parametrize("many", [False, True], ids=["few-tokens", "many-tokens"])
    def test_down(self, shape, bits, group_size, many, monkeypatch):
        monkeypatch.setattr(kernels_triton, "MANY_TOKENS", 0 if many else math.inf)
        _, weights, indices, rows, table = self.inputs_of(shape, bits, group_size)
        output = TritonKernels.down(weights.bfloat16(), indices, rows)
        assert output.dtype == torch.bfloat16
        assert_rounded_once(output, literal_down(weights.bfloat16().double(), indices, table))


@pytest.mark.interpreted
class TestPool:
    """By the name in a configuration."""

    @staticmethod
    def inputs(dtype):
        """`hidden, weights, indices` and the two tables of a layer."""
        generator = torch.Generator().manual_seed(0)
        hidden, weights, up_table, down_table = (
            torch.randn(shape, generator=generator) / math.sqrt(shape[1])
            for shape in ((9, 24), (9, 6), (NUM_EXPERTS, 24), (NUM_EXPERTS, 24))
        )
        indices = torch.randint(NUM_EXPERTS // 2, (9, 6), generator=generator)
        return hidden, weights, indices, up_table.to(dtype), down_table.to(dtype)

    @staticmethod
    def output_and_gradients(run, hidden, weights, indices, up_table, down_table):
        leaves = [leaf.clone().requires_grad_() for leaf in (hidden, weights, up_table, down_table)]
        output = run(leaves[0], leaves[1], indices, *leaves[2:])
        return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]

    @staticmethod
    def literal(hidden, weights, indices, up, down):
        return literal_down(weights * F.gelu(literal_up(hidden, indices, up)), indices, down)

    @staticmethod
    def as_a_pool(hidden, weights, indices, up, down):
        return run_expert_pool(hidden, indices, weights, up, None, down, F.gelu, resolve_kernels("triton", up))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_forward_and_backward(self, dtype):
        inputs = self.inputs(dtype)
        expected = self.output_and_gradients(self.literal, *double(*inputs))
        actual = self.output_and_gradients(self.as_a_pool, *inputs)
        assert actual[-1].dtype == dtype
        for one, reference in zip(actual, expected, strict=True):
            assert_rounded_once(one, reference)


# Where its wheels are, Triton is a part of the test environment, and its absence a failure.
@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Triton is for Linux, on x86-64."
)
def test_unavailable_reason_of_device():
    table = torch.empty(2, 2)
    assert TritonKernels.unavailable_reason(table) is not None
    with pytest.raises(RuntimeError, match="for a GPU"):
        resolve_kernels("triton", table)


def test_without_triton():
    """Everything can be imported, and says what is missing."""
    program = """
import sys
sys.modules["triton"] = None
import torch
import modeling_peer, modeling_peer.optim.row_adamw_triton
from modeling_peer.ops.kernels_triton import TritonKernels
print(TritonKernels.unavailable_reason(torch.empty(2, 2)))
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "Triton is not installed.\n"
