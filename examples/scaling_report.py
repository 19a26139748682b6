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
from statistics import mean, stdev
from typing import Any

from scaling_plan import (
    CORPUS,
    DENSE,
    PEER,
    Plan,
    Run,
    ablation_runs,
    budget_name,
    choose_rates,
    choose_sizes,
    configuration_of,
    corpus_loss,
    costs_of,
    rate_runs,
    reference_run,
    run_of_seconds,
    size_runs,
    with_seeds,
)
from scaling_speed import median_seconds
from studies import markdown_table, read_json, write_text


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
        seconds (`dict[str, list[float]]`): Of models, see `scaling_speed.py`.
    """

    def __init__(self, plan: Plan, runs: dict[str, dict[str, Any]], seconds: dict[str, list[float]]):
        self.plan = plan
        self.runs = runs
        self.seconds = seconds
        self.rates = choose_rates(plan, runs)

    def optimal(self, budget: float) -> dict[str, Run]:
        """Of each variant the run of the size with the lowest loss."""
        return choose_sizes(self.plan, self.rates, budget, self.runs)

    def reference(self) -> Run:
        """The run that ablations are held against."""
        return reference_run(self.plan, self.rates)

    def seeds_of(self, run: Run) -> list[dict[str, Any]]:
        """What came of the run with each seed it was made with."""
        return [self.runs[each.name] for each in with_seeds(run, self.plan) if each.name in self.runs]

    def perplexities(self, run: Run, text: str) -> list[float]:
        """Of a text, with each seed."""
        return [math.exp(result["losses"][text]) for result in self.seeds_of(run)]

    def mean_perplexities(self, run: Run) -> list[float]:
        """The geometric mean over the evaluation texts, with each seed."""
        return [mean_perplexity(result["losses"], self.plan) for result in self.seeds_of(run)]

    def margins(self, budget: float) -> dict[str, float]:
        """By which share each variant's mean perplexity is below that of dense, compute-optimal both."""
        means = {variant: self.mean_perplexities(run) for variant, run in self.optimal(budget).items()}
        return {variant: below(values, means[DENSE]) for variant, values in means.items() if variant != DENSE}

    def perplexities_after_training(self, change: str, text: str | None = None) -> list[float]:
        """Of the trained reference with fields changed, with each seed: of a text, or the mean."""
        found = [result["after_training"][change] for result in self.seeds_of(self.reference())]
        return [mean_perplexity(each, self.plan) if text is None else math.exp(each[text]) for each in found]

    def step_seconds(self, run: Run) -> float:
        return median_seconds(self.seconds, run)

    def equal_seconds(self, budget: float) -> tuple[Run, Run]:
        """The compute-optimal dense run, and the PEER run that takes as many seconds."""
        optimal = self.optimal(budget)
        return optimal[DENSE], run_of_seconds(optimal[PEER], optimal[DENSE], self.step_seconds)


def mean_perplexity(losses: dict[str, float], plan: Plan) -> float:
    """The geometric mean over the evaluation texts."""
    return math.exp(mean(losses[name] for name in plan.evaluation_texts))


def spread(values: list[float], digits: int = 2) -> str:
    """Mean ± deviation over seeds."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def below(values: list[float], others: list[float]) -> float:
    """By which share the mean of the values is below that of the others."""
    return 1 - mean(values) / mean(others)


def table_of_perplexities(results: Results, budget: float) -> str:
    """Perplexity of the compute-optimal models on the evaluation texts, as in the paper's table 1."""
    texts = [*results.plan.evaluation_texts, CORPUS]
    rows = [[f"{budget_name(budget)} FLOPs", "size", "parameters, M", *texts, "geometric mean", "below dense"]]
    optimal = results.optimal(budget)
    for variant, run in optimal.items():
        means = results.mean_perplexities(run)
        rows.append(
            [
                LABELS[variant],
                str(run.hidden_size),
                f"{costs_of(run, results.plan).parameters / 1e6:.1f}",
                *(spread(results.perplexities(run, text)) for text in texts),
                spread(means),
                "" if variant == DENSE else f"{below(means, results.mean_perplexities(optimal[DENSE])):.1%}",
            ]
        )
    return markdown_table(rows)


