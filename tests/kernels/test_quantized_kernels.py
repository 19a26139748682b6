# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Experts whose tables are quantized, on every implementation, against Algorithm 1 in float64 on what they mean."""

import pytest
import torch
from kernel_cases import experts, literal_down, literal_up

from modeling_peer.ops import kernels_torch
from modeling_peer.ops.kernels import KERNELS
from modeling_peer.ops.kernels_cpu import CpuKernels
from modeling_peer.ops.native import call
from modeling_peer.ops.quantized_rows import dequantize, quantize


FORMATS = [(8, None), (8, 24), (4, None), (4, 16), (4, 64)]

# tokens, active experts, width, experts: several vectors and a rest, no token, fewer tokens than threads, odd widths.
SHAPES = [(33, 16, 150, 50), (0, 6, 24, 36), (1, 128, 512, 100), (5, 1, 1, 1), (9, 12, 577, 7)]


def quantized_experts(shape, bits, group_size, dtype=torch.float32):
    """hidden states, weights, indices, quantized table, and in float64 what it means"""
    hidden_states, weights, indices, table = experts(*shape, dtype)
    rows = quantize(table, bits, group_size)
    if bits == 4 and shape[2] % 2:
        rows.integers[:, -1] |= 0x70  # of no column: nobody reads it
    return hidden_states, weights, indices, rows, dequantize(rows, torch.float64)


def assert_near(actual, run, first, indices, table):
    expected, terms = (
        run(each, indices, of) for each, of in ((first.double(), table), (first.double().abs(), table.abs()))
    )
    rounding = torch.finfo(actual.dtype).eps if actual.dtype != torch.float64 else 0
    accumulation = 1e-13 if actual.dtype == torch.float64 else 2e-6
    assert actual.shape == expected.shape and actual.dtype == first.dtype
    assert ((actual.double() - expected).abs() <= rounding * expected.abs() + accumulation * terms + 1e-30).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits, group_size", FORMATS)
@pytest.mark.parametrize("name, threads", [("torch", 1), ("cpu", 1), ("cpu", 2)], indirect=["threads"])
def test_implementations(name, threads, bits, group_size, shape, monkeypatch):
    monkeypatch.setattr(kernels_torch, "PIECE_SIZE", 5000)  # several pieces, as of many tokens
    hidden_states, weights, indices, rows, table = quantized_experts(shape, bits, group_size)
    kernels = KERNELS[name]
    assert_near(kernels.up(hidden_states, indices, rows), literal_up, hidden_states, indices, table)
    assert_near(kernels.down(weights, indices, rows), literal_down, weights, indices, table)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bits, group_size", [(8, None), (4, 16)])
@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_tokens_of_other_dtypes(name, bits, group_size, dtype):
    shape = 9, 4, 40, 20
    hidden_states, weights, indices, rows, table = quantized_experts(shape, bits, group_size, dtype)
    kernels, wide = KERNELS[name], torch.float32 if name == "cpu" else torch.float64
    up, down = kernels.up(hidden_states, indices, rows), kernels.down(weights, indices, rows)
    assert up.dtype == down.dtype == dtype
    tolerance = {"rtol": 20 * torch.finfo(dtype).eps, "atol": 20 * torch.finfo(dtype).eps}
    if dtype == wide == torch.float64:
        tolerance = {"rtol": 1e-12, "atol": 1e-12}
    elif dtype == torch.float64:  # C sums in float32
        tolerance = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(up.double(), literal_up(hidden_states.double(), indices, table), **tolerance)
    torch.testing.assert_close(down.double(), literal_down(weights.double(), indices, table), **tolerance)


@pytest.mark.parametrize("bits, group_size", [(8, None), (4, 16)])
@pytest.mark.parametrize("index", [-1, 20])
def test_an_index_outside_of_the_table_is_refused(bits, group_size, index):
    hidden_states, weights, indices, rows, _ = quantized_experts((3, 4, 24, 20), bits, group_size)
    indices[1, 2] = index
    for run, first in ((CpuKernels.up, hidden_states), (CpuKernels.down, weights)):
        with pytest.raises(IndexError, match=f"got {index}"):
            run(first, indices, rows)


def test_nothing_is_written_behind_an_odd_row():
    """Where the upper half of the last byte is of no column."""
    _, weights, indices, rows, table = quantized_experts((3, 4, 25, 20), 4, None)
    output = torch.full((3 * 25 + 1,), 7.0)
    sizes = 20, 3, 4, 25, 13, rows.bytes_per_scale
    assert call("down_4", weights, indices, rows.integers, rows.scales, output, *sizes) == 0
    assert_near(output[:-1].view(3, 25), literal_down, weights, indices, table)
    assert output[-1] == 7


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": torch.randn(3, 23)}, "`hidden_states`"),
        ({"tokens": torch.randn(3, 24, device="meta")}, "`hidden_states`"),
        ({"indices": torch.zeros(3, 4, dtype=torch.int32)}, "`rows`"),
        ({"integers": torch.zeros(20, 24)}, "`integers`"),
        ({"integers": torch.zeros(19, 24, dtype=torch.int8)}, "`integers`"),
        ({"integers": torch.zeros(20, 25, dtype=torch.int8)}, "`integers`"),
        ({"scales": torch.ones(20, 2).bfloat16()}, "`scales`"),
        ({"scales": torch.ones(20, 1)}, "`scales`"),
    ],
)
def test_nothing_else_reaches_c(changes, message):
    hidden_states, _, indices, rows, _ = quantized_experts((3, 4, 24, 20), 8, None)
    tensors = {"tokens": hidden_states, "indices": indices, "integers": rows.integers, "scales": rows.scales} | changes
    table = rows._replace(integers=tensors["integers"], scales=tensors["scales"])
    with pytest.raises(ValueError, match=message):
        CpuKernels.up(tensors["tokens"], tensors["indices"], table)
