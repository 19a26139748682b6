# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Model cards of the models of the scaling study, made from its results alone."""

from pathlib import Path

from huggingface_hub import ModelCard

from studies.common.study_folder import write_text
from studies.common.trained_models import card_of_run
from studies.common.training_plan import PEER, budget_name
from studies.scaling.plan import ablation_runs
from studies.scaling.report import Results, label


def make_cards(results: Results) -> dict[str, ModelCard]:
    """
    Makes the card of each configuration that the study trained, by a name for its repository. Sizes and learning rates
    that were not chosen get no card.
    """
    runs = {}
    for budget in results.plan.budgets:
        for variant, run in results.optimal(budget).items():
            runs[f"{variant}-{budget_name(budget)}-flops"] = run
        runs[f"{PEER}-{budget_name(budget)}-flops-seconds-of-dense"] = results.equal_seconds(budget)[1]
    runs[f"{PEER}-before-ablations"] = results.reference()
    for run in ablation_runs(results.plan, results.rates):
        runs["-".join([run.variant, *run.ablation]).replace(", ", "-").replace(" ", "-")] = run
    return {name: _card(results, run, name) for name, run in runs.items()}


def _card(results, run, name):
    """The figures of the card are means over seeds."""
    called = ", ".join([label(run.variant), *([] if run.ablation is None else [" ".join(run.ablation)])])
    return card_of_run(name, run, results.with_seeds(run), results.plan, called, "scaling")


def write_cards(results: Results, folder: Path) -> None:
    """Writes the cards as files into a folder."""
    for name, card in make_cards(results).items():
        write_text(folder / f"{name}.md", str(card))
