# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Packages that a user brings as wheels, for machines without a network."""

import zipfile
from pathlib import Path


def unpack(wheels: Path, target: Path) -> Path:
    """
    Unpacks all wheels of a folder into another, which is then for `sys.path`; nothing is installed.

    Raises:
        `ValueError`: if there are no wheels.
    """
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise ValueError(
            f"There are no wheels in --wheels {wheels}: fill it with `pip download`, see docs/on-a-gpu.md."
        )
    for file in files:
        with zipfile.ZipFile(file) as wheel:
            wheel.extractall(target)
    return target
