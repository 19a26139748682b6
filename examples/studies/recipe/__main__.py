# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Finds a recipe for PEER, and compares it with PEER as in the paper, a dense feed-forward, a mixture of experts and
product-key memories, at equal compute and at equal time.

    ./run study recipe                       # the plan plans/two-cores.json, twenty-four hours
    ./run study recipe --hours 2.5           # as much of it as two and a half hours allow
    ./run study recipe --ngrams              # what n-grams of as many tokens predict, in minutes
    ./run study recipe --results examples/studies/recipe/results.json    # goes on from these runs

run_clm.py trains each model, in a process of its own. After an interruption, the same command resumes. Each run is a
file in --output_dir; `results.json` there sums them up, and tables and plots are made from it.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

from transformers.utils import logging

from common.command_line import parse_arguments
from studies.common.study_folder import sole_use, write_json, write_text
from studies.common.training_plan import DENSE, Run, budget_name
from studies.common.training_study import TimeIsUp, TrainingStudyArguments
from studies.recipe.ngrams import ngrams_table, read_by_ngrams
from studies.recipe.plan import (
    RECIPE,
    RecipePlan,
    choose,
    compared_runs,
    dense_runs,
    expert_runs,
    runs_beyond,
    runs_by_size,
    runs_to_tune,
    screening_runs,
    search_runs,
    transfer_runs,
    transfer_runs_beyond,
    tuned,
)
from studies.recipe.plots import PLOTS
from studies.recipe.report import describe
from studies.recipe.results import Results, read_results, write_results
from studies.recipe.study import Study


PLAN = Path(__file__).parent / "plans" / "two-cores.json"


@dataclass
class RecipeArguments(TrainingStudyArguments):
    """See [`TrainingStudyArguments`]; in addition, for how long to make runs."""

    plan: str = field(default=str(PLAN), metadata={"help": "Plan of the study, a JSON file."})
    output_dir: str = field(default="runs/recipe", metadata={"help": "Output folder."})
    hours: float | None = field(
        default=None,
        metadata={
            "help": "Hours after which no further run is begun; the same command goes on. Runs in progress end."
        },
    )
    ngrams: bool = field(default=False, metadata={"help": "Only read the texts by n-grams, which takes minutes."})


def run_study(study: Study) -> None:
    """Make all runs that have no result yet: first the search, then the rest once the plan has the recipe."""
    plan = study.plan
    study.make(list(screening_runs(plan).values()), "Screening")
    study.make(search_runs(plan), "Search")
    if RECIPE not in plan.trials:
        return
    made = study.make(_together(runs_to_tune(plan).values()), "Tuning")
    best = tuned(plan, study.make(list(runs_beyond(plan, made).values()), "Tuning beyond the ends"))
    made = study.make(_together(transfer_runs(plan, best).values()), "Learning rates at another size")
    study.make(list(transfer_runs_beyond(plan, best, made).values()), "Learning rates beyond the ends")
    for budget in plan.budgets:
        chosen = compare(study, {variant: best[variant] for variant in (DENSE, RECIPE)}, budget)
        if budget == plan.budgets[0]:
            compare(study, best, budget)
            dense_sizes = dense_runs(plan, best[DENSE], compared_runs(plan, chosen[RECIPE], budget)[0])
    compare_at_equal_seconds(study)
    study.make([Run(**each) for each in plan.later_runs], "Rates that were tried later")
    study.make(dense_sizes, "Dense sizes")
    study.make(_seed_by_seed(expert_runs(plan, best[RECIPE])), "Numbers of experts")
    compare(study, best, plan.budgets[-1])


def compare(study: Study, best: dict[str, Run], budget: float) -> dict[str, Run]:
    """Makes the runs of all sizes at a budget, and the chosen ones with their seeds. Returns the chosen ones."""
    plan, name = study.plan, budget_name(budget)
    sizes = runs_by_size(plan, best, budget)
    made = study.make(_together(runs for runs in sizes.values() if len(runs) > 1), f"Sizes at {name} FLOPs")
    chosen = {variant: choose(runs, made) for variant, runs in sizes.items()}
    compared = {variant: compared_runs(plan, run, budget) for variant, run in chosen.items()}
    study.make(_seed_by_seed(compared), f"Comparison at {name} FLOPs")
    return chosen


def compare_at_equal_seconds(study: Study) -> None:
    """
    Make the runs that train for the seconds of dense: the recipe with each of its trials for them, then dense and the
    recipe at several sizes, and the best ones with all seeds.
    """
    study.seconds()
    results = study.all_results()
    trials = results.runs_of_timed_trials()
    study.make([results.dense_of_seconds(), *trials] if len(trials) > 1 else [], "Trials at equal seconds")
    widths = study.all_results().runs_of_widths()
    study.make(_together(runs for runs in widths.values() if len(runs) > 1), "Widths at equal seconds")
    study.make(_seed_by_seed(study.all_results().runs_of_seconds()), "Equal seconds")


def _together(lists):
    return [run for runs in lists for run in runs]


def _seed_by_seed(runs):
    """All variants with the first seed, then with the next, so that finished runs can be compared at any time."""
    return sorted(_together(runs.values()), key=lambda run: run.seed)


def report(results: Results, folder: Path) -> None:
    """Writes results, tables and pictures."""
    write_results(folder / "results.json", results)
    write_text(folder / "tables.md", describe(results))
    pictures = [f"{name}.png" for name, plot in PLOTS.items() if plot(results, folder / f"{name}.png")]
    print(f"\n{describe(results)}\nIn {folder}: {', '.join(['results.json', 'tables.md', *pictures])}")


def main():
    (args,) = parse_arguments((RecipeArguments,), __doc__)
    logging.set_verbosity_error()
    folder = Path(args.output_dir)
    plan = RecipePlan.read(Path(args.plan))
    until = None if args.hours is None else time.time() + 3600 * args.hours
    with sole_use(folder):
        made_elsewhere = None if args.results is None else read_results(Path(args.results))
        study = Study(plan, folder, args.num_processes, made_elsewhere, until=until)
        if args.ngrams:
            results = read_by_ngrams(study)
            write_json(folder / "ngrams.json", results)
            print(f"\n{ngrams_table(results)}\n\nIn {folder}: ngrams.json")
            return
        try:
            run_study(study)
        except TimeIsUp as message:
            print(message)
        finally:  # also of a study that fails or is stopped
            report(study.all_results(), folder)


if __name__ == "__main__":
    main()
