# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Experts whose tables are quantized, on every implementation, against Algorithm 1 in float64 on what they mean."""

import pytest
import torch
from kernel_cases import assert_halves_near, assert_near, experts, literal_down, literal_up

from modeling_peer.ops import kernels_torch
from modeling_peer.ops.kernels import KERNELS
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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits, group_size", FORMATS)
@pytest.mark.parametrize("name, threads", [("torch", 1), ("cpu", 1), ("cpu", 2)], indirect=["threads"])
def test_implementations(name, threads, bits, group_size, shape, monkeypatch):
    monkeypatch.setattr(kernels_torch, "PIECE_SIZE", 5000)  # several pieces, as of many tokens
    hidden_states, weights, indices, rows, table = quantized_experts(shape, bits, group_size)
    assert_halves_near(KERNELS[name], hidden_states, weights, indices, rows, table)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bits, group_size", [(8, None), (4, 16)])
@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_tokens_of_other_dtypes(name, bits, group_size, dtype):
    hidden_states, weights, indices, rows, table = quantized_experts((9, 4, 40, 20), bits, group_size, dtype)
    up, down = KERNELS[name].up(hidden_states, indices, rows), KERNELS[name].down(weights, indices, rows)
    assert up.dtype == down.dtype == dtype
    # C sums in float32.
    tolerance = 20 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-12 if name == "torch" else 1e-5
    for found, expected in (
        (up, literal_up(hidden_states, indices, table)),
        (down, literal_down(weights, indices, table)),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_nothing_is_written_behind_an_odd_row():
    """Where the upper half of the last byte is of no column."""
    _, weights, indices, rows, table = quantized_experts((3, 4, 25, 20), 4, None)
    output = torch.full((3 * 25 + 1,), 7.0)
    sizes = 20, 3, 4, 25, 13, rows.bytes_per_scale
    assert call("down_4", weights, indices, rows.integers, rows.scales, output, *sizes) == 0
    terms = literal_down(weights.abs(), indices, table.abs())
    assert_near(output[:-1].view(3, 25), literal_down(weights, indices, table), terms, torch.float32)
    assert output[-1] == 7
