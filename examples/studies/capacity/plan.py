# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
The runs of the study. Each variant has a grid of rates, a search along one axis after another, and seeds. Ways to teach
second facts have trials and seeds. README.md has the criteria that judge them.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from studies.capacity.variants import has_tables
from studies.common.parallel_runs import Results
from studies.common.search import search


# Trials have a seed of their own.
TRIAL_SEED, SEEDS = 0, (1, 2, 3)
# What a run has if nothing else is said: the ratio of the rate of v_i to that of u_i, and the share of steps in which
# the rate rises.
MULTIPLIER, WARMUP = 192.0, 0.05
BATCH_SIZE = 256
# Up to so many trials of a way to teach go beyond the lowest or the highest rate that was tried.
MOST_BEYOND = 3


@dataclass(frozen=True)
class Load:
    """
    What is to be stored.

    Args:
        number (`int`): Number of facts.
        token_bits (`float`): Entropy of each of the eight tokens of a value.
        exposures (`int`): How often each fact is seen.
    """

    number: int
    token_bits: float
    exposures: int


@dataclass(frozen=True)
class Run:
    """
    A run of the study.

    Args:
        kind (`str`):
            What is stored: `"facts"`, or facts after others (`"forgetting"`, and `"apart"` if they have other tokens).
        subject (`str`): A variant, or a way to train in a run of forgetting.
        load (`Load`): How much is stored.
        learning_rate, multiplier (`float`): The learning rate, and the ratio of the rate of v_i to that of u_i.
        seed (`int`): Draws facts, weights and their order.
        warmup (`float`): The share of steps in which the rate rises.
        up_multiplier (`float`, *optional*):
            The rate of u_i, or of the feed-forwards of a model without tables, as a multiple of the learning rate.
            It defaults to 0.25 for u_i and to 1 for feed-forwards.
        initializer_range (`float`, *optional*): Defaults to that of all variants.
        batch_size (`int`): Number of facts in a step.
    """

    kind: str
    subject: str
    load: Load
    learning_rate: float
    multiplier: float = MULTIPLIER
    seed: int = TRIAL_SEED
    warmup: float = WARMUP
    up_multiplier: float | None = None
    initializer_range: float | None = None
    batch_size: int = BATCH_SIZE

    @property
    def name(self) -> str:
        """The name of its file."""
        numbers = (*asdict(self.load).values(), self.learning_rate, self.multiplier, self.seed)
        if self.warmup != WARMUP:
            numbers += (self.warmup,)
        others = {"u": self.up_multiplier, "std": self.initializer_range}
        named = [f"{name}{value:.6g}" for name, value in others.items() if value is not None]
        if self.batch_size != BATCH_SIZE:
            named.append(f"batch{self.batch_size}")
        return "-".join([self.kind, self.subject, *(f"{value:.6g}" for value in numbers), *named])


