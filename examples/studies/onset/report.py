# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables and the picture of the study, from the runs that are finished."""

import math
from contextlib import suppress
from pathlib import Path
from statistics import mean

from common.pictures import add_legend, new_figure, save_picture
from studies.common.parallel_runs import Results
from studies.common.tables import markdown_table, spread
from studies.onset.models import PLACEMENTS
from studies.onset.plan import SMALL, Run, trials, with_other_attention, with_seeds


COPIES = 1.0  # nats of the probe from which on a model counts as one that copies


def onset(result: dict) -> float:
    """The first step at which the probe exceeds `COPIES`; infinity if it never does."""
    return next((step for step, nats in result["probes"] if nats > COPIES), math.inf)


def onsets(runs: list[Run], results: Results) -> str:
    """The step of onset of each run, and a dash for one without."""
    steps = (onset(results[run.name]) for run in runs)
    return ", ".join("-" if step == math.inf else f"{step:,}" for step in steps)


def seeds_of(placement: str, results: Results) -> list[list[Run]]:
    """The finished runs of a placement that are compared: those with its better attention, and any with the other."""
    found = []
    for runs_of in (with_seeds, with_other_attention):
        with suppress(KeyError):  # not determined yet
            found.append([run for run in runs_of(placement, results) if run.name in results])
    return [runs for runs in found if runs]


def times_table(times: dict[str, dict[str, float]]) -> list[list[str]]:
    """How long a step takes, by its tokens."""
    rows = [["milliseconds of a step", *(f"{int(tokens):,} tokens" for tokens in times)]]
    return rows + [[name, *(f"{1e3 * own[name]:.0f}" for own in times.values())] for name in PLACEMENTS]


def seeds_table(results: Results) -> list[list[str]]:
    """What is compared: the best trial of each placement, and that of the best one with another attention."""
    rows = [["seeds", "attention", "parameters, M", "steps", "text, nats", "repeated", "copied", "onset"]]
    for placement in PLACEMENTS:
        for runs in seeds_of(placement, results):
            own = [results[run.name] for run in runs]
            cells = [f"{runs[0].attention:g}", f"{own[0]['parameters'] / 1e6:.1f}", f"{runs[0].steps:,}"]
            cells += [spread([each[name] for each in own], ".3f") for name in ("text", "repeated", "copied")]
            rows.append([placement, *cells, onsets(runs, results)])
    return rows


def trials_table(results: Results) -> list[list[str]]:
    """All trials."""
    rows = [["trials", "rate", "std", "attention", "u_i", "v_i", "text, nats", "repeated", "copied", "onset"]]
    for placement in PLACEMENTS:
        for run in trials(placement, results):
            if own := results.get(run.name):
                rates = ["", ""] if placement == "dense" else [f"{run.up:g} times", f"{run.down:g} times"]
                cells = [f"{run.learning_rate:g}", f"{run.initializer_range:g}", f"{run.attention:g}", *rates]
                cells += [f"{own[name]:.3f}" for name in ("text", "repeated", "copied")]
                rows.append([placement, *cells, onsets([run], results)])
    return rows


def describe(results: Results, times: dict[str, dict[str, float]]) -> str:
    """All tables that have a row."""
    tables = (seeds_table(results), times_table(times), trials_table(results))
    return "\n\n".join(markdown_table(rows) for rows in tables if len(rows) > 1)


def plot(results: Results, file: Path) -> None:
    """Plot the probe against the share of a training, for all seeds of each placement."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for number, placement in enumerate(PLACEMENTS):
        runs = [run for runs in seeds_of(placement, results) for run in runs]
        for place, run in enumerate(runs):
            steps, nats = zip(*results[run.name]["probes"], strict=True)
            style = "-" if run.attention == SMALL else ":"
            axes.plot(
                [100 * step / run.steps for step in steps],
                nats,
                style,
                color=f"C{number}",
                label=None if place else placement,
            )
        if runs:
            copied = mean(onset(results[run.name]) < math.inf for run in runs)
            axes.set_title(f"{axes.get_title()} {placement} {copied:.0%}".strip())
    add_legend(axes)
    axes.set(xlabel="% of the training; dotted: large attention", ylabel="nats saved on a copy of random tokens")
    save_picture(figure, file)
