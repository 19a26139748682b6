# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Plots of the scaling study."""

import math
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib.axes import Axes

from common.pictures import add_legend, look_of, new_figure, save_picture, shades
from studies.common.single_run import USAGE_BINS
from studies.common.training_plan import CORPUS, DENSE, PEER, Run, budget_name, configuration_of, costs_of
from studies.scaling.plan import size_runs
from studies.scaling.report import (
    Results,
    active_runs,
    label,
    losses_after_training,
    mean_perplexities,
    norm_runs,
    paper_margins,
)


def plot_sizes(results: Results, file: Path) -> None:
    """
    Plots IsoFLOP curves, one panel per budget: held-out loss against FLOPs per token, with the hidden sizes; and the
    margins below dense.
    """
    budgets = results.plan.budgets
    figure = new_figure(5 * len(budgets) + 5, 4.5)
    *panels, margins = figure.subplots(1, len(budgets) + 1)
    for axes, budget in zip(panels, budgets, strict=True):
        runs = size_runs(results.plan, results.rates, budget)
        for variant in results.plan.variants:
            own = [run for run in runs if run.variant == variant]
            flops = [costs_of(run, results.plan).flops / 1e6 for run in own]
            axes.plot(flops, _corpus_losses(results, own), **look_of(variant).style, label=label(variant))
        _name_sizes(results, axes, runs)
        axes.set(xlabel="MFLOPs per token; above, the hidden_size", ylabel="held-out loss, nats per token")
        axes.set_title(f"{budget_name(budget)} training FLOPs, one seed")
        add_legend(axes, loc="upper center")
    _plot_margins(results, margins)
    save_picture(figure, file)


