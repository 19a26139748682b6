# Copyright 2026 The PEER for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The statistics of the recipe study: paired differences with intervals by bootstrap, and the size that a dense model
would need."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np


DRAWS = 10_000


@dataclass
class Difference:
    """
    By which share the perplexity of runs is below that of others with the same seeds.

    Args:
        share (`float`): That share, of the geometric means over texts.
        low, high (`float`): Ends of its 95 % interval, see [`below`].
        error (`float`): Standard error of the mean difference of the losses over seeds; NaN with one seed.
    """

    share: float
    low: float
    high: float
    error: float

    def __str__(self) -> str:
        return f"{self.share:+.1%} ({self.low:+.1%} to {self.high:+.1%})"


def below(
    losses: Sequence[dict[str, Sequence[float]]],
    others: Sequence[dict[str, Sequence[float]]],
    documents: dict[str, Sequence[int]],
    draws: int = DRAWS,
) -> Difference:
    """
    Compares runs with others, seed by seed and sequence by sequence.

    The interval is that of a bootstrap over seeds and documents: each draw takes as many seeds as there are, with
    replacement, and in each text as many documents as there are, with all of their sequences; both runs of a pair have
    the same.

    Args:
        losses, others (`list[dict]`): For each seed, the losses of all sequences of each text, in nats per token.
        documents (`dict[str, list[int]]`): For each text, the document of each sequence.
        draws (`int`, *optional*, defaults to 10000): Number of draws.

    Returns:
        [`Difference`]
    """
    generator = np.random.default_rng(0)
    num_seeds = len(losses)
    of_seeds = np.zeros((num_seeds, len(documents)))
    drawn = np.zeros((draws, num_seeds))
    for column, (text, of_sequences) in enumerate(documents.items()):
        differences = np.array(
            [np.subtract(own[text], other[text]) for own, other in zip(losses, others, strict=True)]
        )
        of_seeds[:, column] = differences.mean(1)
        _, places, counts = np.unique(np.asarray(of_sequences), return_inverse=True, return_counts=True)
        sums = np.stack([np.bincount(places, each) for each in differences])
        times = generator.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=draws)
        drawn += times @ sums.T / (times @ counts)[:, None] / len(documents)
    of_seeds = of_seeds.mean(1)
    seeds = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=draws)
    low, high = np.quantile(1 - np.exp((drawn * seeds).sum(1) / num_seeds), (0.025, 0.975))
    error = stdev(of_seeds) / math.sqrt(num_seeds) if num_seeds > 1 else math.nan
    return Difference(1 - math.exp(mean(of_seeds)), float(low), float(high), error)


@dataclass
class SizeCurve:
    """The loss of dense models that were trained on the same tokens: `a + b * parameters ** -c`."""

    a: float
    b: float
    c: float

    def size_of(self, loss: float) -> float:
        """Parameters of the dense model that has a loss; infinite at or below the limit of the curve."""
        return math.inf if loss <= self.a else ((loss - self.a) / self.b) ** (-1 / self.c)


def fit_sizes(parameters: Sequence[float], losses: Sequence[float]) -> SizeCurve:
    """Fits the curve by least squares: a and b exactly, for each of a grid of exponents c."""
    best = None
    for exponent in np.geomspace(0.02, 2.0, 400):
        powers = np.asarray(parameters, dtype=float) ** -exponent
        columns = np.stack([np.ones_like(powers), powers], axis=1)
        (a, b), *_ = np.linalg.lstsq(columns, np.asarray(losses, dtype=float), rcond=None)
        error = float(((columns @ (a, b) - losses) ** 2).sum())
        if b > 0 and (best is None or error < best[0]):
            best = error, SizeCurve(float(a), float(b), float(exponent))
    if best is None:
        raise ValueError(f"The losses of larger models must be lower, but got {list(losses)} for {list(parameters)}.")
    return best[1]
