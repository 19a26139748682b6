# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The runs of the study: what is stored, learning rates and seeds. README.md has the criteria that judge them."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace

import numpy as np

from studies.capacity.variants import AT_EQUAL_FLOPS, WIDE, has_tables
from studies.common.parallel_runs import Results


# Trials have a seed of their own.
TRIAL_SEED, SEEDS = 0, (1, 2, 3)
# Each variant in `MAIN` has nine trials, each other one three or four. If the best trial has the lowest or the highest
# rate, up to three more trials go beyond it.
RATES, MOST_BEYOND = (1e-3, 2e-3, 4e-3), 3
# For PEER and PKM, two ratios of the rate of v_i to that of u_i: the default of `make_optimizer`, and a lower one.
MULTIPLIER, LOW_MULTIPLIER = 192.0, 48.0
# Dense feed-forwards have no tables: their further trials have rates between and above those of `RATES`.
MORE_RATES = (2.8e-3, 5.7e-3, 8e-3)
# The share of steps in which the rate rises. In trials with the first value, 1,024 and 16,384 experts stored nothing
# at rates from 0.002 on: the rate peaked before any fact was seen twice, and training did not recover.
WARMUP, LONG_WARMUP = 0.05, 0.2
RATES_OF_OTHERS = (2.8e-3, 4e-3, 5.7e-3)
# A further rate for variants without tables that are not in `MAIN`.
LOWER_RATE = 2e-3
# Trials around a rate that was found for another load.
FACTORS = (0.5, 1, 2)


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

    @property
    def name(self) -> str:
        """The name of its file."""
        numbers = (*asdict(self.load).values(), self.learning_rate, self.multiplier, self.seed)
        if self.warmup != WARMUP:
            numbers += (self.warmup,)
        others = {"u": self.up_multiplier, "std": self.initializer_range}
        named = [f"{name}{value:.6g}" for name, value in others.items() if value is not None]
        return "-".join([self.kind, self.subject, *(f"{value:.6g}" for value in numbers), *named])


# Variants that the picture needs, which come first.
MAIN = ("dense", "mlp", "peer-1024", "peer-4096", "peer-16384", "peer-65536", "pkm-32761")
# The aims are about the largest pool, and about the better of two dense variants.
DENSE, LARGE = ("dense", "mlp"), "peer-65536"
# Dense, experts, and a memory of as many parameters. They also have trials with twice the best multiplier and warmup.
COMPARED = ("dense", "peer-16384", "pkm-32761")
# Dense has no v_i: its trials with twice the warmup have the best rate, a lower one and a higher one.
BETWEEN = (0.7, 1, 1.4)
# The load of the main comparison: 2.1 million bits in few exposures. Steps and tokens do not depend on the entropy.
LEARNED = Load(2**15, 8, exposures=16)
# Four times as much, with one seed.
MORE, OFFERED_MORE = Load(2**17, 8, exposures=16), ("dense", "peer-16384")
ENTROPIES, OF_ALL_ENTROPIES = (2, 4, 6), ("dense", "peer-4096")
# Loads that measure what fits: at least 1.3 times two bits per parameter, and more for dense, which exceeded two bits.
FITS = {
    "dense": Load(2**13, 8, exposures=100),
    "peer-256": Load(6144, 8, exposures=100),
    "peer-1024": Load(14336, 8, exposures=100),
    "peer-4096": Load(46080, 8, exposures=100),
}
# What dense learns of the facts of the first table in many exposures.
IN_THE_END = replace(LEARNED, exposures=100)
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


def steady(trial: Run, results: Results, seeds: int = len(SEEDS)) -> list[Run]:
    """
    A trial with each seed. If one of these runs stored less than half of what another one or the trial did, return the
    same runs at half the rate.
    """
    runs = with_seeds(trial)[:seeds]
    if made := [run for run in runs if run.name in results]:
        bits = [bits_stored(run, results) for run in (*made, trial) if run.name in results]
        if min(bits) < max(bits) / 2:
            return [replace(run, learning_rate=run.learning_rate / 2) for run in runs]
    return runs


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


