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
"""What comes of the scaling study: its tables, each beside what the paper reports."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from statistics import geometric_mean, mean, median, stdev
from typing import Any

from studies.common.study_folder import read_json, write_text
from studies.common.tables import markdown_table, spread_cell
from studies.scaling.plan import (
    CORPUS,
    DENSE,
    PEER,
    Plan,
    Run,
    ablation_runs,
    budget_name,
    changed_fields,
    choose_rates,
    choose_sizes,
    configuration_of,
    costs_of,
    rate_runs,
    reference_run,
    run_of_seconds,
    size_runs,
    training_arguments,
    with_seeds,
)
from studies.scaling.speed import WARM_UPS


LABELS = {
    "dense": "dense",
    "moe-expert-choice": "MoE, expert choice",
    "moe-token-choice": "MoE, token choice",
    "pkm": "PKM",
    "peer": "PEER",
}

# The paper's table 1: perplexity of compute-optimal models at two budgets.
PAPER_TEXTS = ("Curation", "Lambada", "Pile", "Wikitext", "C4")
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

# The paper's table 3, at rising N: perplexity on C4, usage in percent, unevenness; without and with BatchNorm.
PAPER_NUM_EXPERTS = ("16k", "65k", "262k", "1M")
PAPER_USAGE = {
    None: ((23.47, 100, 0.45), (22.61, 100, 0.63), (21.54, 100, 0.97), (20.73, 99.8, 1.52)),
    "batch": ((23.47, 100, 0.30), (22.55, 100, 0.44), (21.47, 100, 0.66), (20.64, 100, 1.06)),
}


class Results:
    """
    What came of all runs, to look things up in.

    Args:
        plan (`Plan`)
        runs (`dict[str, dict]`): Of each run's name what `scaling_run.py` wrote.
        seconds (`dict`): What `Study.seconds` found.
    """

    def __init__(self, plan: Plan, runs: dict[str, dict[str, Any]], seconds: dict[str, Any]):
        self.plan = plan
        self.runs = runs
        self.seconds = seconds
        self.rates = choose_rates(plan, runs)

    def optimal(self, budget: float) -> dict[str, Run]:
        """Of each variant the run of the size with the lowest loss."""
        return choose_sizes(self.plan, self.rates, budget, self.runs)

    def reference(self) -> Run:
        """The run that ablations are held against, with the first seed."""
        return reference_run(self.plan, self.rates)

    def ablations(self, *groups: str) -> list[Run]:
        """The reference, and the runs of groups of ablations."""
        return [self.reference(), *(run for run in ablation_runs(self.plan, self.rates) if run.ablation[0] in groups)]

    def losses(self, run: Run) -> dict[str, float]:
        """Of each text, of this run alone."""
        return self.runs[run.name]["losses"]

    def made(self, run: Run) -> list[dict[str, Any]]:
        """What came of the run with each seed that it was made with."""
        return [self.runs[each.name] for each in with_seeds(run, self.plan) if each.name in self.runs]

    def with_seeds(self, run: Run) -> list[dict[str, float]]:
        """Of each of these seeds, the loss of each text."""
        return [result["losses"] for result in self.made(run)]

    def margins(self, budget: float) -> dict[str, float]:
        """By which share each variant's mean perplexity is below that of dense, compute-optimal both."""
        means = self._means(budget)
        return {variant: below(values, means[DENSE]) for variant, values in means.items() if variant != DENSE}

    def deviations(self, budget: float) -> dict[str, float]:
        """How far these margins vary over seeds, those of the variant and those of dense."""
        means = self._means(budget)
        dense = means.pop(DENSE)
        return {variant: _ratio_deviation(values, dense) for variant, values in means.items()}

    def _means(self, budget):
        """Of each variant's compute-optimal model the mean perplexity with each seed."""
        return {
            variant: mean_perplexities(self.with_seeds(run), self.plan)
            for variant, run in self.optimal(budget).items()
        }

    def step_seconds(self, run: Run) -> float:
        """The median step of the run's model."""
        return median(self.seconds[str(run.hidden_size)]["seconds"][run.variant])

    def equal_seconds(self, budget: float) -> tuple[Run, Run]:
        """The compute-optimal dense run, and the PEER run of the size that is so too, for as many seconds."""
        optimal = self.optimal(budget)
        return optimal[DENSE], run_of_seconds(optimal[PEER], optimal[DENSE], self.step_seconds)


def perplexities(losses: list[dict[str, float]], text: str) -> list[float]:
    """Of a text, with each seed."""
    return [math.exp(each[text]) for each in losses]


