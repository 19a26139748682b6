# Copyright 2026 The PEER for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Tables of the recipe study from its raw results."""

import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

from studies.common.study_folder import read_json, write_runs
from studies.common.tables import markdown_table
from studies.common.training_plan import CORPUS, DENSE, Run, budget_name, costs_of
from studies.recipe.differences import Difference, below, fit_sizes
from studies.recipe.plan import (
    RECIPE,
    RecipePlan,
    choose_size,
    combination_runs,
    compared_runs,
    dense_runs,
    expert_runs,
    ingredient_runs,
    run_of_the_search,
    runs_beyond,
    runs_by_size,
    search_runs,
    second_round_runs,
    seconds_runs,
    tuned,
    tuning_runs,
    with_seeds,
)


class Results:
    """
    Results of the runs that were made, with lookups.

    Args:
        plan (`RecipePlan`): Plan of the study.
        runs (`dict[str, dict]`): Results of single_run.py by the names of runs.
        seconds (`dict`): Step times from `Study.seconds`.
        documents (`dict[str, list[int]]`): For each evaluation text, the document of each of its sequences.
    """

    def __init__(
        self,
        plan: RecipePlan,
        runs: dict[str, dict[str, Any]],
        seconds: dict[str, Any],
        documents: dict[str, list[int]],
    ):
        self.plan = plan
        self.runs = runs
        self.seconds = seconds
        self.documents = documents

    def are_made(self, runs: Iterable[Run]) -> bool:
        """Whether all of these runs have a result."""
        return all(run.name in self.runs for run in runs)

    @property
    def best(self) -> dict[str, Run]:
        """The run of each variant with the best trial of the tuning; empty before that has ended."""
        runs = tuning_runs(self.plan)
        is_tuned = (
            RECIPE in runs
            and self.are_made(run for own in runs.values() for run in own)
            and self.are_made(runs_beyond(self.plan, self.runs).values())
        )
        return tuned(self.plan, self.runs) if is_tuned else {}

    def chosen(self, budget: float) -> dict[str, Run]:
        """The run of each variant with the best size of a budget; empty before that is known."""
        sizes = runs_by_size(self.plan, self.best, budget)
        if not sizes or not self.are_made(run for runs in sizes.values() if len(runs) > 1 for run in runs):
            return {}
        return {variant: choose_size(runs, self.runs) for variant, runs in sizes.items()}

    def step_seconds(self, run: Run) -> float:
        """Median seconds of a training step of the model of a run."""
        return median(self.seconds[str(run.hidden_size)]["seconds"][run.variant])

    def seconds_runs(self, budget: float) -> dict[str, list[Run]]:
        """Dense and the recipe at each size of a budget, for the seconds of the dense run that was chosen."""
        return seconds_runs(self.plan, self.best, self.chosen(budget)[DENSE], budget, self.step_seconds)

    def fastest(self, budget: float) -> dict[str, Run]:
        """The best size of both for these seconds."""
        return {variant: choose_size(runs, self.runs) for variant, runs in self.seconds_runs(budget).items()}

    def corpus_perplexity(self, runs: list[Run]) -> float:
        """Geometric mean over runs of the perplexity on the held-out part of the training texts."""
        return math.exp(mean(self.runs[run.name]["losses"][CORPUS] for run in runs))

    def losses(self, runs: list[Run]) -> list[float]:
        """Mean loss of each run over the evaluation texts, in nats per token."""
        return [mean(self.runs[run.name]["losses"][text] for text in self.plan.evaluation_texts) for run in runs]

    def perplexity(self, runs: list[Run]) -> float:
        """Geometric mean of perplexity over runs and evaluation texts."""
        return math.exp(mean(self.losses(runs)))

    def below(self, runs: list[Run], others: list[Run]) -> Difference:
        """By which share the perplexity of runs is below that of others with the same seeds."""
        pairs = [(run, other) for run in runs for other in others if run.seed == other.seed]
        own, theirs = (
            [self.runs[each.name]["sequence_losses"] for each in column] for column in zip(*pairs, strict=True)
        )
        return below(own, theirs, self.documents)

    def below_on_the_corpus(self, runs: list[Run], others: list[Run]) -> list[float]:
        """For each seed, by which share the perplexity on the corpus is below that of the other run."""
        return [
            1 - math.exp(self.runs[run.name]["losses"][CORPUS] - self.runs[other.name]["losses"][CORPUS])
            for run, other in zip(runs, others, strict=True)
        ]


