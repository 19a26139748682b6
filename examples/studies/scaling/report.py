# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Results of the scaling study: lookups and tables."""

import math
from dataclasses import asdict
from pathlib import Path
from statistics import geometric_mean, mean, median, stdev
from typing import Any

from common.pictures import VARIANTS
from studies.common.study_folder import read_json, write_runs
from studies.common.tables import markdown_table, spread
from studies.common.training_plan import (
    CORPUS,
    DENSE,
    PEER,
    Run,
    budget_name,
    configuration_of,
    costs_of,
    run_of_seconds,
)
from studies.scaling.plan import (
    Plan,
    ablation_runs,
    choose_rates,
    choose_sizes,
    rate_runs,
    reference_run,
    size_runs,
    with_seeds,
)


# Table 1 of the paper: perplexity of compute-optimal models at two budgets.
PAPER_PERPLEXITIES = {
    "6e18": {
        "dense": (23.26, 21.95, 24.55, 29.14, 23.84),
        "moe-expert-choice": (20.98, 19.09, 23.26, 26.10, 21.41),
        "pkm": (21.80, 19.39, 20.49, 27.09, 21.92),
        "peer": (20.68, 17.65, 19.01, 25.48, 20.63),
    },
    "2e19": {
        "dense": (17.70, 12.28, 18.19, 21.21, 18.31),
        "moe-expert-choice": (16.88, 12.97, 17.41, 20.28, 17.12),
        "pkm": (17.03, 11.18, 16.34, 20.26, 17.36),
        "peer": (16.34, 10.33, 14.99, 19.09, 16.45),
    },
}


class Results:
    """
    Results of all runs, with lookups.

    Args:
        plan (`Plan`): Plan of the study.
        runs (`dict[str, dict]`): Results of studies/common/single_run.py by the names of runs.
        seconds (`dict`): Step times from `Study.seconds`.
    """

    def __init__(self, plan: Plan, runs: dict[str, dict[str, Any]], seconds: dict[str, Any]):
        self.plan = plan
        self.runs = runs
        self.seconds = seconds
        self.rates = choose_rates(plan, runs)

    def optimal(self, budget: float) -> dict[str, Run]:
        """The compute-optimal run of each variant: that of the size with the lowest loss."""
        return choose_sizes(self.plan, self.rates, budget, self.runs)

    def reference(self) -> Run:
        """The run that ablations are compared with, with the first seed."""
        return reference_run(self.plan, self.rates)

    def ablations(self, *groups: str) -> list[Run]:
        """The reference run, and the runs of groups of ablations."""
        return [self.reference(), *(run for run in ablation_runs(self.plan, self.rates) if run.ablation[0] in groups)]

    def losses(self, run: Run) -> dict[str, float]:
        """Loss of each text, of this run alone."""
        return self.runs[run.name]["losses"]

    def made(self, run: Run) -> list[dict[str, Any]]:
        """Results of the run with each seed that it was made with."""
        return [self.runs[each.name] for each in with_seeds(run, self.plan) if each.name in self.runs]

    def with_seeds(self, run: Run) -> list[dict[str, float]]:
        """Loss of each text, for each seed that the run was made with."""
        return [result["losses"] for result in self.made(run)]

    def margins(self, budget: float) -> dict[str, float]:
        """The share by which the mean perplexity of each variant is below that of dense, both compute-optimal."""
        means = self._means(budget)
        return {variant: below(values, means[DENSE]) for variant, values in means.items() if variant != DENSE}

    def deviations(self, budget: float) -> dict[str, float]:
        """Standard deviations of these margins over the seeds of the variant and of dense."""
        means = self._means(budget)
        dense = means.pop(DENSE)
        return {variant: _ratio_deviation(values, dense) for variant, values in means.items()}

    def _means(self, budget):
        """Mean perplexity of the compute-optimal model of each variant, with each seed."""
        return {
            variant: mean_perplexities(self.with_seeds(run), self.plan)
            for variant, run in self.optimal(budget).items()
        }

    def step_seconds(self, run: Run) -> float:
        """Median seconds of a training step of the model of a run."""
        return median(self.seconds[str(run.hidden_size)]["seconds"][run.variant])

    def equal_seconds(self, budget: float) -> tuple[Run, Run]:
        """The compute-optimal dense run, and a run of the compute-optimal PEER size for the same number of seconds."""
        optimal = self.optimal(budget)
        return optimal[DENSE], run_of_seconds(optimal[PEER], optimal[DENSE], self.step_seconds)


