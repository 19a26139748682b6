# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Tuning constants of the kernels: block sizes, numbers of warps, sizes of pieces. Every candidate of a constant is timed
with all others as they are, and the best is named with the line to change.

A constant that the kernels here do not have is passed over. After a change the part `equality` says whether results
are still right.
"""

import functools
import math
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any
from unittest import mock

from gpu.device import Device
from gpu.inputs import Latest
from gpu.kernels import Retrieval, Tables
from gpu.rows import Row, SkippedError
from gpu.settings import Settings


# A candidate must be faster by this factor to be worth a change.
LEAST_GAIN = 1.03


@dataclass(frozen=True)
class Constant:
    """A constant of a module, values to try, and the operations whose times depend on it."""

    module: str
    name: str
    candidates: tuple[int, ...]
    operations: tuple[str, ...]
    kernels: str = "triton"

    @property
    def file(self) -> str:
        """The file that holds it."""
        return self.module.replace(".", "/") + ".py"


ROW_READERS = ("up", "down", "row_gradient", "step")

CONSTANTS = (
    Constant("modeling_peer.ops.kernels_triton", "ROWS", (1, 2, 4, 8, 16), ("up", "down")),
    Constant("modeling_peer.ops.triton_launch", "ELEMENTS_OF_ROW", (4, 8, 16, 32, 64), ROW_READERS),
    Constant("modeling_peer.ops.triton_launch", "ELEMENTS_OF_ROWS", (8, 16, 32, 64, 128), ROW_READERS),
    Constant("modeling_peer.ops.gradient_triton", "ASSIGNMENTS", (1, 2, 4, 8), ("row_gradient", "step")),
    Constant("modeling_peer.ops.gradient_triton", "CHUNK", (64, 128, 256, 512), ("row_gradient", "step")),
    Constant("modeling_peer.ops.retrieval_triton", "PIECE_SIZE", (2**21, 2**22, 2**23, 2**24, 2**25), ("retrieve",)),
    Constant("modeling_peer.ops.retrieval_triton", "SCORES_PER_WARP", (2**8, 2**9, 2**10, 2**11), ("retrieve",)),
    Constant("modeling_peer.ops.kernels_torch", "PIECE_SIZE", (2**18, 2**20, 2**24, 2**26), ("up", "down"), "torch"),
)


def rows(settings: Settings, device: Device) -> dict[str, Row]:
    """A measurement for each constant."""
    tables, retrieval = Latest(Tables, device), Latest(Retrieval, device)
    return {
        f"{constant.file}: {constant.name}": functools.partial(tune, settings, device, constant, tables, retrieval)
        for constant in CONSTANTS
    }


def tune(settings: Settings, device: Device, constant: Constant, tables: Latest, retrieval: Latest) -> dict[str, Any]:
    """The times of all candidates of a constant, relative to that of its value."""
    if constant.kernels not in (settings.kernels, "torch"):
        raise SkippedError(f"It is a constant of the kernels {constant.kernels!r}, not of {settings.kernels!r}.")
    try:
        module = import_module(constant.module)
        present = getattr(module, constant.name)
    except (ImportError, AttributeError):
        raise SkippedError("The kernels here have no such constant.") from None
    # Of torch's operations, which are slow, one width tells enough.
    widths = settings.layer_widths if constant.kernels == settings.kernels else settings.layer_widths[:1]
    seconds: dict[int, list[float]] = {}
    failed: dict[int, str] = {}
    for value in dict.fromkeys((present, *constant.candidates)):
        seconds[value] = []
    for width in widths:
        calls = _calls(settings, constant, width, tables, retrieval)
        for value in list(seconds):
            with mock.patch.object(module, constant.name, value):
                try:
                    seconds[value] += [device.seconds(call, settings.repetitions) for call in calls]
                except Exception as error:  # a candidate may need more registers or shared memory than there is
                    failed[value] = f"{type(error).__name__}: {error}"
                    del seconds[value]
    times = {value: relative_time(some, seconds[present]) for value, some in seconds.items()}
    best = min(times, key=times.get)
    return {
        "file": constant.file,
        "name": constant.name,
        "present": present,
        "best": best if times[best] * LEAST_GAIN < 1 else present,
        "times": times,
        "failed": failed,
    }


def _calls(settings, constant, width, tables, retrieval):
    if constant.operations == ("retrieve",):
        operations = retrieval(settings).operations()
    else:
        at = settings if constant.kernels == settings.kernels else replace(settings, kernels=constant.kernels)
        operations = tables(at, width, "unique").operations()
    return [operations[name] for name in constant.operations]


def relative_time(some: list[float], present: list[float]) -> float:
    """The geometric mean of the ratios of times."""
    return math.exp(sum(math.log(a / b) for a, b in zip(some, present, strict=True)) / len(present))


def line_to_change(found: dict[str, Any]) -> str | None:
    """The line that a measurement suggests. `None` if the present value is as good."""
    if found["best"] == found["present"]:
        return None
    gain = 1 / found["times"][str(found["best"])]
    return f"{found['file']}: {found['name']} = {found['best']}  # was {found['present']}, {gain:.2f} times as fast"