def trials(variant: str, results: Results) -> list[Run]:
    """All trials of a variant: nine for those in `MAIN`, three or four for others, and those beyond."""
    if has_tables(variant):
        first = [(rate, multiplier) for multiplier in (MULTIPLIER, LOW_MULTIPLIER) for rate in RATES]
        rates = RATES
    else:
        first = [(rate, MULTIPLIER) for rate in sorted((*RATES, *MORE_RATES))]
        rates = RATES_OF_OTHERS if variant in MAIN else (LOWER_RATE, *RATES_OF_OTHERS)
    runs = [Run("facts", variant, LEARNED, *each) for each in first] if variant in MAIN else []
    runs += [Run("facts", variant, LEARNED, rate, warmup=LONG_WARMUP) for rate in rates]
    runs = and_beyond(runs, results)
    if variant in COMPARED and all(run.name in results for run in runs):
        found = best(runs, results)
        longer = replace(found, warmup=2 * found.warmup)
        if has_tables(variant):
            runs += [replace(found, multiplier=2 * found.multiplier), longer]
        else:
            runs += [replace(longer, learning_rate=factor * found.learning_rate) for factor in BETWEEN]
    return runs


def around(run: Run, results: Results) -> list[Run]:
    """Trials at the rate of a run, its half and its double."""
    return and_beyond([replace(run, learning_rate=factor * run.learning_rate) for factor in FACTORS], results)


def chosen(variant: str, results: Results) -> Run:
    """The best of all trials of a variant."""
    return best(trials(variant, results), results)


def learning(variant: str, results: Results) -> list[Run]:
    """The runs of the main comparison, with all seeds."""
    return steady(chosen(variant, results), results)


def offered_more(variant: str, results: Results) -> list[Run]:
    """A run with four times as many facts. PEER and PKM have half their best rate, as longer runs bear less."""
    run = chosen(variant, results)
    rate = run.learning_rate / 2 if has_tables(variant) else run.learning_rate
    return with_seeds(replace(run, load=MORE, learning_rate=rate))[:1]


def of_all_entropies(variant: str, results: Results) -> list[Run]:
    """Runs with values of less entropy, and of the usual one."""
    run = learning(variant, results)[0]
    return [replace(run, load=replace(LEARNED, token_bits=bits)) for bits in (*ENTROPIES, LEARNED.token_bits)]


def trials_that_fit(variant: str, results: Results) -> list[Run]:
    """
    Trials of what fits. The largest pool, of which a run takes an hour, has two: one at the best rate of the next
    smaller pool, which failed, and one at a quarter of this rate.
    """
    if variant == "peer-4096":
        found = replace(best(trials_that_fit("peer-1024", results), results), subject=variant, load=FITS[variant])
        return [replace(found, learning_rate=factor * found.learning_rate) for factor in (1, 0.25)]
    return around(replace(chosen(variant, results), load=FITS[variant]), results)


def fitting(variant: str, results: Results) -> list[Run]:
    """Runs of what fits, with all seeds. The two larger pools have one run; that of the largest is its best trial."""
    found = best(trials_that_fit(variant, results), results)
    if variant == "peer-4096":
        return [found]
    return steady(found, results, seeds=1 if variant == "peer-1024" else len(SEEDS))


def in_the_end(variant: str, results: Results) -> list[Run]:
    """Runs with many exposures, at the rate chosen for few exposures and at half of it."""
    run = replace(chosen(variant, results), load=IN_THE_END)
    return [run, replace(run, learning_rate=run.learning_rate / 2)]


def mixed_trials(arm: str, results: Results) -> list[Run]:
    """Trials of a way to teach second facts that differ from the first ones only by the first tokens of keys."""
    return and_beyond([Run("forgetting", arm, AFTER, *rates) for rates in ARM_TRIALS[arm]], results)


def arm_trials(arm: str, results: Results) -> list[Run]:
    """Trials of a way to teach a second set of facts that stand apart."""
    return and_beyond([Run("apart", arm, AFTER_APART, *rates) for rates in ARM_TRIALS[arm]], results)


def forgetting(arm: str, results: Results) -> list[Run]:
    """A way to teach a second set of facts that stand apart, with all seeds."""
    return with_seeds(best(arm_trials(arm, results), results))


# Each stage: its variants or arms, and the function that returns their runs, given the results so far.
STAGES: tuple[tuple[Iterable[str], Callable[[str, Results], list[Run]]], ...] = (
    (MAIN, trials),
    (MAIN, learning),
    (ARM_TRIALS, arm_trials),
    (ARM_TRIALS, forgetting),
    (ARM_TRIALS, mixed_trials),
    (OFFERED_MORE, offered_more),
    (AT_EQUAL_FLOPS, trials),
    (("peer-1024", "peer-256", "dense", "peer-4096"), trials_that_fit),
    (("peer-4096", "peer-1024", "dense", "peer-256"), fitting),
    (("dense",), in_the_end),
    (AT_EQUAL_FLOPS, learning),
    (WIDE, trials),
    (WIDE, learning),
    (OF_ALL_ENTROPIES, of_all_entropies),
)
