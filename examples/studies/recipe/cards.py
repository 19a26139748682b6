# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Model cards of what the recipe study compares."""

import math
from pathlib import Path

from huggingface_hub import ModelCard

from common.pictures import look_of
from studies.common.study_folder import write_text
from studies.common.trained_models import card_of_run
from studies.common.training_plan import CORPUS, Run, budget_name
from studies.recipe.results import Results


def make_cards(results: Results) -> dict[str, ModelCard]:
    """
    Makes the card of each model that is compared at equal FLOPs or at equal seconds, by a name for its repository. Its
    figures are means over the seeds of the comparison. A model that diverged with one of them has no card.
    """
    runs = {
        f"{variant}-{budget_name(budget)}-flops": own
        for budget in results.plan.budgets
        for variant, own in results.compared(budget).items()
    }
    last = results.plan.budgets[-1]
    for variant, own in results.compared_at_equal_seconds().items():
        if own not in runs.values():
            runs[f"{variant}-seconds-of-{budget_name(last)}-flops"] = own
    return {
        name: card_of_run(
            name,
            own[0],
            [results.runs[run.name]["losses"] for run in own],
            results.plan,
            called(own[0]),
            "recipe",
        )
        for name, own in runs.items()
        if all(math.isfinite(results.runs[run.name]["losses"][CORPUS]) for run in own)
    }


def called(run: Run) -> str:
    """The variant of a run that is compared, and which trial of its tuning it has, counted as in the tables."""
    label = look_of(run.variant).label or run.variant
    return label if run.ablation is None else f"{label}, trial {int(run.ablation[1]) + 1} of the tuning"


def write_cards(results: Results, folder: Path) -> None:
    """Writes the cards as files into a folder."""
    for name, card in make_cards(results).items():
        write_text(folder / f"{name}.md", str(card))
