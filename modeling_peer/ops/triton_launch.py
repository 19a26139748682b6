# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Functions that the Triton kernels share: where they can run, how they are launched, and a check of indices."""

import functools
import os
import shutil

import torch
from transformers.utils import logging

from .native import refuse_index


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


# Triton's decorator also reads this variable on import: kernels run either on a GPU, or in Python on a CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

logger = logging.get_logger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Most elements that a program holds at a time, of one row or of several.
MOST_ELEMENTS = 2**13

# Elements that a thread holds of one row and of all rows: 4 and 8 loads of 16 bytes in float32.
ELEMENTS_OF_ROW = 16
ELEMENTS_OF_ROWS = 32


# A C module like those that Triton compiles for each signature of a kernel before its first launch.
LAUNCHER = """// {}
#include <Python.h>
static struct PyModuleDef launcher = {{PyModuleDef_HEAD_INIT, "peer_launcher"}};
PyMODINIT_FUNC PyInit_peer_launcher(void) {{ return PyModule_Create(&launcher); }}
"""


def can_run_on(device: torch.device) -> bool:
    """Whether kernels run on tensors of a device."""
    if INTERPRETED:
        return triton is not None and device.type == "cpu"
    return device.type == "cuda" and gpu_problem() is None


@functools.cache
def gpu_problem() -> str | None:
    """Return a sentence that says why Triton kernels cannot run on a GPU here, and log it, or return `None`."""
    problem = None
    if triton is None:
        problem = "Triton is not installed."
    elif torch.version.hip:
        problem = "They multiply in TensorFloat-32, which Triton does not compile on ROCm."
    else:
        try:
            from triton.runtime.build import compile_module_from_src
        except ImportError:  # elsewhere in other releases, whose launcher will say what is missing
            return None
        try:
            # In the source, so that Triton's cache of compiled modules is specific to these compilers.
            compilers = os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang")
            compile_module_from_src(LAUNCHER.format(compilers), "peer_launcher")
        except Exception as error:  # it runs a compiler and imports the result
            problem = f"Triton could not compile C ({error}). Install gcc and the headers of Python, or set CC."
    if problem is not None:
        logger.warning(f"PEER runs on PyTorch operations on this GPU, slower than with Triton kernels. {problem}")
    return problem


def row_blocks(width: int, rows: int, most_columns: int = MOST_ELEMENTS) -> dict[str, int]:
    """
    Return the options of a kernel that reads rows of a table of this width, `rows` at a time unless they are very
    wide. The compiler knows the width, and thus how many bytes a load may have.
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
    Raise `IndexError` for an index out of range, if the environment variable `MODELING_PEER_CHECK_INDICES` is 1.
    Without this check kernels read whatever is there, but it makes the host wait for the GPU on every call.
    """
    if os.environ.get("MODELING_PEER_CHECK_INDICES") == "1" and ((indices < 0) | (indices >= num_rows)).any():
        refuse_index(indices, num_rows)
