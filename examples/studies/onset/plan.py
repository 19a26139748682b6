# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The runs of the study: a search for the best settings of each placement, and seeds for them."""

import math
from dataclasses import dataclass, replace
from statistics import mean

from studies.common.parallel_runs import Results
from studies.common.search import search
from studies.onset.models import PLACEMENTS


TRIAL_SEED, SEEDS = 0, (1, 2, 3)
# Steps that take as long as those of dense, by times measured before the first run (0.245, 0.237, 0.243 and 0.245 s).
STEPS = {"dense": 1400, "peer": 1450, "alternate": 1410, "one": 1400}
# Standard deviations: that of peer-laptop scaled to this width, and one over the root of the width.
SMALL, BIG = 0.04, 0.125
# Values of each axis of the search. Those of u_i and v_i are multiples of the learning rate, of experts alone.
AXES: dict[str, tuple[float, ...]] = {
    "up": (0.0625, 0.25, 1.0, 4.0, 16.0),
    "down": (0.75, 3.0, 12.0, 48.0, 192.0),
    "learning_rate": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "initializer_range": (0.02, 0.04, 0.08, 0.16),
    "attention": (SMALL, BIG),
}


@dataclass(frozen=True)
class Run:
    """
    A run of the study.

    Args:
        placement (`str`): Which layers have experts.
        up, down (`float`): The rates of u_i and v_i as multiples of the learning rate.
        learning_rate (`float`): Of all but the tables.
        initializer_range, attention (`float`): Standard deviations of all weights, and of those of attention.
        seed (`int`): Draws weights and the order of sequences.
    """

    placement: str
    up: float = 0.25
    down: float = 3.0
    learning_rate: float = 4e-3
    initializer_range: float = SMALL
    attention: float = SMALL
    seed: int = TRIAL_SEED

    @property
    def steps(self) -> int:
        """Number of steps."""
        return STEPS[self.placement]

    @property
    def name(self) -> str:
        """The name of its file."""
        numbers = (*self.settings.values(), self.seed)
        return "-".join([self.placement, str(self.steps), *(f"{number:.6g}" for number in numbers)])

    @property
    def settings(self) -> dict[str, float]:
        """Its value of each axis. Dense has no rates of u_i and v_i."""
        return {axis: getattr(self, axis) for axis in AXES if self.placement != "dense" or axis not in ("up", "down")}


def loss(run: Run, results: Results) -> float:
    """The loss by which trials are chosen: the mean of held-out text and of a passage that a sequence repeats."""
    found = (results[run.name]["text"] + results[run.name]["repeated"]) / 2
    return math.inf if math.isnan(found) else found


def best(runs: list[Run], results: Results) -> Run:
    """The run of the lowest loss. `KeyError` before all are made."""
    return min(runs, key=lambda run: loss(run, results))


def trials(placement: str, results: Results) -> list[Run]:
    """A search for the best settings of a placement."""
    first = Run(placement)
    return search([first], AXES, lambda run: run.settings, lambda own: replace(first, **own), best, results)


def with_seeds(placement: str, results: Results) -> list[Run]:
    """The best trial of a placement with three seeds."""
    found = best(trials(placement, results), results)
    return [replace(found, seed=seed) for seed in SEEDS]


def with_other_attention(placement: str, results: Results) -> list[Run]:
    """The same runs of the placement with experts that is best over seeds, but for its attention."""
    seeds = {name: with_seeds(name, results) for name in PLACEMENTS}
    losses = {name: mean(loss(run, results) for run in runs) for name, runs in seeds.items()}
    if losses[placement] > min(losses[name] for name in PLACEMENTS if name != "dense"):
        return []
    return [replace(run, attention=SMALL if run.attention == BIG else BIG) for run in seeds[placement]]


STAGES = (
    *(((placement,), stage) for placement in PLACEMENTS for stage in (trials, with_seeds)),
    (tuple(PLACEMENTS)[1:], with_other_attention),
)
