# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables of the recipe study from its raw results."""

import math
from statistics import quantiles
from typing import Any

import numpy as np

from studies.common.tables import markdown_table
from studies.common.training_plan import CORPUS, DENSE, budget_name, configuration_of, costs_of
from studies.recipe.differences import Difference
from studies.recipe.plan import (
    BLOCK,
    EXPONENTS,
    RECIPE,
    choose_rate,
    design_runs,
    runs_beyond,
    runs_by_size,
    runs_to_tune,
    screening_runs,
)
from studies.recipe.results import Results


def table_of_the_screening(results: Results) -> str:
    """Table of variants with one seed, each against its parent on the corpus."""
    plan, runs = results.plan, screening_runs(results.plan)
    rows = [["seed 0", "parent", "MFLOPs per token", "steps", CORPUS, "below parent"]]
    for name, run in runs.items():
        if not results.are_made([run]):
            continue
        parent = plan.variants[name]["parent"] if name in plan.screened else ""
        is_compared = parent and results.are_made([runs[parent]])
        rows.append(
            [
                name,
                parent,
                f"{costs_of(run, plan).flops / 1e6:.2f}",
                f"{run.steps:,}",
                f"{results.corpus_perplexity([run]):.2f}",
                f"{results.below_on_the_corpus(run, runs[parent]):+.1%}" if is_compared else "",
            ]
        )
    return markdown_table(rows) if len(rows) > 1 else ""


def table_of_a_design(results: Results, design: dict[str, Any]) -> str:
    """Table of the effects of the factors of a design, on the corpus only: nothing is chosen by the five texts."""
    if not (effects := results.effects(design)):
        return ""
    number, variant = len(design_runs(results.plan, design)), design["variant"]
    rows = [[f"{number} runs of {variant}", "corpus perplexity below without it", "adopted"]]
    for name, effect in effects.items():
        rows.append([name, str(effect), "" if name == BLOCK else "yes" if is_adopted(effect, design["bar"]) else "no"])
    return markdown_table(rows)


def is_adopted(effect: Difference, bar: str) -> bool:
    """Whether a factor is adopted: an effect of at least 1 % and, for the bar "interval", an interval above zero."""
    return effect.share >= 0.01 and (bar == "mean" or effect.low > 0)


def table_of_trials(results: Results) -> str:
    """Table of the held-out perplexities of all trials, with the learning rate of the best."""
    runs = runs_to_tune(results.plan)
    if not results.best or not runs:
        return ""
    beyond, number = runs_beyond(results.plan, results.runs), max(map(len, runs.values()))
    rows = [["corpus perplexity", *(f"trial {index + 1}" for index in range(number)), "beyond", "learning rate"]]
    for variant, own in runs.items():
        best = results.best[variant]
        tried = [*own, beyond.get(variant)]
        cells = ["" if run is None else f"{results.corpus_perplexity([run]):.2f}" for run in tried]
        rows.append(
            [
                variant,
                *(f"**{cell}**" if run == best else cell for cell, run in zip(cells, tried, strict=True)),
                f"{best.learning_rate:g}",
            ]
        )
    return markdown_table(rows)


def table_of_rates(results: Results) -> str:
    """Table of held-out perplexities of dense and the recipe at another size, by the exponent of the learning rate."""
    if not (runs := results.compared_rates()):
        return ""
    (size,) = {run.hidden_size for own in runs.values() for run in own}
    budget = budget_name(results.plan.budgets[0])
    head = f"corpus perplexity, d = {size}, {budget} FLOPs"
    rows = [[head, *(f"exponent {exponent:g}" for exponent in EXPONENTS), "beyond", "learning rate"]]
    for variant, own in runs.items():
        chosen = choose_rate(own, results.runs)
        cells = [f"{results.corpus_perplexity([run]):.2f}" for run in own]
        marked = [f"**{cell}**" if run == chosen else cell for cell, run in zip(cells, own, strict=True)]
        rows.append([variant, *marked, *[""] * (len(rows[0]) - 2 - len(marked)), f"{chosen.learning_rate:g}"])
    return markdown_table(rows)


