# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Rows in integers of 8 and 4 bits: what each byte and scale means, how close they are, how many there are."""

import pytest
import torch

from modeling_peer.ops import quantized_rows
from modeling_peer.ops.quantized_rows import dequantize, quantize, quantized_shapes


FORMATS = [(8, None), (8, 30), (4, None), (4, 16), (4, 64)]
WIDTHS = [1, 2, 25, 64, 150]


def literal(rows, bits):
    """Element by element, as the format is described."""
    table = torch.empty(len(rows.integers), rows.width, dtype=torch.float64)
    num_bytes = rows.integers.shape[1]
    for n in range(table.shape[0]):
        for column in range(rows.width):
            byte = column if column < num_bytes else column - num_bytes
            value = int(rows.integers[n, byte])
            if bits == 4:
                half = value % 16 if column < num_bytes else value // 16
                value = half - 16 if half >= 8 else half
            table[n, column] = value * float(rows.scales[n, byte // rows.bytes_per_scale])
    return table


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bits, group_size", FORMATS)
def test_of_the_format_as_described(bits, group_size, width, monkeypatch):
    monkeypatch.setattr(quantized_rows, "PIECE_SIZE", 3 * width)
    table = torch.randn(7, width, generator=torch.Generator().manual_seed(0))
    table[2], table[3], table[4] = 0, table[3] * 1e-30, table[4] * 1e30
    rows = quantize(table, bits, group_size)
    assert (tuple(rows.integers.shape), tuple(rows.scales.shape)) == quantized_shapes(7, width, bits, group_size)
    assert rows.integers.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert torch.equal(dequantize(rows).double(), literal(rows, bits))
    assert torch.equal(dequantize(rows, torch.float64), literal(rows, bits))
    picked = torch.tensor([[4, 0, 4]])
    assert torch.equal(dequantize(rows.select(picked)), dequantize(rows)[picked])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bits, group_size, error", [(8, None, 0.009), (4, None, 0.14), (4, 64, 0.1), (4, 32, 0.09)])
def test_how_close_normal_rows_are(bits, group_size, error, dtype):
    """Relative to the size of a row. A group of zeros stays one."""
    table = torch.randn(200, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    table[0] = 0
    found = dequantize(quantize(table, bits, group_size))
    assert not found[0].any()
    distance = (found - table.float()).norm() / table.float().norm()
    assert error / 2 < distance < error


@pytest.mark.parametrize("bits, lowest", [(8, -128), (4, -8)])
def test_an_element_has_the_nearest_integer(bits, lowest):
    """By the scale as it is stored."""
    table = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    rows = quantize(table, bits, None)
    scales = rows.scales.float()
    expected = (table / scales).round().clamp(lowest, -lowest - 1) * scales
    assert torch.equal(dequantize(rows), expected)


@pytest.mark.parametrize("bits, lowest", [(8, -128), (4, -8)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_farthest_element_has_the_lowest_integer(bits, lowest, sign):
    table = sign * torch.tensor([[1.0, -2.0, 4.0, 0.5], [0.0, 0.0, -1.0, 0.25]])
    rows = quantize(table, bits, None)
    assert torch.equal(dequantize(rows), table)  # powers of two
    assert rows.scales[:, 0].tolist() == [sign * 4 / lowest, -sign / lowest]


@pytest.mark.parametrize("element", [torch.nan, torch.inf, -torch.inf])
def test_elements_without_a_size_are_refused(element):
    table = torch.randn(4, 10)
    table[2, 9] = element
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(table, 8, None)