def perplexities(losses: list[dict[str, float]], text: str) -> list[float]:
    """Perplexity of a text, with each seed."""
    return [math.exp(each[text]) for each in losses]


def mean_perplexities(losses: list[dict[str, float]], plan: Plan) -> list[float]:
    """Geometric mean of perplexity over the evaluation texts, with each seed."""
    return [math.exp(mean(each[name] for name in plan.evaluation_texts)) for each in losses]


def _ratio_deviation(values, others):
    """Standard deviation of the ratio of two means, to first order. NaN if one of them is of one seed."""
    if min(len(values), len(others)) == 1:
        return math.nan
    ratio = mean(values) / mean(others)
    return ratio * math.hypot(stdev(values) / mean(values), stdev(others) / mean(others))


def below(values: list[float], others: list[float]) -> float:
    """The share by which the mean of `values` is below that of `others`."""
    return 1 - mean(values) / mean(others)


def below_cell(values: list[float], others: list[float]) -> str:
    """The result of [`below`] as a cell of a table, with its standard deviation over seeds."""
    deviation = _ratio_deviation(values, others)
    return f"{below(values, others):.1%}" + ("" if math.isnan(deviation) else f" ± {deviation:.1%}")


def label(variant: str) -> str:
    """Label of a variant in tables and plots."""
    return VARIANTS[variant].label if variant in VARIANTS else variant


def table_of_perplexities(results: Results, budget: float) -> str:
    """Table of perplexities of the compute-optimal models on the evaluation texts, as table 1 of the paper."""
    plan = results.plan
    texts = [*plan.evaluation_texts, CORPUS]
    rows = [[f"{budget_name(budget)} FLOPs", "size", "parameters, M", *texts, "geometric mean", "below dense"]]
    optimal = results.optimal(budget)
    dense = mean_perplexities(results.with_seeds(optimal[DENSE]), plan)
    for variant, run in optimal.items():
        losses = results.with_seeds(run)
        rows.append(
            [
                label(variant),
                str(run.hidden_size),
                f"{costs_of(run, plan).parameters / 1e6:.1f}",
                *(spread(perplexities(losses, text)) for text in texts),
                spread(mean_perplexities(losses, plan)),
                "" if variant == DENSE else below_cell(mean_perplexities(losses, plan), dense),
            ]
        )
    return markdown_table(rows)


def paper_margins() -> dict[str, dict[str, float]]:
    """The share by which the mean perplexity of each variant is below that of dense, at each budget of the paper."""
    means = {
        budget: {variant: geometric_mean(values) for variant, values in found.items()}
        for budget, found in PAPER_PERPLEXITIES.items()
    }
    return {
        budget: {variant: 1 - value / found[DENSE] for variant, value in found.items() if variant != DENSE}
        for budget, found in means.items()
    }


def table_of_sizes(results: Results, budget: float) -> str:
    """Table of held-out losses of every size at a budget, with the first seed: the isoFLOP curves."""
    plan = results.plan
    rows = [[f"held-out loss at {budget_name(budget)} FLOPs", *(f"hidden_size {size}" for size in plan.sizes(budget))]]
    runs = size_runs(plan, results.rates, budget)
    rows += [[label(variant), *_corpus_cells(results, runs, variant)] for variant in plan.variants]
    tokens = (run.steps * plan.tokens_of_step / 1e6 for run in runs if run.variant == DENSE)
    rows.append(["million tokens, dense", *(f"{each:.1f}" for each in tokens)])
    return markdown_table(rows)


