# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Rows of a table as integers of 8 or 4 bits, with a scale for each row or for each group of its columns.

An element is its integer times the scale of its group. The scale maps the group's element farthest from zero to -128,
or to -8 with 4 bits. So every integer is used, and a scale may be negative.

Two integers of 4 bits share a byte. Byte b of a row has column b in its lower half and column `num_bytes + b` in its
upper half, so that kernels read consecutive columns from consecutive bytes. Groups are of consecutive bytes, and so
of columns in pairs. A row of odd width has a zero in the upper half of its last byte.
"""

from typing import NamedTuple

import torch
from torch import nn

from ..experts import plain_weight
from ..memory.advice import advise_huge_pages


# The dtype of scales has the range of float32. Integers are rounded with the scale as it is stored.
SCALE_DTYPE = torch.bfloat16

# By number of bits.
INTEGER_DTYPES = {8: torch.int8, 4: torch.uint8}

# Elements that are quantized at a time: 16 MB in float32.
PIECE_SIZE = 2**22


class QuantizedRows(NamedTuple):
    """
    Args:
        integers (`torch.Tensor` of shape `(*, num_bytes)`): int8, one element each, or uint8, two of 4 bits.
        scales (`torch.Tensor` of shape `(*, num_groups)`)
        width (`int`): Number of columns.
        bytes_per_scale (`int`): Number of consecutive bytes in a group. The last group may have fewer.
    """

    integers: torch.Tensor
    scales: torch.Tensor
    width: int
    bytes_per_scale: int

    @property
    def bits(self) -> int:
        return 8 if self.integers.dtype == torch.int8 else 4

    def select(self, indices: torch.Tensor) -> "QuantizedRows":
        """The rows of these indices, of any shape."""
        return self._replace(integers=self.integers[indices], scales=self.scales[indices])


def bytes_per_scale(width: int, bits: int, group_size: int | None) -> int:
    """Number of bytes in a group of `group_size` columns, the whole row of `width` columns if `None`."""
    columns = width if group_size is None else min(group_size, width)
    return -(-columns * bits // 8)


def quantized_shapes(num_rows: int, width: int, bits: int, group_size: int | None) -> tuple[tuple, tuple]:
    """The shapes of integers and scales."""
    num_bytes = -(-width * bits // 8)
    return (num_rows, num_bytes), (num_rows, -(-num_bytes // bytes_per_scale(width, bits, group_size)))


def quantize(table: torch.Tensor, bits: int, group_size: int | None) -> QuantizedRows:
    """Quantize a table of shape `(num_rows, width)`. Raises `ValueError` if an element is NaN or infinite."""
    num_rows, width = table.shape
    of_integers, of_scales = quantized_shapes(num_rows, width, bits, group_size)
    integers = advise_huge_pages(table.new_empty(of_integers, dtype=INTEGER_DTYPES[bits]))
    scales = advise_huge_pages(table.new_empty(of_scales, dtype=SCALE_DTYPE))
    span = bytes_per_scale(width, bits, group_size)
    step = max(PIECE_SIZE // max(width, 1), 1)
    for first in range(0, num_rows, step):
        piece = slice(first, first + step)
        _quantize_piece(table[piece].float(), bits, span, integers[piece], scales[piece])
    return QuantizedRows(integers, scales, width, span)


def _quantize_piece(rows, bits, span, integers, scales):
    (num_rows, num_groups), per_byte = scales.shape, 8 // bits
    # (row, place in a byte, byte), padded with zeros after the last column and in the last group.
    padded = rows.new_zeros(num_rows, per_byte, num_groups * span)
    for place in range(per_byte):
        columns = rows[:, place * integers.shape[1] : (place + 1) * integers.shape[1]]
        padded[:, place, : columns.shape[1]] = columns
    groups = padded.view(num_rows, per_byte, num_groups, span).transpose(1, 2).flatten(2)
    least, most = groups.aminmax(dim=-1)
    farthest = torch.where(-least > most, least, most)
    if not farthest.isfinite().all():
        raise ValueError("A table with NaN or infinite elements cannot be quantized.")
    lowest = -(2 ** (bits - 1))
    scales.copy_(farthest / lowest)
    by = scales.float()[..., None]
    rounded = torch.where(by == 0, 0, groups / by).round_().clamp_(lowest, -lowest - 1).to(torch.int8)
    places = rounded.view(num_rows, num_groups, per_byte, span).transpose(1, 2).flatten(2)[..., : integers.shape[1]]
    if bits == 8:
        integers.copy_(places[:, 0])
    else:
        lower, upper = places.view(torch.uint8).unbind(1)
        integers.copy_((lower & 15) | (upper << 4))


def dequantize(rows: QuantizedRows, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Convert rows to a floating-point dtype, `(*, width)`. In float32 the result is exact."""
    if rows.bits == 8:
        places = rows.integers.unsqueeze(-2)
    else:
        bytes_ = rows.integers.view(torch.int8)
        places = torch.stack([(bytes_ << 4) >> 4, bytes_ >> 4], dim=-2)
    scales = rows.scales.to(dtype).repeat_interleave(rows.bytes_per_scale, dim=-1)[..., : places.shape[-1]]
    return (places.to(dtype) * scales.unsqueeze(-2)).flatten(-2)[..., : rows.width]


def readable_rows(table: nn.Module) -> torch.Tensor | QuantizedRows | None:
    """Return the rows of a table that kernels read, or `None` if only a call of the module gives them."""
    weight = plain_weight(table)
    return getattr(table, "quantized_rows", None) if weight is None else weight
