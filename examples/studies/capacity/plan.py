# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Which runs the study makes: its loads, rates and seeds. The criteria that judge them are in README.md."""

from dataclasses import asdict, dataclass
from typing import Any

from studies.capacity.variants import AT_EQUAL_FLOPS, WIDE


# Every variant has a trial with each of these. The best of them has to be inside the range.
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Load:
    """
    What is to be stored.

    Args:
        num_facts (`int`): Number of facts.
        token_bits (`float`): Entropy of each of the eight tokens of a value.
        exposures (`int`): How often each fact is seen.
    """

    num_facts: int
    token_bits: float
    exposures: int


@dataclass(frozen=True)
class Run:
    """A variant that stores a load, with a learning rate and a seed."""

    variant: str
    load: Load
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its file."""
        load = "-".join(f"{value:g}" for value in asdict(self.load).values())
        return f"{self.variant}-{load}-{self.learning_rate:g}-{self.seed}"


# What is learned in few exposures: 2.1 million bits, at equal steps and tokens whatever a value's entropy.
LEARNED = Load(num_facts=2**15, token_bits=8, exposures=16)
ENTROPIES = (2, 4, 6)
# What fits: loads of at least 1.3 times two bits a parameter.
FITS = {
    "dense": Load(2**15, 8, 100),
    "peer-256": Load(2**15, 8, 100),
    "peer-1024": Load(2**15, 8, 100),
    "peer-4096": Load(2**16, 8, 100),
}
AT_THE_LIMIT = {"dense": Load(2**13, 8, 1000), "peer-256": Load(2**13, 8, 1000), "peer-1024": Load(2**14, 8, 1000)}

Results = dict[str, dict[str, Any]]


def best_rate(variant: str, results: Results) -> float:
    """The rate of the trials at which a variant stored most."""
    return max(RATES, key=lambda rate: results[Run(variant, LEARNED, rate, 0).name]["stored"]["bits"])


def trials() -> list[Run]:
    """The trials of all variants."""
    return [Run(variant, LEARNED, rate, 0) for variant in (*AT_EQUAL_FLOPS, *WIDE) for rate in RATES]


def repeated(results: Results) -> list[Run]:
    """What is learned, with all seeds."""
    return [Run(name, LEARNED, best_rate(name, results), seed) for name in AT_EQUAL_FLOPS for seed in SEEDS]


def entropies(results: Results) -> list[Run]:
    """What is learned of values of less entropy."""
    loads = [Load(LEARNED.num_facts, bits, LEARNED.exposures) for bits in ENTROPIES]
    return [Run(name, load, best_rate(name, results), 0) for name in AT_EQUAL_FLOPS for load in loads]


def rates_that_fit(results: Results) -> list[Run]:
    """Trials of what fits, at the best rate of few exposures, its half and its double."""
    return [
        Run(name, load, factor * best_rate(name, results), 0) for name, load in FITS.items() for factor in (0.5, 1, 2)
    ]


def best_rate_that_fits(variant: str, results: Results) -> float:
    """The rate of [`rates_that_fit`] at which a variant stored most."""
    tried = [run for run in rates_that_fit(results) if run.variant == variant]
    return max(tried, key=lambda run: results[run.name]["stored"]["bits"]).learning_rate


def fitting(results: Results) -> list[Run]:
    """What fits, with all seeds, and with 1,000 exposures."""
    rates = {name: best_rate_that_fits(name, results) for name in FITS}
    return [Run(name, load, rates[name], seed) for name, load in FITS.items() for seed in SEEDS] + [
        Run(name, load, rates[name], 0) for name, load in AT_THE_LIMIT.items()
    ]


STAGES = (lambda results: trials(), repeated, entropies, rates_that_fit, fitting)
