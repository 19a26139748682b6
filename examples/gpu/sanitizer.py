# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
compute-sanitizer on small launches of every kernel: accesses out of bounds (memcheck) and races in shared memory
(racecheck).
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from common.subprocesses import module_environment
from gpu.device import Device
from gpu.rows import Row, SkippedError
from gpu.settings import Settings


TOOL = "compute-sanitizer"
CHECKS = ("memcheck", "racecheck")

# Where CUDA is installed if no variable says so.
CUDA_HOME = "/usr/local/cuda"

# Seconds that a check may take, and its exit code if it finds something.
MOST_SECONDS = 270
FOUND = 9


def rows(settings: Settings, device: Device) -> dict[str, Row]:
    """The checks by name."""
    return {check: functools.partial(sanitize, settings, check) for check in CHECKS}


def find_tool() -> str | None:
    """The tool, in the path of programs or where CUDA is installed."""
    installed = os.path.join(os.environ.get("CUDA_HOME", CUDA_HOME), "bin")
    return shutil.which(TOOL) or shutil.which(TOOL, path=installed)


def sanitize(settings: Settings, check: str) -> dict[str, Any]:
    """Runs the launches under a check of the tool."""
    tool = find_tool()
    if tool is None:
        raise SkippedError(f"{TOOL} is not installed; it comes with the CUDA toolkit.")
    command = [tool, "--tool", check, "--error-exitcode", str(FOUND)]
    command += [sys.executable, "-m", "gpu.small_launches", json.dumps(asdict(settings))]
    # A tensor has an allocation of its own, so that an access beyond it is seen.
    variables = {**module_environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired:
        raise SkippedError(f"{check} took longer than {MOST_SECONDS} seconds.") from None
    return {"passed": done.returncode == 0, "code": done.returncode, "output": (done.stdout + done.stderr)[-3000:]}