def runs_of_the_search(results: Results) -> dict[str, list[Run]]:
    """The runs of search and combinations that were made, by variant."""
    plan = results.plan
    names = dict.fromkeys([*search_runs(plan), *combination_runs(plan)])
    every = {name: with_seeds([run_of_the_search(plan, name)], plan.all_search_seeds) for name in names}
    return {name: [run for run in runs if run.name in results.runs] for name, runs in every.items()}


def table_of_the_search(results: Results) -> str:
    """Table of variants that were searched, each against its parent with the seeds that both were trained with."""
    plan, search = results.plan, runs_of_the_search(results)
    columns = ["parent", "MFLOPs per token", "steps", "seeds", CORPUS, "below parent, per seed", "mean", "five texts"]
    rows = [["", *columns, "below parent", "adopted"]]
    for name, runs in search.items():
        if not runs:
            continue
        parent = plan.variants[name].get("parent", "") if name in (*plan.searched, *plan.combined) else ""
        pairs = [(own, other) for own in runs for other in search.get(parent, ()) if own.seed == other.seed]
        rows.append(
            [
                name,
                parent,
                f"{costs_of(runs[0], plan).flops / 1e6:.2f}",
                f"{runs[0].steps:,}",
                str(len(runs)),
                f"{results.corpus_perplexity(runs):.2f}",
                *_against_parent(results, name, pairs),
            ]
        )
    return markdown_table(rows)


def _against_parent(results, name, pairs):
    """Cells: below the parent per seed and in the mean, the five texts, below the parent there, and if adopted."""
    if not pairs:
        return [""] * 5
    runs, others = map(list, zip(*pairs, strict=True))
    shares = results.below_on_the_corpus(runs, others)
    per_seed = ", ".join(f"{share:+.1%}" for share in shares)
    cells = [per_seed, f"{mean(shares):+.1%}", f"{results.perplexity(runs):.2f}", str(results.below(runs, others))]
    return [*cells, _adopted(results, name, shares)]


def _adopted(results, name, shares):
    """By the rule of the page: below the parent by one percent in the mean, and with all seeds but one at the most."""
    plan, first = results.plan, [run for runs in search_runs(results.plan).values() for run in runs]
    if not results.are_made(first):
        return ""
    if name not in plan.combined and name not in second_round_runs(plan, results.runs):
        return "no, after the first round"
    if len(shares) < len(plan.all_search_seeds):
        return ""
    return "yes" if mean(shares) >= 0.01 and sum(share > 0 for share in shares) >= len(shares) - 1 else "no"


def table_of_trials(results: Results) -> str:
    """Table of the held-out losses of all trials."""
    plan, runs = results.plan, tuning_runs(results.plan)
    if not results.best:
        return ""
    beyond, number = runs_beyond(plan, results.runs), max(map(len, runs.values()))
    rows = [["corpus perplexity", *(f"trial {index + 1}" for index in range(number)), "beyond", "chosen"]]
    for variant, own in runs.items():
        best = results.best[variant]
        tried = [*own, beyond.get(variant)]
        cells = ["" if run is None else f"{results.corpus_perplexity([run]):.2f}" for run in tried]
        changes = plan.tuned_changes(best)
        chosen = {"learning_rate": best.learning_rate} | changes.pop("training", {}) | changes
        rows.append(
            [
                variant,
                *(f"**{cell}**" if run == best else cell for cell, run in zip(cells, tried, strict=True)),
                ", ".join(f"{name} {value}" for name, value in chosen.items()),
            ]
        )
    return markdown_table(rows)


