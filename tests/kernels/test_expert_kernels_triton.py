# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
The linear halves of experts in Triton, without a GPU: what its interpreter computes, held against Algorithm 1 in
float64. See `test_triton_machine_code.py` for what its compiler makes of the kernels.
"""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from kernel_cases import experts, literal_down, literal_up, needs_triton
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from modeling_peer.ops import kernels, kernels_triton, triton_launch
from modeling_peer.ops.experts import run_expert_pool
from modeling_peer.ops.kernels import resolve_kernels
from modeling_peer.ops.kernels_triton import TritonKernels
from modeling_peer.ops.quantized_rows import dequantize, quantize
from modeling_peer.optim import row_adamw_triton


NUM_EXPERTS = 20

# dtypes of tokens and of the table, and their width; tokens, and active experts of each
CASES = [(torch.float32, torch.float32, d, t, 7) for d, t in itertools.product((24, 64, 130), (0, 1, 9))]
CASES += [
    (torch.bfloat16, torch.bfloat16, 130, 5, 7),
    (torch.float16, torch.float16, 130, 5, 7),
    (torch.float32, torch.bfloat16, 130, 5, 7),
    (torch.bfloat16, torch.float32, 130, 5, 7),
    (torch.float32, torch.float16, 300, 2, 40),  # more than a block, in columns and in experts of a token
    (torch.float32, torch.float32, 2100, 2, 5),  # more columns than a program holds
    (torch.float32, torch.float32, 1, 5, 1),
]


def assert_rounded_once(actual, expected, dtype):
    """That `actual` is the float64 `expected` but for sums in float32 and one rounding to its dtype."""
    assert actual.dtype == dtype and actual.shape == expected.shape
    # Halfway to the next value; the interpreter, unlike a GPU, truncates to bfloat16.
    distance = 1.01 if dtype == torch.bfloat16 else 0.51
    tolerance = distance * torch.finfo(dtype).eps * expected.abs() + 4e-5
    assert ((actual.double() - expected).abs() <= tolerance).all(), (actual, expected)


def assert_literal(monkeypatch, hidden, weights, indices, table, exact):
    """Of both halves, as of few tokens and of many; `exact` is what a quantized table means."""
    assert_rounded_once(TritonKernels.up(hidden, indices, table), literal_up(hidden, indices, exact), hidden.dtype)
    for many_tokens in (0, math.inf):
        monkeypatch.setattr(kernels_triton, "MANY_TOKENS", many_tokens)
        down = TritonKernels.down(weights, indices, table)
        assert_rounded_once(down, literal_down(weights, indices, exact), weights.dtype)


@pytest.mark.interpreted
class TestHalves:
    @pytest.mark.parametrize("dtype, table_dtype, width, num_tokens, active", CASES, ids=str)
    def test_of_plain_tables(self, dtype, table_dtype, width, num_tokens, active, monkeypatch):
        hidden, weights, indices, table = experts(num_tokens, active, width, NUM_EXPERTS, torch.float32)
        table = table.to(table_dtype)
        assert_literal(monkeypatch, hidden.to(dtype), weights.to(dtype), indices, table, table)

    def test_tensors_need_not_be_contiguous(self, monkeypatch):
        tensors = experts(9, 7, 24, NUM_EXPERTS, torch.float32)
        hidden, weights, indices, table = (tensor.T.contiguous().T for tensor in tensors)
        assert_literal(monkeypatch, hidden, weights, indices, table, table)

    # tokens, active experts, width: a block and a rest, one token, an odd width, more columns than a program holds.
    @pytest.mark.parametrize("shape", [(9, 7, 130), (1, 7, 64), (2, 5, 25), (1, 2, 8200), (0, 7, 24)], ids=str)
    @pytest.mark.parametrize("bits, group_size", [(8, None), (8, 24), (4, 16)])
    def test_of_quantized_tables(self, shape, bits, group_size, monkeypatch):
        hidden, weights, indices, table = experts(*shape, NUM_EXPERTS, torch.float32)
        hidden, weights, table = (each / math.sqrt(shape[2]) for each in (hidden, weights, table))
        rows = quantize(table, bits, group_size)
        if bits == 4 and shape[2] % 2:
            rows.integers[:, -1] |= 0x70  # of no column: nobody reads it
        exact = dequantize(rows, torch.float64)
        assert_literal(monkeypatch, hidden, weights.bfloat16(), indices, rows, exact)

    def test_of_a_table_of_more_than_2_31_elements(self):
        """The last two rows; nothing else of it is ever touched."""
        table = torch.from_numpy(np.zeros((2**25 + 8, 64), np.float16))
        last = len(table) - 1
        table[last], table[last - 1] = 2, 3
        indices, ones = torch.tensor([[last, 0], [last - 1, last]]), torch.ones(2, 64)
        assert TritonKernels.up(ones, indices, table).tolist() == [[128, 0], [192, 128]]
        assert TritonKernels.down(ones[:, :2], indices, table).tolist() == [[2] * 64, [5] * 64]


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward_of_a_pool(dtype):
    """By the name in a configuration, where half of the rows have no gradient."""
    hidden, weights, indices, up = experts(9, 6, 24, NUM_EXPERTS, torch.float32)
    down, name = up.flip(0), resolve_kernels("triton", up)
    hidden, weights, up, down = (each / math.sqrt(each.shape[1]) for each in (hidden, weights, up, down))
    indices = indices % (NUM_EXPERTS // 2)
    tensors = [hidden, weights, up.to(dtype), down.to(dtype)]
    found = []
    for run, leaves in (
        (lambda h, w, u, d: run_expert_pool(h, indices, w, u, None, d, F.gelu, name), tensors),
        (
            lambda h, w, u, d: literal_down(w * F.gelu(literal_up(h, indices, u)), indices, d),
            map(torch.Tensor.double, tensors),
        ),
    ):
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        output = run(*leaves)
        found.append([output.detach(), *torch.autograd.grad(output.square().sum(), leaves)])
    for actual, expected, of in zip(*found, [hidden, *tensors], strict=True):
        assert_rounded_once(actual, expected, of.dtype)


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


@needs_triton
@pytest.mark.parametrize("reason", [None, "no compiler", "ROCm"])
def test_on_a_gpu_auto_falls_back_and_says_why_once(reason, tmp_path, monkeypatch):
    def build(*arguments, **options):
        raise RuntimeError("no compiler")

    said = []
    monkeypatch.setattr(triton_launch.logger, "warning", said.append)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if reason == "no compiler":
        monkeypatch.setattr("triton.knobs.build.impl", build)
    elif reason == "ROCm":
        monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(kernels, "is_triton_right", lambda table: True)
    with FakeTensorMode():  # a GPU that is not here
        table = torch.empty(1, 1, device="cuda")
    triton_launch.gpu_problem.cache_clear()
    try:
        assert resolve_kernels(None, table) == resolve_kernels(None, table) == ("torch" if reason else "triton")
        assert row_adamw_triton.can_run_on(table.device) == (reason is None)
        if reason is not None:
            with pytest.raises(RuntimeError, match=reason):
                resolve_kernels("triton", table)
    finally:
        triton_launch.gpu_problem.cache_clear()
    assert len(said) == (reason is not None) and all(reason in each for each in said)