def table_of_sizes(results: Results, budget: float) -> str:
    """Table of the held-out perplexities of all sizes at a budget, for variants with several sizes."""
    chosen = results.chosen(budget)
    if not chosen:
        return ""
    runs = {
        variant: {run.hidden_size: run for run in runs}
        for variant, runs in runs_by_size(results.plan, results.best, budget).items()
        if len(runs) > 1
    }
    if not runs:
        return ""
    sizes = sorted({size for own in runs.values() for size in own})
    rows = [[f"corpus perplexity, {budget_name(budget)} FLOPs", *(f"d = {size}" for size in sizes)]]
    for variant, own in runs.items():
        cells = {size: f"{results.corpus_perplexity([run]):.2f}" for size, run in own.items()}
        cells[chosen[variant].hidden_size] = f"**{cells[chosen[variant].hidden_size]}**"
        rows.append([variant, *(cells.get(size, "") for size in sizes)])
    return markdown_table(rows)


def table_of_the_comparison(results: Results, budget: float) -> str:
    """Table of the compared runs at a budget, against dense, and the recipe against each."""
    plan, runs = results.plan, results.compared(budget)
    if not {DENSE, RECIPE} <= runs.keys():
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
        "in standard errors",
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
                "" if ahead is None or math.isnan(ahead.low) else f"{-math.log(1 - ahead.share) / ahead.error:.1f}",
            ]
        )
    return markdown_table(rows)


def table_of_seeds(results: Results, budget: float) -> str:
    """Table of each compared run at a budget, by its seed."""
    return _table_of_seeds(results, f"five texts, {budget_name(budget)} FLOPs", results.compared(budget))


def _table_of_seeds(results, head, runs):
    """Table of each seed. A mean would not show whether the models of a variant fall into several groups."""
    by_seed = {variant: {run.seed: run for run in own} for variant, own in runs.items()}
    seeds = sorted({seed for own in by_seed.values() for seed in own})
    if len(seeds) < 2:
        return ""
    rows = [[head, *(f"seed {seed}" for seed in seeds)]]
    for variant, own in by_seed.items():
        rows.append([variant, *(f"{results.perplexity([own[seed]]):.2f}" if seed in own else "" for seed in seeds)])
    return markdown_table(rows)


def table_of_parts(results: Results, budget: float) -> str:
    """Table of the losses of the compared runs at a budget along the sequences, by the number of tokens before."""
    losses = {variant: results.part_losses(runs) for variant, runs in results.compared(budget).items()}
    losses = {variant: own for variant, own in losses.items() if own}
    if not losses:
        return ""
    (number,) = {len(own) for own in losses.values()}
    parts = np.array_split(np.arange(1, results.plan.block_size), number)
    head = f"five texts, nats, {budget_name(budget)} FLOPs"
    rows = [[head, *(f"after {part[0]} to {part[-1]} tokens" for part in parts)]]
    rows += [[variant, *(f"{loss:.3f}" for loss in own)] for variant, own in losses.items()]
    return markdown_table(rows)


def table_of_seconds(results: Results) -> str:
    """
    Tables of dense and the recipe at equal seconds: each trial of the recipe and each width with one seed, and the
    best width of each with several seeds, also by seed.
    """
    tables = []
    if results.best_at_equal_seconds and len(results.plan.timed_trials) > 1:
        trials = [[run] for run in results.runs_of_timed_trials()]
        tables.append(_table_of_seconds(results, "seed 0", [([results.dense_of_seconds()], trials)]))
    if runs := results.compared_at_widths():
        pairs = [([dense], [[own]]) for dense, own in zip(runs[DENSE], runs[RECIPE], strict=True)]
        tables.append(_table_of_seconds(results, "seed 0", pairs))
    if runs := results.compared_at_equal_seconds():
        number = len(runs[DENSE])
        tables.append(_table_of_seconds(results, f"{number} seeds", [(runs[DENSE], [runs[RECIPE]])]))
        tables.append(_table_of_seeds(results, "five texts, equal seconds", runs))
    return "\n\n".join(filter(None, tables))


def _table_of_seconds(results, seeds, groups):
    rows = [[seeds, "d", "steps", "ms per step (quartiles)", "seconds", CORPUS, "five texts", "below dense"]]
    for dense, others in groups:
        rows.append(_row_of_seconds(results, dense, ""))
        rows += [_row_of_seconds(results, own, results.below(own, dense)) for own in others]
    return markdown_table(rows)