def table_of_rates(results: Results) -> str:
    """Table of held-out losses at each learning rate, at the size and budget at which rates are chosen."""
    plan = results.plan
    where = f"hidden_size {plan.reference_hidden_size}, {budget_name(plan.budgets[0])} FLOPs"
    rows = [[f"held-out loss, {where}", *(f"learning rate {rate:g}" for rate in plan.learning_rates)]]
    runs = rate_runs(plan)
    rows += [[label(variant), *_corpus_cells(results, runs, variant)] for variant in plan.variants]
    return markdown_table(rows)


def _corpus_cells(results, runs, variant):
    """Held-out losses of the runs of a variant, the lowest one in bold."""
    losses = [results.losses(run)[CORPUS] for run in runs if run.variant == variant]
    return [f"**{loss:.3f}**" if loss == min(losses) else f"{loss:.3f}" for loss in losses]


def norm_runs(results: Results) -> dict[tuple[str | None, int], Run]:
    """Runs that differ only in the query norm and the number of experts, by these two."""
    found = {}
    for run in results.ablations("num_experts", "query_norm"):
        config = configuration_of(run, results.plan)
        found[config.query_norm, config.num_experts] = run
    return dict(sorted(found.items(), key=lambda each: (each[0][0] or "", each[0][1])))


def table_of_experts(results: Results) -> str:
    """Table of numbers of experts at a fixed number of active ones, and of query norms, as table 3 of the paper."""
    rows = [["query norm", "N", *_COST_COLUMNS, "usage, %", "top-1 usage, %", "unevenness"]]
    for (norm, num_experts), run in norm_runs(results).items():
        usages = []
        for result in results.made(run):
            (usage,) = result["usage"].values()
            usages.append(usage)
        usage, top1_usage, unevenness = (
            mean(each[name] for each in usages) for name in ("usage", "top1_usage", "unevenness")
        )
        measures = [f"{100 * usage:.1f}", f"{100 * top1_usage:.1f}", f"{unevenness:.2f}"]
        cost_cells = _cost_cells(results, run, results.with_seeds(run))
        rows.append([norm or "none", f"{num_experts:,}", *cost_cells, *measures])
    return markdown_table(rows)


_COST_COLUMNS = ["MFLOPs per token", "parameters, M", CORPUS, "geometric mean"]


def _cost_cells(results, run, losses):
    """Costs of the model of a run, and its perplexities over seeds."""
    costs = costs_of(run, results.plan)
    return [
        f"{costs.flops / 1e6:.2f}",
        f"{costs.parameters / 1e6:.1f}",
        spread(perplexities(losses, CORPUS)),
        spread(mean_perplexities(losses, results.plan)),
    ]


def active_runs(results: Results) -> dict[int, Run]:
    """Runs that differ only in the number of active experts, by this number."""
    runs = results.ablations("active")
    return dict(sorted((configuration_of(run, results.plan).num_experts_per_tok, run) for run in runs))


def table_of_active_experts(results: Results) -> str:
    """Table of numbers of active experts in training."""
    rows = [["h·k", "h", "k", *_COST_COLUMNS]]
    for active, run in active_runs(results).items():
        config = configuration_of(run, results.plan)
        sizes = (active, config.num_retrieval_heads, config.num_experts_per_head)
        rows.append([*map(str, sizes), *_cost_cells(results, run, results.with_seeds(run))])
    return markdown_table(rows)


def losses_after_training(results: Results, change: str) -> list[dict[str, float]]:
    """Loss of each text, with each seed, of the trained reference model loaded with changed fields."""
    return [result["after_training"][change]["losses"] for result in results.made(results.reference())]


