# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Makes one run of the recipe study, in a process of its own: see studies/common/single_run.py.

    python -m studies.recipe.single_run RUN.json
"""

from typing import Any

from transformers import Trainer

from studies.common.single_run import main
from studies.recipe.trials import apply_trial, share_initialization
from studies.recipe.variants import register_variants


def change(work: dict[str, Any], trainer: Trainer) -> None:
    """Give the model the initialization that runs of a seed share, and apply the trial of the run to its trainer."""
    share_initialization(trainer.model, work["run"]["seed"])
    apply_trial(trainer, **work["run"]["trial"])


if __name__ == "__main__":
    register_variants()
    main(change)