def _row_of_seconds(results, runs, ahead):
    run, seconds = runs[0], results.step_seconds(runs[0])
    low, _, high = quantiles(results.times_of_steps(run), n=4)
    milliseconds = f"{seconds * 1e3:.1f} ({low * 1e3:.1f} to {high * 1e3:.1f})"
    times = [f"{run.steps:,}", milliseconds, f"{seconds * run.steps:.0f}"]
    perplexities = [f"{value(runs):.2f}" for value in (results.corpus_perplexity, results.perplexity)]
    experts = f", k = {configuration_of(run, results.plan).num_experts_per_head}" if run.variant == RECIPE else ""
    return [f"{run.variant}{experts}", str(run.hidden_size), *times, *perplexities, str(ahead)]


def table_of_experts(results: Results) -> str:
    """Table of the recipe by its number of experts, with the same seeds, each compared with the next lower number."""
    if not (runs := results.by_num_experts()):
        return ""
    fewer = None
    seeds = len(next(iter(runs.values())))
    head = f"N, {seeds} seed" if seeds == 1 else f"N, {seeds} seeds"
    rows = [[head, "MFLOPs per token", "steps", CORPUS, "five texts", "below the one before"]]
    for number, own in runs.items():
        rows.append(
            [
                f"{number:,}",
                f"{costs_of(own[0], results.plan).flops / 1e6:.2f}",
                f"{own[0].steps:,}",
                f"{results.corpus_perplexity(own):.2f}",
                f"{results.perplexity(own):.2f}",
                "" if fewer is None else str(results.below(own, fewer)),
            ]
        )
        fewer = own
    return markdown_table(rows)


def table_of_dense_sizes(results: Results) -> str:
    """Table of dense models trained on the tokens of the recipe, and the dense size that would predict as well."""
    if (found := results.dense_sizes()) is None:
        return ""
    recipe, runs = found
    rows = [["", "d", "active parameters, M", "five texts, nats"]]
    for run in (*runs, recipe):
        active = f"{results.active_parameters(run) / 1e6:.2f}"
        rows.append([run.variant, str(run.hidden_size), active, f"{results.losses([run])[0]:.3f}"])
    return f"{markdown_table(rows)}\n\n{_size_of_the_recipe(results, recipe, runs)}"


def _size_of_the_recipe(results, recipe, runs):
    try:
        curve = results.dense_curve()
    except ValueError as error:
        return f"No curve goes through the dense models: {error}"
    active, largest = results.active_parameters(recipe), max(map(results.active_parameters, runs))
    size = curve.size_of(results.losses([recipe])[0])
    if size > largest:
        said = f"of more than {largest / active:.2f} times its active parameters, beyond the largest of these"
    else:
        formula = f"{curve.a:.3f} + {curve.b:.3g} · n^-{curve.c:.3g} of n active parameters"
        said = f"of {size / active:.2f} times its active parameters, {size / 1e6:.2f} M, by the curve {formula}"
    return f"The recipe reads like a dense model {said}."


def describe(results: Results) -> str:
    """The tables of all finished runs, under headings."""
    plan, best = results.plan, results.best
    tables_of_a_budget = (table_of_the_comparison, table_of_seeds, table_of_parts)
    tables = {
        "Search": [table_of_the_screening(results), *(table_of_a_design(results, each) for each in plan.designs)],
        "Tuning": [table_of_trials(results), table_of_rates(results)],
        "Sizes": [table_of_sizes(results, budget) for budget in plan.budgets],
        "Equal compute": [table_of(results, budget) for budget in plan.budgets for table_of in tables_of_a_budget],
        "Equal seconds": [table_of_seconds(results)],
    }
    if best:
        tables |= {
            "Number of experts": [table_of_experts(results)],
            "Dense-equivalent size": [table_of_dense_sizes(results)],
        }
    found = {heading: "\n\n".join(filter(None, each)) for heading, each in tables.items()}
    return "\n".join(f"## {heading}\n\n{text}\n" for heading, text in found.items() if text)