def mean_perplexities(losses: list[dict[str, float]], plan: Plan) -> list[float]:
    """The geometric mean over the evaluation texts, with each seed."""
    return [math.exp(mean(each[name] for name in plan.evaluation_texts)) for each in losses]


def spread(values: list[float]) -> str:
    """Mean ± deviation over seeds."""
    return spread_cell(mean(values), stdev(values) if len(values) > 1 else None, digits=2)


def _ratio_deviation(values, others):
    """Of the ratio of two means, to first order; not a number where one is of one seed."""
    if min(len(values), len(others)) == 1:
        return math.nan
    ratio = mean(values) / mean(others)
    return ratio * math.hypot(stdev(values) / mean(values), stdev(others) / mean(others))


def below(values: list[float], others: list[float]) -> float:
    """By which share the mean of the values is below that of the others."""
    return 1 - mean(values) / mean(others)


def below_cell(values: list[float], others: list[float]) -> str:
    """The same, ± how far it varies over seeds."""
    deviation = _ratio_deviation(values, others)
    return f"{below(values, others):.1%}" + ("" if math.isnan(deviation) else f" ± {deviation:.1%}")


def label(variant: str) -> str:
    return LABELS.get(variant, variant)


def table_of_perplexities(results: Results, budget: float) -> str:
    """Perplexity of the compute-optimal models on the evaluation texts, as in the paper's table 1."""
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


def note_on_models(results: Results) -> str:
    """How to read the tables of perplexities, and what of the training is a variant's own."""
    plan = results.plan
    own = {variant: own_training(run, plan) for variant, run in results.optimal(plan.budgets[0]).items()}
    differ = "; ".join(f"{label(variant)} with {in_words(found)}" for variant, found in own.items() if found)
    return (
        f"Means over {plan.seeds} seeds ± deviation, none of them the one that the size was chosen with; size is "
        "`hidden_size`. All models are evaluated as they generate: where experts choose in training, tokens choose here. "
        f"Trained alike, but {differ or 'for nothing'}."
    )


def own_training(run: Run, plan: Plan) -> dict[str, Any]:
    """In what a run's training differs from the plan's: its optimizer, `TrainingArguments`, how its experts start."""
    fields, arguments = changed_fields(run, plan), training_arguments(run, plan)
    own = {"row_adamw": True} if fields.get("sparse_expert_gradients") else {}
    own |= {name: value for name, value in arguments.items() if plan.training.get(name) != value}
    if "expert_initializer_range" in fields:
        own["expert_initializer_range"] = fields["expert_initializer_range"]
    return own


def in_words(values: dict[str, Any]) -> str:
    """Names and values."""
    return ", ".join(f"`{name}` {value}" for name, value in values.items())


def paper_margins() -> dict[str, dict[str, float]]:
    """At each of the paper's budgets, by which share a variant's mean perplexity is below that of dense."""
    means = {
        budget: {variant: geometric_mean(values) for variant, values in found.items()}
        for budget, found in PAPER_PERPLEXITIES.items()
    }
    return {
        budget: {variant: 1 - value / found[DENSE] for variant, value in found.items() if variant != DENSE}
        for budget, found in means.items()
    }


def table_of_the_paper(budget: str) -> str:
    """The same of the paper."""
    rows = [[f"paper, {budget} FLOPs", *PAPER_TEXTS, "geometric mean", "below dense"]]
    margins = paper_margins()[budget]
    for variant, values in PAPER_PERPLEXITIES[budget].items():
        cells = [f"{value:.2f}" for value in (*values, geometric_mean(values))]
        rows.append([label(variant), *cells, f"{margins[variant]:.1%}" if variant in margins else ""])
    return markdown_table(rows)


def table_of_sizes(results: Results, budget: float) -> str:
    """Held-out loss of every size at a budget, with the first seed: the isoFLOP curves."""
    plan = results.plan
    rows = [[f"held-out loss at {budget_name(budget)} FLOPs", *(f"hidden_size {size}" for size in plan.sizes(budget))]]
    runs = size_runs(plan, results.rates, budget)
    rows += [[label(variant), *_corpus_cells(results, runs, variant)] for variant in plan.variants]
    tokens = (run.steps * plan.tokens_of_step / 1e6 for run in runs if run.variant == DENSE)
    rows.append(["million tokens, dense", *(f"{each:.1f}" for each in tokens)])
    return markdown_table(rows)