def paper_margins() -> dict[str, dict[str, float]]:
    """At each of the paper's budgets, by which share a variant's mean perplexity is below that of dense."""
    means = {
        budget: {variant: math.exp(mean(map(math.log, values))) for variant, values in found.items()}
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
        share = "" if variant == DENSE else f"{margins[variant]:.1%}"
        rows.append(
            [
                LABELS[variant],
                *(f"{value:.2f}" for value in values),
                f"{math.exp(mean(map(math.log, values))):.2f}",
                share,
            ]
        )
    return markdown_table(rows)


def table_of_sizes(results: Results, budget: float) -> str:
    """Held-out loss of every size at a budget: the isoFLOP curves."""
    plan = results.plan
    rows = [[f"held-out loss at {budget_name(budget)} FLOPs", *(f"hidden_size {size}" for size in plan.hidden_sizes)]]
    runs = size_runs(plan, results.rates, budget)
    rows += [[LABELS[variant], *_losses(results, runs, variant)] for variant in plan.variants]
    tokens = (run.steps * plan.tokens_of_step / 1e6 for run in runs if run.variant == DENSE)
    rows.append(["million tokens, dense", *(f"{each:.1f}" for each in tokens)])
    return markdown_table(rows)


def table_of_rates(results: Results) -> str:
    """Held-out loss at each learning rate."""
    rows = [["held-out loss at a learning rate of", *(f"{rate:g}" for rate in results.plan.learning_rates)]]
    runs = rate_runs(results.plan)
    rows += [[LABELS[variant], *_losses(results, runs, variant)] for variant in results.plan.variants]
    return markdown_table(rows)


def _losses(results, runs, variant):
    """Cells of a variant's held-out losses, the lowest one bold."""
    losses = [corpus_loss(results.runs[run.name]) for run in runs if run.variant == variant]
    return [f"**{loss:.3f}**" if loss == min(losses) else f"{loss:.3f}" for loss in losses]


def table_of_experts(results: Results) -> str:
    """The number of experts at fixed active ones, and query norms, as in the paper's table 3."""
    rows = [["query norm", "N", "parameters, M", CORPUS, "geometric mean", "usage, %", "top-1 usage, %", "unevenness"]]
    for (norm, num_experts), run in sorted(norm_runs(results).items(), key=lambda each: (str(each[0][0]), each[0][1])):
        (usage,) = results.runs[run.name]["usage"].values()
        rows.append(
            [
                norm or "none",
                f"{num_experts:,}",
                f"{costs_of(run, results.plan).parameters / 1e6:.1f}",
                spread(results.perplexities(run, CORPUS)),
                spread(results.mean_perplexities(run)),
                f"{usage['usage']:.1%}".rstrip("%"),
                f"{usage['top1_usage']:.1%}".rstrip("%"),
                f"{usage['unevenness']:.2f}",
            ]
        )
    return markdown_table(rows)


def norm_runs(results: Results) -> dict[tuple[str | None, int], Run]:
    """Runs that differ in nothing but the query norm and the number of experts, by these."""
    found = {}
    for run in [results.reference(), *ablation_runs(results.plan, results.rates)]:
        if run.ablation is None or run.ablation[0] in ("num_experts", "query_norm"):
            config = configuration_of(run, results.plan)
            found[config.query_norm, config.num_experts] = run
    return found


def table_of_the_papers_experts() -> str:
    """The same of the paper."""
    rows = [["paper, query norm", "N", "C4", "usage, %", "unevenness"]]
    for norm, measures in PAPER_USAGE.items():
        for num_experts, (perplexity, usage, unevenness) in zip(PAPER_NUM_EXPERTS, measures, strict=True):
            rows.append([norm or "none", num_experts, f"{perplexity:.2f}", f"{usage:g}", f"{unevenness:.2f}"])
    return markdown_table(rows)


def active_runs(results: Results) -> dict[int, Run]:
    """Runs that differ in the number of active experts, by it."""
    runs = [results.reference(), *ablation_runs(results.plan, results.rates)]
    runs = [run for run in runs if run.ablation is None or run.ablation[0] == "active"]
    return dict(sorted((configuration_of(run, results.plan).num_experts_per_tok, run) for run in runs))


def table_of_active_experts(results: Results) -> str:
    """The number of active experts, trained with."""
    rows = [["h·k", "h", "k", "MFLOPs per token", CORPUS, "geometric mean"]]
    for active, run in active_runs(results).items():
        config = configuration_of(run, results.plan)
        rows.append(
            [
                str(active),
                str(config.num_retrieval_heads),
                str(config.num_experts_per_head),
                f"{costs_of(run, results.plan).flops / 1e6:.2f}",
                spread(results.perplexities(run, CORPUS)),
                spread(results.mean_perplexities(run)),
            ]
        )
    return markdown_table(rows)


def table_after_training(results: Results) -> str:
    """What it does to the trained model to change h or k at load."""
    rows = [["without training again", CORPUS, "geometric mean", "rise"]]
    reference = results.reference()
    before, config = results.mean_perplexities(reference), configuration_of(reference, results.plan)
    label = f"as trained, h = {config.num_retrieval_heads}, k = {config.num_experts_per_head}"
    rows.append([label, spread(results.perplexities(reference, CORPUS)), spread(before), ""])
    for change in results.plan.after_training:
        means = results.perplexities_after_training(change)
        corpus = results.perplexities_after_training(change, CORPUS)
        rows.append([change, spread(corpus), spread(means), f"{-below(means, before):+.1%}"])
    return markdown_table(rows)


def table_of_variations(results: Results) -> str:
    """What the paper does not try."""
    rows = [["", "MFLOPs per token", "parameters, M", CORPUS, "geometric mean", "below PEER"]]
    reference = results.reference()
    for run in [reference, *ablation_runs(results.plan, results.rates)]:
        if run.ablation is None or run.ablation[0] == "variation":
            costs = costs_of(run, results.plan)
            means = results.mean_perplexities(run)
            rows.append(
                [
                    "PEER" if run.ablation is None else run.ablation[1],
                    f"{costs.flops / 1e6:.2f}",
                    f"{costs.parameters / 1e6:.1f}",
                    spread(results.perplexities(run, CORPUS)),
                    spread(means),
                    "" if run.ablation is None else f"{below(means, results.mean_perplexities(reference)):.1%}",
                ]
            )
    return markdown_table(rows)


def table_of_seconds(results: Results) -> str:
    """Dense and PEER at equal wall-clock, each with the schedule of its own steps."""
    rows = [["", "size", "steps", "ms per step", "seconds", CORPUS, "geometric mean", "below dense"]]
    for budget in results.plan.budgets:
        runs = results.equal_seconds(budget)
        dense = results.mean_perplexities(runs[0])
        for run in runs:
            seconds, means = results.step_seconds(run), results.mean_perplexities(run)
            rows.append(
                [
                    LABELS[run.variant],
                    str(run.hidden_size),
                    f"{run.steps:,}",
                    f"{seconds * 1e3:.0f}",
                    f"{seconds * run.steps:.0f}",
                    spread(results.perplexities(run, CORPUS)),
                    spread(means),
                    "" if run.variant == DENSE else f"{below(means, dense):.1%}",
                ]
            )
    return markdown_table(rows)


def table_of_expert_choice(results: Results) -> str:
    """What experts' choice, in training mode, sees of later tokens."""
    rows = [["MoE, expert choice", "routed by token, as it generates", "as trained, sees what comes later"]]
    for budget in results.plan.budgets:
        for run in results.optimal(budget).values():
            trained = [result.get("losses_as_trained") for result in results.seeds_of(run)]
            if all(trained):
                means = [mean_perplexity(losses, results.plan) for losses in trained]
                rows.append([f"{budget_name(budget)} FLOPs", spread(results.mean_perplexities(run)), spread(means)])
    return markdown_table(rows)


def describe(results: Results) -> str:
    """All tables, each of this study before the paper's, under headings."""
    budgets = results.plan.budgets
    tables = {
        "Perplexity at equal compute": [
            *(table_of_perplexities(results, budget) for budget in budgets),
            *map(table_of_the_paper, PAPER_PERPLEXITIES),
            table_of_expert_choice(results),
        ],
        "Sizes and learning rates": [
            *(table_of_sizes(results, budget) for budget in budgets),
            table_of_rates(results),
        ],
        "Equal wall-clock": [table_of_seconds(results)],
        "More experts, and query norms": [table_of_experts(results), table_of_the_papers_experts()],
        "More active experts": [table_of_active_experts(results), table_after_training(results)],
        "Variations": [table_of_variations(results)],
    }
    return "\n".join(f"## {heading}\n\n" + "\n\n".join(found) + "\n" for heading, found in tables.items())


def write_results(file: Path, results: Results) -> None:
    """Writes all there is to know, a run in each line."""
    parts = {
        "command": "python examples/scaling.py",
        "plan": asdict(results.plan),
        "seconds": results.seconds,
    }
    head = json.dumps(parts, indent=1).removesuffix("\n}")
    runs = ",\n".join(f"  {json.dumps(name)}: {json.dumps(run)}" for name, run in sorted(results.runs.items()))
    write_text(file, f'{head},\n "runs": {{\n{runs}\n }}\n}}\n')


def read_results(file: Path) -> Results:
    """What [`write_results`] wrote."""
    parts = read_json(file)
    return Results(Plan(**parts["plan"]), parts["runs"], parts["seconds"])