def table_of_sizes(results: Results, budget: float) -> str:
    """Table of the held-out losses of all sizes at a budget."""
    chosen = results.chosen(budget)
    if not chosen:
        return ""
    runs = {
        variant: {run.hidden_size: run for run in runs}
        for variant, runs in runs_by_size(results.plan, results.best, budget).items()
        if len(runs) > 1
    }
    sizes = sorted({size for own in runs.values() for size in own})
    rows = [[f"corpus perplexity, {budget_name(budget)} FLOPs", *(f"d = {size}" for size in sizes)]]
    for variant, own in runs.items():
        cells = {size: f"{results.corpus_perplexity([run]):.2f}" for size, run in own.items()}
        cells[chosen[variant].hidden_size] = f"**{cells[chosen[variant].hidden_size]}**"
        rows.append([variant, *(cells.get(size, "") for size in sizes)])
    return markdown_table(rows)


def table_of_the_comparison(results: Results, budget: float) -> str:
    """Table of the compared runs at a budget, against dense, and the recipe against each."""
    plan, chosen = results.plan, results.chosen(budget)
    runs = {variant: compared_runs(plan, run, budget) for variant, run in chosen.items()}
    if not runs or not results.are_made(run for own in runs.values() for run in own):
        return ""
    head = [
        "d",
        "seeds",
        "parameters, M",
        "active, M",
        CORPUS,
        "five texts",
        "below dense",
        "recipe below it",
        "by errors",
    ]
    rows = [[f"{budget_name(budget)} FLOPs", *head]]
    for variant, own in runs.items():
        costs = costs_of(own[0], plan)
        ahead = results.below(runs[RECIPE], own) if variant != RECIPE else None
        rows.append(
            [
                variant,
                str(own[0].hidden_size),
                str(len(own)),
                f"{costs.parameters / 1e6:.1f}",
                f"{costs.active_parameters / 1e6:.1f}",
                f"{results.corpus_perplexity(own):.2f}",
                f"{results.perplexity(own):.2f}",
                "" if variant == DENSE else str(results.below(own, runs[DENSE])),
                "" if ahead is None else str(ahead),
                "" if ahead is None else f"{-math.log(1 - ahead.share) / ahead.error:.1f}",
            ]
        )
    return markdown_table(rows)


def table_of_seconds(results: Results, budget: float) -> str:
    """Tables of dense and the recipe for equal seconds: at each width with one seed, and at the best width of each."""
    plan = results.plan
    if not results.chosen(budget) or not results.seconds:
        return ""
    runs = results.seconds_runs(budget)
    if not results.are_made(run for own in runs.values() for run in own):
        return ""
    rows = [["seed 0", "d", "steps", "ms per step", "seconds", CORPUS, "five texts", "below dense"]]
    for dense, own in zip(runs[DENSE], runs[RECIPE], strict=True):
        rows += [_row_of_seconds(results, [dense], ""), _row_of_seconds(results, [own], results.below([own], [dense]))]
    tables = [markdown_table(rows)]
    compared = {variant: compared_runs(plan, run, budget) for variant, run in results.fastest(budget).items()}
    if results.are_made(run for own in compared.values() for run in own):
        ahead = results.below(compared[RECIPE], compared[DENSE])
        rows = [[f"{len(compared[DENSE])} seeds", *rows[0][1:]]]
        rows += [_row_of_seconds(results, compared[DENSE], ""), _row_of_seconds(results, compared[RECIPE], ahead)]
        tables.append(markdown_table(rows))
    return "\n\n".join(tables)


def _row_of_seconds(results, runs, ahead):
    run, seconds = runs[0], results.step_seconds(runs[0])
    times = [f"{run.steps:,}", f"{seconds * 1e3:.1f}", f"{seconds * run.steps:.0f}"]
    perplexities = [f"{value(runs):.2f}" for value in (results.corpus_perplexity, results.perplexity)]
    return [run.variant, str(run.hidden_size), *times, *perplexities, str(ahead)]


