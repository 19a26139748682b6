# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Compares the perplexity of PEER, a dense feed-forward, a mixture of experts and a product-key memory at equal compute:
the comparison of the paper and its ablations, at the size that a plan gives.

    ./run study scaling                       # the plan plans/two-cores.json, more than seven hours
    ./run study scaling --plan PLAN.json      # other sizes, budgets, texts and variants
    ./run study scaling --results examples/studies/scaling/results.json    # reuses these runs

run_clm.py trains each model, in a process of its own. After an interruption, the same command resumes. Each run is a
file in --output_dir; `results.json` there sums them up, and tables, plots and model cards are made from it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from common.command_line import parse_arguments
from studies.common.study_folder import sole_use, write_text
from studies.common.training_plan import DENSE, PEER, Run, budget_name
from studies.common.training_study import TrainingStudy, TrainingStudyArguments
from studies.scaling.plan import (
    Plan,
    choose_rates,
    choose_sizes,
    rate_runs,
    reference_run,
    repeated_ablation_runs,
    size_runs,
    with_seeds,
)
from studies.scaling.plots import PLOTS
from studies.scaling.report import Results, describe, read_results, write_results


PLAN = Path(__file__).parent / "plans" / "two-cores.json"


@dataclass
class ScalingArguments(TrainingStudyArguments):
    """See [`TrainingStudyArguments`]."""

    plan: str = field(default=str(PLAN), metadata={"help": "Plan of the study, a JSON file."})
    output_dir: str = field(default="runs/scaling", metadata={"help": "Output folder."})


class Study(TrainingStudy):
    """See [`TrainingStudy`]; its plan is a [`Plan`]."""

    def timed_runs(self) -> dict[str, list[Run]]:
        """Dense and PEER at all sizes."""
        rate = self.plan.learning_rates[0]
        return {
            str(hidden_size): [Run(variant, hidden_size, 1, rate) for variant in (DENSE, PEER)]
            for hidden_size in self.plan.all_sizes
        }

    def changes_after_training(self, run: Run) -> dict[str, dict[str, Any]]:
        """The changes of the plan, for the models that ablations are compared with."""
        reference = reference_run(self.plan, {PEER: run.learning_rate})
        return self.plan.after_training if run in with_seeds(reference, self.plan) else {}


def run_study(study: Study) -> Results:
    """Makes or reads all runs: learning rates, sizes, seeds and ablations, and equal wall-clock time."""
    plan = study.plan
    rates = choose_rates(plan, study.make(rate_runs(plan), "Learning rates"))
    for budget in plan.budgets:
        runs = study.make(size_runs(plan, rates, budget), f"Sizes at {budget_name(budget)} FLOPs")
    optimal = [run for budget in plan.budgets for run in choose_sizes(plan, rates, budget, runs).values()]
    repeated = [each for run in [*optimal, reference_run(plan, rates)] for each in with_seeds(run, plan)]
    runs = study.make([*repeated, *repeated_ablation_runs(plan, rates)], "Seeds and ablations")
    results = Results(plan, runs, study.seconds())
    timed = [each for budget in plan.budgets for each in with_seeds(results.equal_seconds(budget)[1], plan)]
    return Results(plan, study.make(timed, "Equal wall-clock"), results.seconds)


def report(results: Results, folder: Path) -> None:
    """Writes results, tables and plots."""
    write_results(folder / "results.json", results)
    write_text(folder / "tables.md", describe(results))
    for name, plot in PLOTS.items():
        plot(results, folder / f"{name}.png")
    print(f"\n{describe(results)}\nIn {folder}: results.json, tables.md, *.png")


def main():
    (args,) = parse_arguments((ScalingArguments,), __doc__)
    logging.set_verbosity_error()
    folder = Path(args.output_dir)
    plan = Plan.read(Path(args.plan))
    with sole_use(folder):
        made_elsewhere = None if args.results is None else read_results(Path(args.results))
        study = Study(plan, folder, args.num_processes, made_elsewhere)
        report(run_study(study), folder)


if __name__ == "__main__":
    main()
