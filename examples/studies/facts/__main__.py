# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Measures continual learning of facts: SmolLM2-135M learns facts of the World Factbook that it does not know, with full
finetuning, LoRA and grafts, and forgetting is compared at equal learning.

    ./run study facts

Killed at any point, the same command resumes. Each run is a file in --output_dir; `results.json` and `results.png`
there sum them up. The model and the facts are packages of PyPI and npm, see studies/common/corpora.py; reading the
model needs the package `gguf`.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed
from transformers.utils import logging

from common.command_line import parse_arguments
from studies.common.arms import named_arms, run_all, run_chosen
from studies.common.study_folder import claim_folder, read_json, saved_run, sole_use, write_json
from studies.facts.arms import ARMS, Arm, train_facts
from studies.facts.report import choose_hyperparameters, describe, level_of_all, plot, read_chosen, summarize
from studies.facts.study import FactsArguments, Study, check_earlier, load_study, measure


@dataclass
class RunArguments(FactsArguments):
    """Which arms are run."""

    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": "Arms to run."})


@torch.no_grad()
def is_as_before(model: nn.Module, study: Study) -> bool | None:
    """
    Whether the model with its adapter disabled equals the base model bit for bit. `None` for a model without an
    adapter.
    """
    if not hasattr(model, "disable_adapter"):
        return None
    tokens = next(iter(study.texts.values()))[:1]
    with model.disable_adapter():
        return torch.equal(model(input_ids=tokens).logits, study.load_model()(input_ids=tokens).logits)


def run(name: str, hyperparameters: dict[str, float], seed: int, study: Study) -> dict[str, Any]:
    """Runs one arm, or reads the result of an earlier run."""
    label = {"arm": name, "settings": hyperparameters, "seed": seed}
    return saved_run(study.folder / "runs", label, lambda: teach(ARMS[name], hyperparameters, seed, study))


def teach(arm: Arm, hyperparameters: dict[str, float], seed: int, study: Study) -> dict[str, Any]:
    """
    Teaches the new facts, and returns the measured `points`, the check without the adapter and the size of what was
    trained.
    """
    before = study.folder / "before.json"
    if not before.exists():
        write_json(before, measure(study.load_model(), study))
    set_seed(seed)
    model, callbacks = arm.prepare(study, hyperparameters)
    trained_parameters = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    points = train_facts(model, study, hyperparameters, seed, callbacks)
    return {
        "points": [{"step": 0, **read_json(before)}, *points],
        "without_adapter_as_before": is_as_before(model, study),
        "trained_parameters": trained_parameters,
    }


def main():
    (args,) = parse_arguments((RunArguments,), __doc__)
    arms = named_arms(args.arms, ARMS)
    chosen = read_chosen(Path(args.chosen), arms) if args.chosen else None
    if chosen:
        check_earlier(args)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(args.output_dir)
    with sole_use(folder):
        make_study(args, arms, chosen, folder)


def make_study(
    args: RunArguments, arms: dict[str, Arm], chosen: dict[str, dict[str, float]] | None, folder: Path
) -> None:
    """
    Makes all runs in the folder of a study, which holds none with other arguments, and sums them up. The hyperparameters
    are swept unless they are `chosen` already.
    """
    claim_folder(folder, vars(args))
    print("Reading model, facts and texts ...")
    study = load_study(args, folder)
    run_in_study = partial(run, study=study)
    if chosen:
        runs = run_chosen(chosen, range(args.seeds), run_in_study)
        level = level_of_all(runs)
    else:
        runs, level, chosen = run_all(arms, args.seeds, run_in_study, choose_hyperparameters)
    summary = summarize(runs, {name: arm.label for name, arm in arms.items()}, level, chosen, vars(args))
    write_json(folder / "results.json", summary)
    plot(summary, folder / "results.png")
    print(f"\n{describe(summary)}\n\nIn {folder}: results.json, results.png")


if __name__ == "__main__":
    main()
