# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Makes a run of any kind, in a process that cannot import `__main__` of a package."""

from pathlib import Path
from typing import Any

from studies.capacity.forgetting import teach_after
from studies.capacity.plan import Run
from studies.capacity.training import store_facts


KINDS = {
    "facts": store_facts,
    "forgetting": teach_after,
    "apart": teach_after,
}


def make(run: Run, folder: Path) -> dict[str, Any]:
    """Make a run."""
    return KINDS[run.kind](run, folder)