def table_after_training(results: Results) -> str:
    """Table of the effect of changing h or k when the trained model is loaded."""
    reference = results.reference()
    config = configuration_of(reference, results.plan)
    trained = f"as trained, h = {config.num_retrieval_heads}, k = {config.num_experts_per_head}"
    changed = {trained: results.with_seeds(reference)}
    changed |= {change: losses_after_training(results, change) for change in results.plan.after_training}
    before = mean_perplexities(changed[trained], results.plan)
    rows = [["without retraining", CORPUS, "geometric mean", "rise"]]
    for name, losses in changed.items():
        means = mean_perplexities(losses, results.plan)
        rise = "" if name == trained else f"{-below(means, before):+.1%}"
        rows.append([name, spread(perplexities(losses, CORPUS)), spread(means), rise])
    return markdown_table(rows)


def table_of_variations(results: Results) -> str:
    """Table of variations that the paper does not try."""
    rows = [["", *_COST_COLUMNS, "below PEER"]]
    before = mean_perplexities(results.with_seeds(results.reference()), results.plan)
    for run in results.ablations("variation"):
        losses = results.with_seeds(run)
        means = mean_perplexities(losses, results.plan)
        name, share = ("PEER", "") if run.ablation is None else (run.ablation[1], below_cell(means, before))
        rows.append([name, *_cost_cells(results, run, losses), share])
    return markdown_table(rows)


def table_of_seconds(results: Results) -> str:
    """Table of dense and PEER at equal wall-clock time, each with the schedule of its own steps."""
    rows = [["", "size", "steps", "ms per step", "seconds", CORPUS, "geometric mean", "below dense"]]
    for budget in results.plan.budgets:
        runs = results.equal_seconds(budget)
        dense = mean_perplexities(results.with_seeds(runs[0]), results.plan)
        for run in runs:
            seconds, losses = results.step_seconds(run), results.with_seeds(run)
            means = mean_perplexities(losses, results.plan)
            rows.append(
                [
                    label(run.variant),
                    str(run.hidden_size),
                    f"{run.steps:,}",
                    f"{seconds * 1e3:.1f}",
                    f"{seconds * run.steps:.0f}",
                    spread(perplexities(losses, CORPUS)),
                    spread(means),
                    "" if run.variant == DENSE else below_cell(means, dense),
                ]
            )
    return markdown_table(rows)


def table_of_expert_choice(results: Results) -> str:
    """
    Table of perplexities under expert choice, which sees later tokens in training mode. Empty without such a variant.
    """
    rows = [["expert choice in training", "evaluated by token choice", "as trained, sees later tokens"]]
    for budget in results.plan.budgets:
        for variant, run in results.optimal(budget).items():
            made = results.made(run)
            trained = [result["losses_as_trained"] for result in made if "losses_as_trained" in result]
            if trained:
                means = [mean_perplexities(losses, results.plan) for losses in (results.with_seeds(run), trained)]
                rows.append([f"{label(variant)}, {budget_name(budget)} FLOPs", *map(spread, means)])
    return markdown_table(rows) if len(rows) > 1 else ""


def describe(results: Results) -> str:
    """All tables under headings."""
    budgets = results.plan.budgets
    tables = {
        "Perplexity at equal compute": [
            *(table_of_perplexities(results, budget) for budget in budgets),
            table_of_expert_choice(results),
        ],
        "Sizes and learning rates": [
            *(table_of_sizes(results, budget) for budget in budgets),
            table_of_rates(results),
        ],
        "Equal wall-clock time": [table_of_seconds(results)],
        "Number of experts and query norms": [table_of_experts(results)],
        "Number of active experts": [table_of_active_experts(results), table_after_training(results)],
        "Variations": [table_of_variations(results)],
    }
    return "\n".join(
        f"## {heading}\n\n" + "\n\n".join(filter(None, found)) + "\n" for heading, found in tables.items()
    )


def write_results(file: Path, results: Results) -> None:
    """Writes the results to a JSON file, with one line per run."""
    write_runs(file, {"plan": asdict(results.plan), "seconds": results.seconds}, results.runs)


def read_results(file: Path) -> Results:
    """Reads a file of [`write_results`]."""
    parts = read_json(file)
    return Results(Plan(**parts["plan"]), parts["runs"], parts["seconds"])
