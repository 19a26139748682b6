# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The process that runs the rows of a part: its only argument is a job in JSON."""

import ctypes
import json
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from gpu.device import Device
from gpu.rows import PartFile, Row, outcome
from gpu.settings import Settings


PARTS = ("equality", "kernels", "layer", "training", "decode", "tuning", "sanitizer")

# The exit code of a process whose GPU context is lost: rows that are left need another one.
CONTEXT_LOST = 75


def part_rows(part: str, settings: Settings) -> dict[str, Row]:
    """All rows of a part by name."""
    return import_module(f"gpu.{part}").rows(settings, Device(settings.device))


def open_part(part: str, settings: Settings) -> PartFile:
    """The file of a part."""
    conditions = {**settings.sizes(), **Device(settings.device).facts()}
    return PartFile(Path(settings.output_dir, f"{part}.json"), conditions)


def run_rows(job: dict[str, Any]) -> int:
    """Runs the rows of a part that are due, while there is time. Returns the exit code."""
    settings = Settings(**job["settings"])
    if job["packages"] is not None:
        sys.path.append(job["packages"])  # last, so that what is installed comes first
    file = open_part(job["part"], settings)
    for name, row in part_rows(job["part"], settings).items():
        if not file.is_due(name, job["attempt"], job["again"]):
            continue
        if time.time() > job["deadline"]:
            return 0
        file.start(name)
        torch.manual_seed(settings.seed)
        start = time.time()
        found = outcome(row)
        if job.get("parent") not in (None, os.getppid()):
            return 0  # the command was killed, and another one may be writing the file
        file.put(name, {**found, "took": time.time() - start, "seed": settings.seed}, job["attempt"])
        print(f"{job['part']}: {name}: {summary(found)}", flush=True)
        if "error" in found and not _is_usable(Device(settings.device)):
            return CONTEXT_LOST
    return 0


def summary(found: dict[str, Any]) -> str:
    """One line on what a row found."""
    if "error" in found:
        return f"FAILED: {found['error'].splitlines()[0]}"
    if "skipped" in found:
        return f"skipped: {found['skipped']}"
    return "done" if found.get("passed", True) else "FAILED"


def _is_usable(device):
    """
    Whether the GPU still computes and captures: after an access out of bounds, nothing does in the same process, and
    after a capture that failed, the next one may not.
    """
    try:
        device.free()
        device.captured(lambda: torch.ones(1, device=device.name) + 1)()
        device.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # it ends with the command, and not after its row
    sys.exit(run_rows(json.loads(sys.argv[1])))