def _name_sizes(results: Results, axes: Axes, runs: list[Run]) -> None:
    """Write each hidden size above the highest of its points, for which variants take about the same FLOPs."""
    for hidden_size in dict.fromkeys(run.hidden_size for run in runs):
        own = [run for run in runs if run.hidden_size == hidden_size]
        place = mean(costs_of(run, results.plan).flops / 1e6 for run in own)
        highest = max(_corpus_losses(results, own))
        axes.annotate(str(hidden_size), (place, highest), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    axes.margins(y=0.1)


def _corpus_losses(results: Results, runs: list[Run]) -> list[float]:
    return [results.losses(run)[CORPUS] for run in runs]


def _plot_margins(results: Results, axes: Axes) -> None:
    """
    Plot by how much perplexity is below dense: in this study, with the standard deviation over seeds, and in the
    paper.
    """
    variants = [variant for variant in results.plan.variants if variant != DENSE]
    groups = [(budget_name(budget), results.margins(budget)) for budget in results.plan.budgets]
    groups += [(f"paper, {budget}", found) for budget, found in paper_margins().items()]
    deviations = [results.deviations(budget) for budget in results.plan.budgets]
    deviations += [dict.fromkeys(found, math.nan) for _, found in groups[len(deviations) :]]
    width = 0.8 / len(variants)
    for i, variant in enumerate(variants):
        places = [place + i * width for place, (_, found) in enumerate(groups) if variant in found]
        values = [100 * found[variant] for _, found in groups if variant in found]
        bars = [100 * found[variant] for found in deviations if variant in found]
        color = look_of(variant).color
        axes.bar(places, values, width, yerr=bars, color=color, label=label(variant), capsize=2)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(
        [place + 0.4 - width / 2 for place in range(len(groups))], [name for name, _ in groups], fontsize=8
    )
    axes.set(xlabel="training FLOPs", ylabel="mean perplexity below dense, %")
    axes.set_title("Compute-optimal models,\n± standard deviation over seeds")
    add_legend(axes)


def plot_seconds(results: Results, file: Path) -> None:
    """Plots loss against seconds: during training at equal wall-clock time, and of all sizes at the end."""
    figure = new_figure(13, 4.5)
    curves, ends = figure.subplots(1, 2)
    for run in results.equal_seconds(results.plan.budgets[-1]):
        history = results.made(run)[0]["train_history"]
        seconds = [step * results.step_seconds(run) for step, _ in history]
        name = f"{label(run.variant)}, hidden_size {run.hidden_size}"
        curves.plot(seconds, [loss for _, loss in history], color=look_of(run.variant).color, label=name)
    curves.set_xscale("log")
    curves.set_title("Training loss at equal wall-clock time, one seed")
    for variant in (DENSE, PEER):
        runs = [
            run
            for budget in results.plan.budgets
            for run in size_runs(results.plan, results.rates, budget)
            if run.variant == variant
        ]
        places = [run.steps * results.step_seconds(run) for run in runs]
        ends.scatter(places, _corpus_losses(results, runs), **look_of(variant).style, label=label(variant))
        for run, place, loss in zip(runs, places, _corpus_losses(results, runs), strict=True):
            ends.annotate(str(run.hidden_size), (place, loss), (6, 0), textcoords="offset points", fontsize=8)
    ends.margins(x=0.1)
    ends.set_title("Held-out loss of every hidden_size and budget at the end, one seed")
    for axes in (curves, ends):
        axes.set(xlabel="seconds, from measured step times", ylabel="loss, nats per token")
        add_legend(axes, which="both")
    save_picture(figure, file)


def plot_ablations(results: Results, file: Path) -> None:
    """Plots perplexity against the number of experts and of active experts, in training and changed after training."""
    figure = new_figure(13, 4.5)
    pool, active = figure.subplots(1, 2)
    runs = norm_runs(results)
    _plot_means(
        results,
        pool,
        {
            f"query norm {norm or 'none'}": {
                num_experts: results.with_seeds(run) for (each, num_experts), run in runs.items() if each == norm
            }
            for norm in dict.fromkeys(norm for norm, _ in runs)
        },
    )
    pool.set(
        xlabel="experts N, at a fixed number of active experts", title="More experts, ± standard deviation over seeds"
    )
    trained = {h_k: results.with_seeds(run) for h_k, run in active_runs(results).items()}
    changed = {f"{name} changed after training": points for name, points in _changed_after_training(results).items()}
    _plot_means(results, active, {"trained with this number": trained, **changed})
    active.set(xlabel="active experts h·k", title="More active experts; points without a bar are one seed")
    for axes in (pool, active):
        axes.set_xscale("log", base=2)
        axes.set_ylabel("perplexity, mean over evaluation texts")
        add_legend(axes)
    save_picture(figure, file)


def _plot_means(results: Results, axes: Axes, curves: dict[str, dict[int, list[dict[str, float]]]]) -> None:
    """
    Plots a curve for each name: mean perplexity over seeds by the number of experts, with the standard deviation where
    there are several seeds. Curves are shifted a little, so that no bar hides another.
    """
    options = zip(shades(len(curves)), ("o-", "s--", "^:"), strict=False)
    for i, ((name, losses), (color, form)) in enumerate(zip(curves.items(), options, strict=True)):
        found = {place: mean_perplexities(each, results.plan) for place, each in sorted(losses.items())}
        places = [place * 2 ** (0.06 * (i - (len(curves) - 1) / 2)) for place in found]
        bars = [stdev(values) if len(values) > 1 else math.nan for values in found.values()]
        means = list(map(mean, found.values()))
        axes.errorbar(places, means, bars, fmt=form, color=color, capsize=2, label=name)


def _changed_after_training(results: Results) -> dict[str, dict[int, list[dict[str, float]]]]:
    """
    For k and for h: losses with each seed by the number of active experts, with only k or h changed in the trained
    model.
    """
    config = configuration_of(results.reference(), results.plan)
    found = {}
    for name, field in (("k", "num_experts_per_head"), ("h", "num_retrieval_heads")):
        points = {config.num_experts_per_tok: results.with_seeds(results.reference())}
        for change, fields in results.plan.after_training.items():
            if field in fields:
                active = config.num_experts_per_tok // getattr(config, field) * fields[field]
                points[active] = losses_after_training(results, change)
        found[name] = points
    return found


def plot_usage(results: Results, file: Path) -> None:
    """Plots histograms of router weight per expert on held-out text, by query norm and number of experts."""
    runs = norm_runs(results)
    norms = list(dict.fromkeys(norm for norm, _ in runs))
    figure = new_figure(4.5 * len(norms), 4)
    pools = sorted({num_experts for _, num_experts in runs})
    colors = dict(zip(pools, shades(len(pools)), strict=True))
    low, high, bins = USAGE_BINS
    edges = torch.linspace(low, high, bins + 1).tolist()
    for axes, norm in zip(figure.subplots(1, len(norms), sharey=True, squeeze=False)[0], norms, strict=True):
        for num_experts, run in ((num_experts, run) for (each, num_experts), run in runs.items() if each == norm):
            (usage,) = results.runs[run.name]["usage"].values()
            shares = [count / num_experts for count in usage["histogram"]]
            name = f"N = {num_experts:,}, {usage['unused'] / num_experts:.0%} unused"
            axes.stairs(shares, edges, color=colors[num_experts], linewidth=1.5, label=name)
        axes.set(xlabel="log10 of router weight relative to the mean", title=f"query norm {norm or 'none'}, one seed")
        add_legend(axes)
    figure.axes[0].set_ylabel("share of experts")
    save_picture(figure, file)


PLOTS = {"sizes": plot_sizes, "seconds": plot_seconds, "ablations": plot_ablations, "usage": plot_usage}
