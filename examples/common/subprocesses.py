# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Modules of this folder, run in processes of their own."""

import os
import sys
from pathlib import Path


EXAMPLES = Path(__file__).parent.parent


def module_command(module: str, argument: str) -> list[str]:
    """The command that runs a module of this folder, by its dotted name, with one argument."""
    return [sys.executable, "-m", module, argument]


def module_environment(checkout: str | None = None) -> dict[str, str]:
    """
    The environment of this process, with the folder of the modules first in `PYTHONPATH`. If another checkout is
    given, its folder of modules and its package come first.
    """
    own = (str(EXAMPLES),) if checkout is None else (str(Path(checkout, "examples")), checkout)
    path = filter(None, (*own, os.environ.get("PYTHONPATH")))
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}
