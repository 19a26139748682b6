# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The results of the recipe study, with lookups, and the file that they are in."""

import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

from studies.common.study_folder import read_json, write_runs
from studies.common.training_plan import CORPUS, DENSE, Run, costs_of
from studies.recipe.differences import Difference, SizeCurve, below, factor_effects, fit_sizes
from studies.recipe.plan import (
    BLOCK,
    RECIPE,
    RecipePlan,
    choose,
    compared_runs,
    dense_runs,
    design_runs,
    expert_runs,
    factors_of,
    runs_beyond,
    runs_by_size,
    runs_of_timed_trials,
    runs_of_widths,
    runs_to_tune,
    timed_trials,
    transfer_runs,
    transfer_runs_beyond,
    tuned,
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
        runs = runs_to_tune(self.plan)
        is_tuned = (
            RECIPE in self.plan.trials
            and self.are_made(run for own in runs.values() for run in own)
            and self.are_made(runs_beyond(self.plan, self.runs).values())
        )
        return tuned(self.plan, self.runs) if is_tuned else {}

    def compared_rates(self) -> dict[str, list[Run]]:
        """
        The runs of dense and the recipe at the `transfer_size`, with the one beyond the `EXPONENTS` if there is one;
        empty before all of them are made.
        """
        runs = transfer_runs(self.plan, self.best) if self.best else {}
        if not self.are_made(run for own in runs.values() for run in own):
            return {}
        beyond = transfer_runs_beyond(self.plan, self.best, self.runs)
        if not self.are_made(beyond.values()):
            return {}
        return {name: [*own, *([beyond[name]] if name in beyond else [])] for name, own in runs.items()}

    def chosen(self, budget: float) -> dict[str, Run]:
        """The run of each variant with the best size of a budget; empty before that is known."""
        sizes = runs_by_size(self.plan, self.best, budget)
        if not sizes or not self.are_made(run for runs in sizes.values() if len(runs) > 1 for run in runs):
            return {}
        return {variant: choose(runs, self.runs) for variant, runs in sizes.items()}

    def compared(self, budget: float) -> dict[str, list[Run]]:
        """The runs that are compared at a budget, for each variant whose runs are all made."""
        runs = {variant: compared_runs(self.plan, run, budget) for variant, run in self.chosen(budget).items()}
        return {variant: own for variant, own in runs.items() if self.are_made(own)}

    def step_seconds(self, run: Run) -> float:
        """Median seconds of a training step of the model of a run."""
        return median(self.times_of_steps(run))

    def times_of_steps(self, run: Run) -> list[float]:
        """The seconds of each step of the model of a run that was timed."""
        return self.seconds[str(run.hidden_size)]["seconds"][run.model]

    def _are_timed(self):
        models = {self.best[DENSE].model, *(trial.model for trial in timed_trials(self.plan))}
        sizes = self.timed_sizes()
        return all(models <= self.seconds.get(str(size), {"seconds": {}})["seconds"].keys() for size in sizes)

    def timed_sizes(self) -> list[int]:
        """Sizes at which dense and the recipe may be compared at equal seconds; none before that of dense is known."""
        if not self.chosen(self.plan.budgets[-1]):
            return []
        return sorted({self.dense_of_seconds().hidden_size, *self.plan.sizes_at_equal_seconds})

    def dense_of_seconds(self) -> Run:
        """The dense run of the last budget, with the first seed. Other runs train for the same seconds."""
        return self.chosen(self.plan.budgets[-1])[DENSE]

    def runs_of_timed_trials(self) -> list[Run]:
        """The recipe with each trial that may be compared at equal seconds, trained for the seconds of dense."""
        return runs_of_timed_trials(self.plan, self.dense_of_seconds(), self.step_seconds)

    @property
    def best_at_equal_seconds(self) -> dict[str, Run]:
        """Dense and the recipe with the best trials for equal seconds; empty before these and step times are known."""
        if not self.timed_sizes() or not self._are_timed():
            return {}
        runs, trials = self.runs_of_timed_trials(), timed_trials(self.plan)
        if len(runs) > 1 and not self.are_made(runs):
            return {}
        return {DENSE: self.best[DENSE], RECIPE: trials[runs.index(choose(runs, self.runs))]}

    def runs_of_widths(self) -> dict[str, list[Run]]:
        """Dense and the recipe at `sizes_at_equal_seconds`, for the seconds of the dense run of the last budget."""
        return runs_of_widths(self.plan, self.best_at_equal_seconds, self.dense_of_seconds(), self.step_seconds)

    def compared_at_widths(self) -> dict[str, list[Run]]:
        """The runs of `runs_of_widths`; empty before all of them are made."""
        if not self.best_at_equal_seconds:
            return {}
        runs = self.runs_of_widths()
        return runs if self.are_made(run for own in runs.values() for run in own) else {}

    def runs_of_seconds(self) -> dict[str, list[Run]]:
        """Dense and the recipe, each at its best size for these seconds, with the seeds of the comparison."""
        chosen = {variant: choose(runs, self.runs) for variant, runs in self.runs_of_widths().items()}
        return {variant: compared_runs(self.plan, run, self.plan.budgets[-1]) for variant, run in chosen.items()}

    def compared_at_equal_seconds(self) -> dict[str, list[Run]]:
        """The runs of `runs_of_seconds`; empty before all of them are made."""
        if not self.best_at_equal_seconds:
            return {}
        widths = self.runs_of_widths().values()
        if not self.are_made(run for runs in widths if len(runs) > 1 for run in runs):
            return {}
        runs = self.runs_of_seconds()
        return runs if self.are_made(run for own in runs.values() for run in own) else {}

    def corpus_perplexity(self, runs: list[Run]) -> float:
        """Geometric mean over runs of the perplexity on the held-out part of the training texts."""
        return math.exp(mean(self.runs[run.name]["losses"][CORPUS] for run in runs))

    def losses(self, runs: list[Run]) -> list[float]:
        """Mean loss of each run over the evaluation texts, in nats per token."""
        return [mean(self.runs[run.name]["losses"][text] for text in self.plan.evaluation_texts) for run in runs]

    def perplexity(self, runs: list[Run]) -> float:
        """Geometric mean of perplexity over runs and evaluation texts."""
        return math.exp(mean(self.losses(runs)))

    def part_losses(self, runs: list[Run]) -> list[float]:
        """
        Mean loss over runs and evaluation texts in each part of the sequences, in nats per token; empty if a run was
        made before these were measured.
        """
        found = [self.runs[run.name].get("part_losses") for run in runs]
        if None in found:
            return []
        of_texts = [each[text] for each in found for text in self.plan.evaluation_texts]
        return [mean(part) for part in zip(*of_texts, strict=True)]

    def below(self, runs: list[Run], others: list[Run]) -> Difference:
        """The share by which the perplexity of runs is below that of others with the same seeds."""
        pairs = [(run, other) for run in runs for other in others if run.seed == other.seed]
        own, theirs = (
            [self.runs[each.name]["sequence_losses"] for each in column] for column in zip(*pairs, strict=True)
        )
        return below(own, theirs, self.documents)

    def below_on_the_corpus(self, run: Run, other: Run) -> float:
        """The share by which the perplexity of a run on the corpus is below that of another run."""
        return 1 - math.exp(self.runs[run.name]["losses"][CORPUS] - self.runs[other.name]["losses"][CORPUS])

    def effects(self, design: dict[str, Any]) -> dict[str, Difference]:
        """
        The share by which each factor of a design lowers perplexity on the corpus, and its second seed, if it has two;
        empty before all of its runs are made.
        """
        runs = design_runs(self.plan, design)
        if not self.are_made(runs):
            return {}
        levels = [{name: name in factors_of(run) for name in design["factors"]} for run in runs]
        if len(design["seeds"]) > 1:
            levels = [level | {BLOCK: run.seed > 1} for level, run in zip(levels, runs, strict=True)]
        return factor_effects([self.runs[run.name]["losses"][CORPUS] for run in runs], levels)

    def by_num_experts(self) -> dict[int, list[Run]]:
        """The recipe by its number of experts, with the seeds for which all numbers are made; empty without any."""
        runs = expert_runs(self.plan, self.best[RECIPE]) if self.best else {}
        seeds = [of_seed for of_seed in zip(*runs.values(), strict=True) if self.are_made(of_seed)]
        return dict(zip(runs, map(list, zip(*seeds, strict=True)), strict=True)) if seeds else {}

    def dense_sizes(self) -> tuple[Run, list[Run]] | None:
        """
        A run of the recipe at the first budget, and dense models trained on its tokens; `None` before they are made,
        or if the plan has none.
        """
        budget = self.plan.budgets[0]
        if not self.plan.dense_sizes or not (chosen := self.chosen(budget)):
            return None
        recipe = compared_runs(self.plan, chosen[RECIPE], budget)[0]
        runs = dense_runs(self.plan, self.best[DENSE], recipe)
        return (recipe, runs) if self.are_made([recipe, *runs]) else None

    def active_parameters(self, run: Run) -> int:
        """Parameters of the model of a run that a token uses."""
        return costs_of(run, self.plan).active_parameters

    def dense_curve(self) -> SizeCurve:
        """
        The curve through the dense models of `dense_sizes`. Raises `ValueError` if larger ones have no lower loss.
        """
        _, runs = self.dense_sizes()
        return fit_sizes([self.active_parameters(run) for run in runs], self.losses(runs))


def write_results(file: Path, results: Results) -> None:
    """Writes the results to a JSON file, with one line per run."""
    head = {"plan": asdict(results.plan), "seconds": results.seconds, "documents": results.documents}
    write_runs(file, head, results.runs)


def read_results(file: Path) -> Results:
    """Reads a file of [`write_results`]."""
    parts = read_json(file)
    return Results(RecipePlan(**parts["plan"]), parts["runs"], parts["seconds"], parts["documents"])
