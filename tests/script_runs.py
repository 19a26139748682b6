# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Scripts that run in a process of their own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


ROOT = Path(__file__).parents[1]


def run_script(script: str, *arguments, flags: Sequence[str] = (), cwd: Path | None = None, **environment: str) -> str:
    """What a script prints, in a process that finds the package and the examples."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", script, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
