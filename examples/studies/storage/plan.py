# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The runs of the study: a grid of rates for each variant, a search along one axis after another, and seeds."""

from dataclasses import replace
from itertools import product
from typing import Any

from studies.capacity.plan import LEARNED, Results, Run, best, steady
from studies.capacity.variants import has_tables


# Values of each axis. A search along it starts at the best value so far and ends where both neighbors are no better.
AXES: dict[str, tuple[float, ...]] = {
    "learning_rate": (5e-4, 7e-4, 1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3, 5.7e-3, 8e-3, 1.1e-2, 1.6e-2),
    "up_multiplier": (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64),
    "down": (12, 24, 48, 96, 192, 384, 768, 1536),
    "warmup": (0.05, 0.1, 0.2, 0.4, 0.6, 0.8),
    "initializer_range": (0.02, 0.04, 0.08, 0.16, 0.32),
}
# The first twelve trials of each variant.
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "peer": {"learning_rate": (2e-3,), "up_multiplier": (1, 4, 16), "down": (48, 96, 192, 384)},
    "pkm": {"learning_rate": (1e-3, 2e-3, 4e-3), "down": (48, 96, 192, 384)},
    "dense": {"learning_rate": (2e-3, 4e-3, 8e-3), "up_multiplier": (0.5, 1, 2, 4)},
}
GRIDS["moe"] = GRIDS["dense"]
WARMUP, INITIALIZER_RANGE = 0.4, 0.08
# Variants in the order in which they are tried. The last, which stores all that is offered, has no trials of its own:
# its rates are those of the pool before it.
TRIED = ("dense", "peer-16384", "pkm-32761", "peer-4096", "pkm-8281", "peer-1024", "moe-32")
FULL, LIKE = "peer-65536", "peer-16384"


# Dense models that train for as many seconds as the experts of `LIKE` do, and how often they see each fact in this time,
# by the times in results.json. They have the best settings of dense, and trials of their own at these learning rates.
EXPOSURES = {"dense": 44, "dense-298": 32, "dense-596": 19}
RATES_AS_LONG = (1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3)


def make_run(variant: str, **settings: Any) -> Run:
    """A trial with a value for each axis of the variant. `down` is the rate of v_i as a multiple of the learning rate."""
    settings = {"warmup": WARMUP, "initializer_range": INITIALIZER_RANGE, **settings}
    if has_tables(variant):
        up = settings.get("up_multiplier", 0.25)  # PKM has no u_i
        settings["multiplier"] = settings.pop("down") / up
    return Run("facts", variant, LEARNED, **settings)


def settings_of(run: Run) -> dict[str, float]:
    """The value of each axis that a run has: the reverse of [`make_run`]."""
    values = {name: getattr(run, name) for name in ("learning_rate", "warmup", "initializer_range")}
    if run.up_multiplier is not None:
        values["up_multiplier"] = run.up_multiplier
    if has_tables(run.subject):
        values["down"] = run.multiplier * (run.up_multiplier or 0.25)
    return values


def first_trials(variant: str) -> list[Run]:
    """The grid of a variant."""
    grid = GRIDS[variant.partition("-")[0]]
    return [make_run(variant, **dict(zip(grid, values, strict=True))) for values in product(*grid.values())]


def trials(variant: str, results: Results) -> list[Run]:
    """
    The grid, and neighbors of its best run along one axis after another, as far as the results determine them. Along
    each axis the search goes on while a neighbor is better than all before.
    """
    runs = first_trials(variant)
    if not all(run.name in results for run in runs):
        return runs
    for axis, values in AXES.items():
        while axis in (settings := settings_of(found := best(runs, results))):
            place = min(range(len(values)), key=lambda each: abs(values[each] - settings[axis]))
            neighbors = [
                make_run(variant, **settings | {axis: each}) for each in values[max(0, place - 1) : place + 2]
            ]
            missing = [run for run in neighbors if run not in runs]
            runs += missing
            if not all(run.name in results for run in missing):
                return runs
            if best(runs, results) == found:
                break
    return runs


def is_tried(variant: str, results: Results) -> bool:
    """Whether all trials of a variant are made."""
    return all(run.name in results for run in trials(variant, results))


def chosen(variant: str, results: Results) -> Run:
    """The best trial of a variant. `KeyError` before all are made."""
    if variant == FULL:
        return replace(chosen(LIKE, results), subject=FULL)
    if not is_tried(variant, results):
        raise KeyError(variant)
    return best(trials(variant, results), results)


def learning(variant: str, results: Results) -> list[Run]:
    """The runs that are compared: those of the best trial with all seeds, or at half the rate if one of them fails."""
    trial = chosen(variant, results)
    if variant == FULL and trial.name not in results:
        return [trial]
    return steady(trial, results)


def trials_as_long(variant: str, results: Results) -> list[Run]:
    """Trials of a dense model that trains for as many seconds as experts do."""
    load = replace(LEARNED, exposures=EXPOSURES[variant])
    found = replace(chosen("dense", results), subject=variant, load=load)
    return [replace(found, learning_rate=rate) for rate in RATES_AS_LONG]


def learning_as_long(variant: str, results: Results) -> list[Run]:
    """The best of these trials with all seeds."""
    return steady(best(trials_as_long(variant, results), results), results)


# What the aims ask comes first, the smallest pool and the mixture last.
STAGES = [
    *(((name,), stage) for name in TRIED[:5] for stage in (trials, learning)),
    (EXPOSURES, trials_as_long),
    (EXPOSURES, learning_as_long),
    ((FULL,), learning),
    *(((name,), stage) for name in TRIED[5:] for stage in (trials, learning)),
]