# Values of each axis. A search along it starts at the best value so far and ends where both neighbors are no better.
AXES: dict[str, tuple[float, ...]] = {
    "learning_rate": (5e-4, 7e-4, 1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3, 5.7e-3, 8e-3, 1.1e-2, 1.6e-2),
    "up_multiplier": (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64),
    "down": (12, 24, 48, 96, 192, 384, 768, 1536, 3072),
    "warmup": (0.05, 0.1, 0.2, 0.4, 0.6, 0.8),
    "initializer_range": (0.02, 0.04, 0.08, 0.16, 0.32),
}
# In a second round the batch is an axis too, the first one. In the first it is BATCH_SIZE.
ROUNDS = (AXES, {"batch_size": (64, 128, 256, 512, 1024, 2048), **AXES})
# The first twelve trials of each variant.
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "peer": {"learning_rate": (2e-3,), "up_multiplier": (1, 4, 16), "down": (48, 96, 192, 384)},
    "pkm": {"learning_rate": (1e-3, 2e-3, 4e-3), "down": (48, 96, 192, 384)},
    "dense": {"learning_rate": (2e-3, 4e-3, 8e-3), "up_multiplier": (0.5, 1, 2, 4)},
}
GRIDS["moe"] = GRIDS["dense"] | {"learning_rate": (7e-4, 1.4e-3, 2.8e-3)}
START = {"warmup": 0.4, "initializer_range": 0.08}
# Variants in the order in which they are tried. The last, which stores all that is offered, has no trials of its own:
# its rates are those of the pool before it.
TRIED = ("dense", "peer-16384", "pkm-32761", "peer-4096", "pkm-8281", "peer-1024", "moe-32")
FULL, LIKE = "peer-65536", "peer-16384"
# Not searched twice: a pool that stores nearly all that is offered, and variants that no aim names.
ONE_ROUND = (LIKE, "peer-1024", "moe-32")
# The load of the comparison: 2.1 million bits in few exposures.
LEARNED = Load(2**15, 8, exposures=16)
# Twice as much, with one seed.
MORE, OFFERED_MORE = Load(2**16, 8, exposures=16), ("dense", "peer-16384", "pkm-32761")
# Dense models that train for as many seconds as the experts of `LIKE` do, and how often they see each fact in this time,
# by the times in results.json, with the batch of dense. They begin with its best settings, at these learning rates, and
# have a search of their own.
EXPOSURES, BATCH_AS_LONG = {"dense": 39, "dense-298": 30, "dense-596": 20}, 1024
RATES_AS_LONG = (1.4e-3, 2e-3, 2.8e-3)
AXES_AS_LONG = {name: AXES[name] for name in ("learning_rate", "initializer_range")}
# The first and the second set of facts of runs of forgetting, and their variant. Each way to teach has 3 or 4 trials.
BEFORE, AFTER, TAUGHT = Load(2**14, 8, exposures=32), Load(2**12, 8, exposures=32), "peer-16384"
# The same for facts with tokens of their own: a token of half the vocabulary has 7 bits.
BEFORE_APART, AFTER_APART = replace(BEFORE, token_bits=7), replace(AFTER, token_bits=7)
# Learning rates and multipliers of v_i. A multiplier of 4 gives v_i the rate of all other parameters.
ARM_TRIALS = {
    "full": ((2.5e-4, 192.0), (1e-3, 192.0), (1e-3, 4.0), (4e-3, 4.0)),
    "replay": ((2.5e-4, 192.0), (1e-3, 192.0), (1e-3, 4.0), (4e-3, 4.0)),
    "lora": ((1e-3, 192.0), (4e-3, 192.0), (1.6e-2, 192.0)),
    "sparse": ((1e-3, 192.0), (4e-3, 192.0), (1.6e-2, 192.0)),
    "protected": ((1e-3, 192.0), (4e-3, 192.0), (1e-3, 48.0), (4e-3, 48.0)),
    "protected-ungated": ((1e-3, 192.0), (4e-3, 192.0), (1e-3, 48.0), (4e-3, 48.0)),
}


def bits_stored(run: Run, results: Results) -> float:
    """
    The bits that a run stored, of first and second facts together; minus infinity if they are NaN. Negative bits of
    first facts count as zero. Otherwise, among runs that lose all first facts, the least confident would be the best.
    """
    result = results[run.name]
    if "gained" in result:
        bits = max(result["left"]["bits"], 0.0) + result["gained"]["bits"]
    else:
        bits = result["stored"]["bits"]
    return np.nan_to_num(bits, nan=-np.inf)


def best(trials: list[Run], results: Results) -> Run:
    """The trial that stored most."""
    return max(trials, key=lambda run: bits_stored(run, results))


def with_seeds(run: Run) -> list[Run]:
    """A run with each seed."""
    return [replace(run, seed=seed) for seed in SEEDS]


def steady(trial: Run, results: Results) -> list[Run]:
    """
    A trial with each seed. If one of these runs stored less than half of what another one or the trial did, return the
    same runs at half the rate.
    """
    runs = with_seeds(trial)
    if made := [run for run in runs if run.name in results]:
        bits = [bits_stored(run, results) for run in (*made, trial) if run.name in results]
        if min(bits) < max(bits) / 2:
            return [replace(run, learning_rate=run.learning_rate / 2) for run in runs]
    return runs


def make_run(variant: str, **settings: Any) -> Run:
    """A trial with a value for each axis of the variant. `down` is the rate of v_i as a multiple of the learning rate."""
    settings = START | settings
    if has_tables(variant):
        up = settings.get("up_multiplier", 0.25)  # PKM has no u_i
        settings["multiplier"] = settings.pop("down") / up
    return Run("facts", variant, LEARNED, **settings)


