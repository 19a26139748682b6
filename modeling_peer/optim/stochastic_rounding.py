# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Stochastic rounding of a table in 16 bits. Rounding to the nearest loses a step that is smaller than half the distance
to the next number. Rounding up with the right probability moves the right share of the elements.

The random bits are a hash of a seed, the row, how often the row was moved, and the column. Nothing is drawn, so that
resumed training and every implementation round the same way.
"""

import torch


ROUNDED = (torch.bfloat16, torch.float16)


def random_bits(seed: int, rows: torch.Tensor, steps: torch.Tensor, width: int) -> torch.Tensor:
    """
    32 random bits for each element of some rows: int64, from 0 to 2^32 - 1, `(num_rows, width)`. `steps` is how often
    each row was moved, with this step.
    """
    of_row = _mix(_mix(seed + rows.long() * 0x9E3779B1) + steps.long() * 0x85EBCA77)
    columns = torch.arange(width, device=rows.device) * 0xC2B2AE3D
    return _mix(of_row[:, None] + columns)


def _mix(x):
    """The finalizer of MurmurHash3, of 32 bits, in int64."""
    low = 0xFFFFFFFF
    x = x & low
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & low
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & low
    return x ^ (x >> 16)


def round_stochastically(values: torch.Tensor, dtype: torch.dtype, bits: torch.Tensor) -> torch.Tensor:
    """
    Round float32 numbers to bfloat16 or float16, up with the probability that makes the mean exact. See
    [`random_bits`].
    """
    pattern = values.view(torch.int32).long() & 0xFFFFFFFF
    if dtype == torch.bfloat16:
        rounded = ((pattern + (bits >> 16)) >> 16).where(values == values, (pattern >> 16) | 0x40)
        return _from_bits(rounded, dtype)
    sign, magnitude = pattern >> 16 & 0x8000, pattern & 0x7FFFFFFF
    normal = (magnitude - (112 << 23) + (bits >> 19)) >> 13
    subnormal = (values.abs() * 2.0**24 + (bits >> 19).float() * 2.0**-13).clamp(max=2.0**11).long()
    rounded = subnormal.where(magnitude < 113 << 23, normal)
    rounded = rounded.where(magnitude < 143 << 23, 0x7C00).where(values == values, 0x7E00)
    return _from_bits(rounded | sign, dtype)


def _from_bits(pattern, dtype):
    return (pattern & 0xFFFF).to(torch.uint16).view(dtype)