def table_of_rates(results: Results) -> str:
    """Held-out loss at each learning rate, of the size and budget that they are chosen at."""
    plan = results.plan
    where = f"hidden_size {plan.reference_hidden_size}, {budget_name(plan.budgets[0])} FLOPs"
    rows = [[f"held-out loss, {where}", *(f"learning rate {rate:g}" for rate in plan.learning_rates)]]
    runs = rate_runs(plan)
    rows += [[label(variant), *_corpus_cells(results, runs, variant)] for variant in plan.variants]
    return markdown_table(rows)


def _corpus_cells(results, runs, variant):
    """Of a variant's runs the held-out losses, the lowest one bold."""
    losses = [results.losses(run)[CORPUS] for run in runs if run.variant == variant]
    return [f"**{loss:.3f}**" if loss == min(losses) else f"{loss:.3f}" for loss in losses]


def edges(results: Results) -> list[str]:
    """What was best at the end of what was tried, so that there may be better beyond."""
    plan = results.plan
    found = [
        f"{label(variant)} at a learning rate of {rate:g}"
        for variant, rate in results.rates.items()
        if rate in (min(plan.learning_rates), max(plan.learning_rates))
    ]
    for budget in plan.budgets:
        found += [
            f"{label(variant)} at hidden_size {run.hidden_size} with {budget_name(budget)} FLOPs"
            for variant, run in results.optimal(budget).items()
            if run.hidden_size in (min(plan.sizes(budget)), max(plan.sizes(budget)))
        ]
    return found


def norm_runs(results: Results) -> dict[tuple[str | None, int], Run]:
    """Runs that differ in nothing but the query norm and the number of experts, by these."""
    found = {}
    for run in results.ablations("num_experts", "query_norm"):
        config = configuration_of(run, results.plan)
        found[config.query_norm, config.num_experts] = run
    return dict(sorted(found.items(), key=lambda each: (each[0][0] or "", each[0][1])))


def table_of_experts(results: Results) -> str:
    """The number of experts at fixed active ones, and query norms, as in the paper's table 3."""
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
    """What a run's model costs, and its perplexity of these seeds."""
    costs = costs_of(run, results.plan)
    return [
        f"{costs.flops / 1e6:.2f}",
        f"{costs.parameters / 1e6:.1f}",
        spread(perplexities(losses, CORPUS)),
        spread(mean_perplexities(losses, results.plan)),
    ]


def note_on_experts(results: Results) -> str:
    """How to read the table of experts."""
    plan = results.plan
    return (
        f"Rows with ± are means over {plan.seeds} seeds, others are of one. {_same_text(results)} Usage is counted on "
        f"{plan.eval_sequences * plan.block_size:,} tokens of the held-out corpus, or as many as there are."
    )


def _same_text(results):
    reference = results.reference()
    return f"All of hidden_size {reference.hidden_size}, {reference.steps:,} steps: the same text, not the same FLOPs."


def table_of_the_papers_experts() -> str:
    """The same of the paper."""
    rows = [["paper, query norm", "N", "C4", "usage, %", "unevenness"]]
    for norm, measures in PAPER_USAGE.items():
        for num_experts, (perplexity, usage, unevenness) in zip(PAPER_NUM_EXPERTS, measures, strict=True):
            rows.append([norm or "none", num_experts, f"{perplexity:.2f}", f"{usage:g}", f"{unevenness:.2f}"])
    return markdown_table(rows)


def active_runs(results: Results) -> dict[int, Run]:
    """Runs that differ in the number of active experts, by it."""
    runs = results.ablations("active")
    return dict(sorted((configuration_of(run, results.plan).num_experts_per_tok, run) for run in runs))


def table_of_active_experts(results: Results) -> str:
    """The number of active experts, trained with."""
    rows = [["h·k", "h", "k", *_COST_COLUMNS]]
    for active, run in active_runs(results).items():
        config = configuration_of(run, results.plan)
        sizes = (active, config.num_retrieval_heads, config.num_experts_per_head)
        rows.append([*map(str, sizes), *_cost_cells(results, run, results.with_seeds(run))])
    return markdown_table(rows)


def note_on_ablations(results: Results) -> str:
    """What ablations have in common."""
    return f"PEER itself is a mean over {results.plan.seeds} seeds ± deviation, others are of one seed. {_same_text(results)}"


def losses_after_training(results: Results, change: str) -> list[dict[str, float]]:
    """Of the trained reference with fields changed, with each seed, the loss of each text."""
    return [result["after_training"][change]["losses"] for result in results.made(results.reference())]