def settings_of(run: Run) -> dict[str, float]:
    """The value of each axis that a run has: the reverse of [`make_run`]."""
    values = {name: getattr(run, name) for name in ("learning_rate", "warmup", "initializer_range", "batch_size")}
    if run.up_multiplier is not None:
        values["up_multiplier"] = run.up_multiplier
    if has_tables(run.subject):
        values["down"] = run.multiplier * (0.25 if run.up_multiplier is None else run.up_multiplier)
    return values


def first_trials(variant: str) -> list[Run]:
    """The grid of a variant."""
    grid = GRIDS[variant.partition("-")[0]]
    return [make_run(variant, **dict(zip(grid, values, strict=True))) for values in product(*grid.values())]


def trials(variant: str, results: Results) -> list[Run]:
    """The grid, and one or two rounds of a search from its best run."""
    runs = first_trials(variant)
    for axes in ROUNDS[: 1 if variant in ONE_ROUND else 2]:
        runs = search(runs, axes, settings_of, lambda settings: make_run(variant, **settings), best, results)
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
    """Trials of a dense model that trains for as many seconds as experts do: three rates, and a search."""
    load = replace(LEARNED, exposures=EXPOSURES[variant])
    found = replace(chosen("dense", results), subject=variant, load=load)
    runs = [replace(found, learning_rate=rate) for rate in RATES_AS_LONG]
    return search(runs, AXES_AS_LONG, settings_of, lambda own: replace(found, **own), best, results)


def learning_as_long(variant: str, results: Results) -> list[Run]:
    """The best of these trials with all seeds."""
    return steady(best(trials_as_long(variant, results), results), results)


def offered_more(variant: str, results: Results) -> list[Run]:
    """Runs with twice as many facts, at the chosen settings and at half the rate, as longer runs bear less."""
    run = replace(chosen(variant, results), load=MORE)
    return [run, replace(run, learning_rate=run.learning_rate / 2)]


def and_beyond(runs: list[Run], results: Results) -> list[Run]:
    """Trials, and further ones if the best one has the lowest or highest rate that was tried, all else equal."""
    for _ in range(MOST_BEYOND):
        if not all(run.name in results for run in runs):
            break
        found = best(runs, results)
        rates = [run.learning_rate for run in runs if replace(run, learning_rate=found.learning_rate) == found]
        if found.learning_rate not in (min(rates), max(rates)):
            break
        factor = 0.5 if found.learning_rate == min(rates) else 2
        runs = [*runs, replace(found, learning_rate=factor * found.learning_rate)]
    return runs


def mixed_trials(arm: str, results: Results) -> list[Run]:
    """Trials of a way to teach second facts that differ from the first ones only by the first tokens of keys."""
    return and_beyond([Run("forgetting", arm, AFTER, *rates) for rates in ARM_TRIALS[arm]], results)


def arm_trials(arm: str, results: Results) -> list[Run]:
    """Trials of a way to teach a second set of facts that stand apart."""
    return and_beyond([Run("apart", arm, AFTER_APART, *rates) for rates in ARM_TRIALS[arm]], results)


def forgetting(arm: str, results: Results) -> list[Run]:
    """A way to teach a second set of facts that stand apart, with all seeds."""
    return with_seeds(best(arm_trials(arm, results), results))


# Each stage: its variants or arms, and the function that returns their runs, given the results so far. What the aims ask
# comes first, the smallest pool and the mixture last.
STAGES: tuple[tuple[Iterable[str], Callable[[str, Results], list[Run]]], ...] = (
    *(((name,), stage) for name in TRIED[:5] for stage in (trials, learning)),
    (EXPOSURES, trials_as_long),
    (EXPOSURES, learning_as_long),
    ((FULL,), learning),
    (OFFERED_MORE, offered_more),
    (ARM_TRIALS, arm_trials),
    (ARM_TRIALS, forgetting),
    (ARM_TRIALS, mixed_trials),
    *(((name,), stage) for name in TRIED[5:] for stage in (trials, learning)),
)
