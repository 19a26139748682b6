# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs scripts and packages of examples/ in the process of the tests."""

import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest


def run_main(module: ModuleType, *flags: object, **options: Any) -> None:
    """Runs the `main` of a script, or of the `__main__` of a package, as if these were its flags."""
    with tempfile.TemporaryDirectory() as cache, pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(cache))
        patch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
        patch.setattr(module, "setup_logging", lambda _: None, raising=False)  # would outlast the test
        module.main(**options)
