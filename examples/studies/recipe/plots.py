# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Pictures of the recipe study. Each function saves one in a file, and returns whether there was anything to draw yet.
"""

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from common.pictures import add_legend, look_of, new_figure, save_picture, shades
from studies.common.training_plan import DENSE, PEER, Run, budget_name, configuration_of
from studies.recipe.differences import Difference
from studies.recipe.plan import BLOCK, RECIPE
from studies.recipe.report import is_adopted
from studies.recipe.results import Results


def plot_search(results: Results, file: Path) -> bool:
    """Plot by how much each factor of the designs of the search lowers perplexity on the corpus."""
    made = [(design, effects) for design in results.plan.designs if (effects := results.effects(design))]
    if not made:
        return False
    heights = [1.2 + 0.3 * len(effects) for _, effects in made]
    figure = new_figure(8, sum(heights))
    panels = figure.subplots(len(made), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, (design, effects) in zip(panels, made, strict=True):
        _draw_effects(design, effects, axes)
    panels[0].set_title("What each change of PEER is worth; dark, what is adopted")
    panels[-1].set_xlabel("perplexity on the corpus below without it, %, and 95 % intervals")
    save_picture(figure, file)
    return True


def _draw_effects(design: dict[str, Any], effects: dict[str, Difference], axes: Axes) -> None:
    own = {name: effect for name, effect in effects.items() if name != BLOCK}
    own = dict(sorted(own.items(), key=lambda item: item[1].share))
    for place, effect in enumerate(own.values()):
        look = look_of(RECIPE if is_adopted(effect, design["bar"]) else PEER)
        ends = [[100 * (effect.share - effect.low)], [100 * (effect.high - effect.share)]]
        axes.errorbar(100 * effect.share, place, xerr=ends, color=look.color, marker=look.marker, capsize=3)
    axes.set_yticks(range(len(own)), list(own))
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_ylabel(design["variant"])
    axes.grid(alpha=0.3, axis="x")


def plot_comparison(results: Results, file: Path) -> bool:
    """Plot perplexity below dense, at equal compute and at equal seconds, and perplexity at each width."""
    budgets = results.plan.budgets
    compared = {f"equal FLOPs,\n{budget_name(budget)}": results.compared(budget) for budget in budgets}
    compared[f"equal seconds, those of\ndense for {budget_name(budgets[-1])} FLOPs"] = (
        results.compared_at_equal_seconds()
    )
    compared = {name: runs for name, runs in compared.items() if {DENSE, RECIPE} <= runs.keys()}
    if not compared:
        return False
    by_width = results.compared_at_widths()
    figure = new_figure(11 if by_width else 7, 4.5)
    panels = figure.subplots(1, 2 if by_width else 1, squeeze=False)[0]
    _draw_differences(results, compared, panels[0])
    if by_width:
        _draw_widths(results, by_width, panels[1])
    save_picture(figure, file)
    return True


def _draw_differences(results: Results, compared: dict[str, dict[str, list[Run]]], axes: Axes) -> None:
    made = {variant for runs in compared.values() for variant in runs}
    variants = [name for name in results.plan.variants if name in made - {DENSE}]
    labels = {PEER: "PEER, heads of the paper"}  # its blocks are tuned, so it is not all as in the paper
    width, labeled = 0.8 / len(variants), set()
    for place, runs in enumerate(compared.values()):
        own = [variant for variant in variants if variant in runs]
        for i, variant in enumerate(own):
            at = place + (i - (len(own) - 1) / 2) * width
            found = results.below(runs[variant], runs[DENSE])
            ends = np.array([[found.share - found.low], [found.high - found.share]]) * 100
            axes.bar(
                at,
                100 * found.share,
                width,
                yerr=None if np.isnan(ends).any() else ends,
                capsize=3,
                color=look_of(variant).color,
                label=None if variant in labeled else labels.get(variant, look_of(variant).label or variant),
            )
            of_seeds = [100 * results.below([run], runs[DENSE]).share for run in runs[variant]]
            axes.plot([at - width / 4] * len(of_seeds), of_seeds, "o", color="white", markeredgecolor="black", ms=4)
            labeled.add(variant)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(compared)), list(compared))
    axes.set(ylabel="perplexity below dense, %", title="Each seed (circles), mean, 95 % interval")
    add_legend(axes)


def _draw_widths(results: Results, by_width: dict[str, list[Run]], axes: Axes) -> None:
    for variant in (DENSE, RECIPE):
        runs = by_width[variant]
        perplexities = [results.perplexity([run]) for run in runs]
        look = look_of(variant)
        axes.plot([run.hidden_size for run in runs], perplexities, look.marker, color=look.color, label=look.label)
    k = configuration_of(by_width[RECIPE][0], results.plan).num_experts_per_head
    axes.set(xlabel="hidden_size d", ylabel="perplexity, five texts")
    axes.set_title(f"Equal seconds, one run of each, k = {k}")
    axes.set_xticks([run.hidden_size for run in by_width[DENSE]])
    add_legend(axes)


def plot_capacity(results: Results, file: Path) -> bool:
    """Plot the recipe against its number of experts, and dense models of several sizes trained on the same tokens."""
    numbers, sizes = results.by_num_experts(), results.dense_sizes()
    draw = ([partial(_draw_experts, results, numbers)] if numbers else []) + (
        [partial(_draw_sizes, results, *sizes)] if sizes else []
    )
    if not draw:
        return False
    figure = new_figure(5.5 * len(draw), 4.5)
    for draw_panel, axes in zip(draw, figure.subplots(1, len(draw), squeeze=False)[0], strict=True):
        draw_panel(axes)
    save_picture(figure, file)
    return True


def _draw_experts(results: Results, numbers: dict[int, list[Run]], axes: Axes) -> None:
    of_seeds = list(zip(*numbers.values(), strict=True))
    for runs, color in zip(of_seeds, shades(len(of_seeds)), strict=True):
        perplexities = [results.perplexity([run]) for run in runs]
        axes.plot(list(numbers), perplexities, "-o", color=color, label=f"seed {runs[0].seed}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(numbers), [f"{number:,}" for number in numbers])
    axes.set(xlabel="number of experts", ylabel="perplexity, five texts", title="The recipe, equal steps")
    add_legend(axes)


def _draw_sizes(results: Results, recipe: Run, runs: list[Run], axes: Axes) -> None:
    for variant, own in ((DENSE, runs), (RECIPE, [recipe])):
        sizes = [results.active_parameters(run) / 1e6 for run in own]
        look = look_of(variant)
        axes.plot(sizes, results.losses(own), look.marker, color=look.color, label=look.label)
    sizes = np.geomspace(*(results.active_parameters(run) for run in (runs[0], runs[-1])), 100)
    with suppress(ValueError):  # without a curve, the points show why
        fitted = results.dense_curve().loss_of(sizes)
        axes.plot(sizes / 1e6, fitted, color=look_of(DENSE).color, linewidth=1, label="a curve through dense")
    axes.set_xscale("log")
    axes.minorticks_off()
    places = [results.active_parameters(run) / 1e6 for run in runs]
    axes.set_xticks(places, [f"{place:.2f}" for place in places])
    axes.set(xlabel="active parameters, million", ylabel="loss, five texts, nats per token")
    axes.set_title(f"Equal tokens: {recipe.steps * results.plan.tokens_of_step / 1e6:.1f} million, one seed")
    add_legend(axes)


PLOTS = {"search": plot_search, "comparison": plot_comparison, "capacity": plot_capacity}
