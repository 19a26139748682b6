# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The runs of the study: twelve trials for each placement, and seeds for the best ones."""

import math
from dataclasses import dataclass, replace
from itertools import product

from studies.common.parallel_runs import Results
from studies.onset.models import PLACEMENTS


TRIAL_SEED, SEEDS = 0, (1, 2, 3)
# Steps that take as long as those of dense, by times measured before the first run (0.245, 0.237, 0.243 and 0.245 s).
STEPS = {"dense": 1400, "peer": 1450, "alternate": 1410, "one": 1400}
RATE, RATES = 4e-3, (2e-3, 8e-3)
# Standard deviations: that of peer-laptop scaled to this width, and one over the root of the width.
SMALL, BIG = 0.04, 0.125
UP_RATES, DOWN_RATES = (0.25, 1.0, 4.0), (3.0, 12.0, 48.0)


@dataclass(frozen=True)
class Run:
    """
    A run of the study.

    Args:
        placement (`str`): Which layers have experts.
        learning_rate (`float`): Of all but the tables.
        initializer_range, attention (`float`): Standard deviations of all weights, and of those of attention.
        up, down (`float`): The rates of u_i and v_i as multiples of the learning rate.
        seed (`int`): Draws weights and the order of sequences.
    """

    placement: str
    learning_rate: float = RATE
    initializer_range: float = SMALL
    attention: float = SMALL
    up: float = 1.0
    down: float = 1.0
    seed: int = TRIAL_SEED

    @property
    def steps(self) -> int:
        """Number of steps."""
        return STEPS[self.placement]

    @property
    def name(self) -> str:
        """The name of its file."""
        numbers = self.learning_rate, self.initializer_range, self.attention, self.up, self.down, self.seed
        return "-".join([self.placement, str(self.steps), *(f"{number:.6g}" for number in numbers)])


def loss(run: Run, results: Results) -> float:
    """The loss by which trials are chosen: the mean of held-out text and of a passage that a sequence repeats."""
    found = (results[run.name]["text"] + results[run.name]["repeated"]) / 2
    return math.inf if math.isnan(found) else found


def best(runs: list[Run], results: Results) -> Run:
    """The run of the lowest loss. `KeyError` before all are made."""
    return min(runs, key=lambda run: loss(run, results))


def trials(placement: str, results: Results) -> list[Run]:
    """
    Twelve trials: for experts nine of the rates of u_i and v_i, then two other learning rates and larger attention,
    at the best of these. For dense all learning rates with four initializations.
    """
    if placement == "dense":
        starts = ((SMALL, SMALL), (SMALL, BIG), (BIG, BIG), (2 * SMALL, 2 * SMALL))
        return [Run(placement, rate, *start) for rate, start in product((RATE, *RATES), starts)]
    runs = [Run(placement, up=up, down=down) for up, down in product(UP_RATES, DOWN_RATES)]
    if not all(run.name in results for run in runs):
        return runs
    found = best(runs, results)
    return [*runs, *(replace(found, learning_rate=rate) for rate in RATES), replace(found, attention=BIG)]


def with_seeds(placement: str, results: Results) -> list[Run]:
    """The best trial of a placement with small and with large attention, and three seeds each."""
    found = best(trials(placement, results), results)
    return [replace(found, attention=attention, seed=seed) for attention in (SMALL, BIG) for seed in SEEDS]


STAGES = ((PLACEMENTS, trials), (PLACEMENTS, with_seeds))