def table_after_training(results: Results) -> str:
    """What it does to the trained model to change h or k at load."""
    reference = results.reference()
    config = configuration_of(reference, results.plan)
    trained = f"as trained, h = {config.num_retrieval_heads}, k = {config.num_experts_per_head}"
    changed = {trained: results.with_seeds(reference)}
    changed |= {change: losses_after_training(results, change) for change in results.plan.after_training}
    before = mean_perplexities(changed[trained], results.plan)
    rows = [["without training again", CORPUS, "geometric mean", "rise"]]
    for name, losses in changed.items():
        means = mean_perplexities(losses, results.plan)
        rise = "" if name == trained else f"{-below(means, before):+.1%}"
        rows.append([name, spread(perplexities(losses, CORPUS)), spread(means), rise])
    return markdown_table(rows)


def table_of_variations(results: Results) -> str:
    """What the paper does not try."""
    rows = [["", *_COST_COLUMNS, "below PEER"]]
    before = mean_perplexities(results.with_seeds(results.reference()), results.plan)
    for run in results.ablations("variation"):
        losses = results.with_seeds(run)
        means = mean_perplexities(losses, results.plan)
        name, share = ("PEER", "") if run.ablation is None else (run.ablation[1], below_cell(means, before))
        rows.append([name, *_cost_cells(results, run, losses), share])
    return markdown_table(rows)


def table_of_seconds(results: Results) -> str:
    """Dense and PEER at equal wall-clock, each with the schedule of its own steps."""
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


def note_on_seconds(results: Results) -> str:
    """How steps were timed, and where."""
    measured = [results.seconds[str(size)] for size in results.plan.all_sizes]
    (repetitions,) = {len(times) for each in measured for times in each["seconds"].values()}
    machines = {", ".join(f"{name} {value}" for name, value in each["machine"].items()) for each in measured}
    return (
        f"Times of a step are medians of {repetitions}, of dense and PEER in turns, of forward, backward and optimizer without "
        f"reading data, on {'; '.join(sorted(machines))}, of models trained for {WARM_UPS} steps: tokens of new ones "
        "have hardly an expert in common. Seconds are steps times these."
    )


def table_of_expert_choice(results: Results) -> str:
    """What experts' choice, in training mode, sees of later tokens. Empty where no variant's experts choose."""
    rows = [["experts choose", "routed by token, as it generates", "as trained, sees later tokens"]]
    for budget in results.plan.budgets:
        for variant, run in results.optimal(budget).items():
            made = results.made(run)
            trained = [result["losses_as_trained"] for result in made if "losses_as_trained" in result]
            if trained:
                means = [mean_perplexities(losses, results.plan) for losses in (results.with_seeds(run), trained)]
                rows.append([f"{label(variant)}, {budget_name(budget)} FLOPs", *map(spread, means)])
    return markdown_table(rows) if len(rows) > 1 else ""


def describe(results: Results) -> str:
    """All tables, each of this study before the paper's, under headings."""
    budgets = results.plan.budgets
    beyond = "; ".join(edges(results)) or "none"
    tables = {
        "Perplexity at equal compute": [
            *(table_of_perplexities(results, budget) for budget in budgets),
            *map(table_of_the_paper, PAPER_PERPLEXITIES),
            table_of_expert_choice(results),
            note_on_models(results),
        ],
        "Sizes and learning rates": [
            *(table_of_sizes(results, budget) for budget in budgets),
            table_of_rates(results),
            f"Best at the end of what was tried: {beyond}.",
        ],
        "Equal wall-clock": [table_of_seconds(results), note_on_seconds(results)],
        "More experts, and query norms": [
            table_of_experts(results),
            table_of_the_papers_experts(),
            note_on_experts(results),
        ],
        "More active experts": [
            table_of_active_experts(results),
            note_on_ablations(results),
            table_after_training(results),
        ],
        "Variations": [table_of_variations(results), note_on_ablations(results)],
    }
    return "\n".join(
        f"## {heading}\n\n" + "\n\n".join(filter(None, found)) + "\n" for heading, found in tables.items()
    )


def write_results(file: Path, results: Results) -> None:
    """Writes all there is to know, a run in each line."""
    head = json.dumps({"plan": asdict(results.plan), "seconds": results.seconds}, indent=1).removesuffix("\n}")
    runs = ",\n".join(f"  {json.dumps(name)}: {json.dumps(run)}" for name, run in sorted(results.runs.items()))
    write_text(file, f'{head},\n "runs": {{\n{runs}\n }}\n}}\n')


def read_results(file: Path) -> Results:
    """What [`write_results`] wrote."""
    parts = read_json(file)
    return Results(Plan(**parts["plan"]), parts["runs"], parts["seconds"])