def table_of_differences(results: Results, runs: dict[Any, list[Run]], label: str) -> str:
    """Table of groups of runs with the same seeds, each against the first."""
    if not results.are_made(run for own in runs.values() for run in own):
        return ""
    first, *_ = runs.values()
    rows = [[label, "MFLOPs per token", "steps", CORPUS, "five texts", "below the first"]]
    for name, own in runs.items():
        costs = costs_of(own[0], results.plan)
        rows.append(
            [
                f"{name:,}" if isinstance(name, int) else name,
                f"{costs.flops / 1e6:.2f}",
                f"{own[0].steps:,}",
                f"{results.corpus_perplexity(own):.2f}",
                f"{results.perplexity(own):.2f}",
                "" if own is first else str(results.below(own, first)),
            ]
        )
    return markdown_table(rows)


def table_of_dense_sizes(results: Results) -> str:
    """Table of dense models on the tokens of the recipe, and the size on their curve that predicts as well."""
    plan, budget = results.plan, results.plan.budgets[-1]
    chosen = results.chosen(budget)
    if not chosen:
        return ""
    recipe = compared_runs(plan, chosen[RECIPE], budget)[0]
    runs = dense_runs(plan, results.best[DENSE], recipe)
    if not results.are_made([recipe, *runs]):
        return ""
    rows = [["", "d", "active parameters, M", "five texts, nats"]]
    active = {run: costs_of(run, plan).active_parameters for run in [*runs, recipe]}
    rows += [
        [run.variant, str(run.hidden_size), f"{active[run] / 1e6:.2f}", f"{results.losses([run])[0]:.3f}"]
        for run in [*runs, recipe]
    ]
    try:
        curve = fit_sizes([active[run] for run in runs], results.losses(runs))
    except ValueError as error:
        return f"{markdown_table(rows)}\n\nNo curve goes through the dense models: {error}"
    size = curve.size_of(results.losses([recipe])[0])
    said = f"The recipe reads like a dense model of {size / active[recipe]:.2f} times its active parameters"
    law = f"{curve.a:.3f} + {curve.b:.3g} · n^-{curve.c:.3g}"
    return f"{markdown_table(rows)}\n\n{said}, {size / 1e6:.2f} M, by the curve {law}."


def describe(results: Results) -> str:
    """The tables of what has been made, under headings."""
    plan, best = results.plan, results.best
    tables = {
        "Search": [table_of_the_search(results)],
        "Tuning": [table_of_trials(results)],
        "Sizes": [table_of_sizes(results, budget) for budget in plan.budgets],
        "Equal compute": [table_of_the_comparison(results, budget) for budget in plan.budgets],
        "Equal seconds": [table_of_seconds(results, plan.budgets[-1])],
    }
    if best:
        tables |= {
            "Ingredients": [table_of_differences(results, ingredient_runs(plan, best[RECIPE]), "without")],
            "Number of experts": [table_of_differences(results, expert_runs(plan, best[RECIPE]), "N")],
            "Dense-equivalent size": [table_of_dense_sizes(results)],
        }
    found = {heading: "\n\n".join(filter(None, each)) for heading, each in tables.items()}
    return "\n".join(f"## {heading}\n\n{text}\n" for heading, text in found.items() if text)


def write_results(file: Path, results: Results) -> None:
    """Writes the results to a JSON file, with one line per run."""
    head = {"plan": asdict(results.plan), "seconds": results.seconds, "documents": results.documents}
    write_runs(file, head, results.runs)


def read_results(file: Path) -> Results:
    """Reads a file of [`write_results`]."""
    parts = read_json(file)
    return Results(RecipePlan(**parts["plan"]), parts["runs"], parts["seconds"], parts["documents"])
