# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What the kernels in Triton share: where they can run, how they are launched, and a check of what they read."""

import os

import torch

from .native import refuse_index


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


# Triton's decorator reads the variable too, when this module is imported: kernels run either on a GPU, or in Python on
# a CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Elements that a program holds at a time, of one row or of several.
MOST_ELEMENTS = 2**13

# Elements that a thread holds, of one row and of all of them: four loads of 16 bytes in float32, and 8.
ELEMENTS_OF_ROW = 16
ELEMENTS_OF_ROWS = 32


def can_run_on(device: torch.device) -> bool:
    """Whether kernels run on tensors of a device."""
    return triton is not None and device.type == ("cpu" if INTERPRETED else "cuda")


def row_blocks(width: int, rows: int, most_columns: int = MOST_ELEMENTS) -> dict[str, int]:
    """
    Options of a kernel that reads rows of a table of this width, `rows` of them at a time if they are not very wide.
    The width is known to the compiler, and thereby how many bytes a load may have.
    """
    columns = min(triton.next_power_of_2(width), most_columns)
    rows = min(rows, MOST_ELEMENTS // columns)
    warps = max(columns // (32 * ELEMENTS_OF_ROW), rows * columns // (32 * ELEMENTS_OF_ROWS), 1)
    return {"WIDTH": width, "ROWS": rows, "COLUMNS": columns, "num_warps": warps}


def launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """Launch a kernel on the device of its first argument."""
    # Triton launches on the current device, and a model may be spread over several.
    with torch.cuda.device_of(arguments[0]):
        start(kernel, grid, arguments, options)


def start(kernel, grid, arguments, options):
    kernel[grid](*arguments, **options)


def check_indices(indices: torch.Tensor, num_rows: int) -> None:
    """
    Raise `IndexError` for an index that is out of range, if the environment variable `MODELING_PEER_CHECK_INDICES` is
    1: kernels would read whatever is there, and to look on every call would make the host wait for the GPU.
    """
    if os.environ.get("MODELING_PEER_CHECK_INDICES") == "1" and ((indices < 0) | (indices >= num_rows)).any():
        refuse_index(indices, num_rows)
