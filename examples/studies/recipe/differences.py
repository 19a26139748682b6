# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
The statistics of the recipe study: paired differences and effects of factors, with their intervals, and the size that
a dense model would need.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


DRAWS = 10_000

# The 97.5 % points of Student's t by degrees of freedom: bootstrap intervals over so few seeds would be too narrow.
T_QUANTILES = {
    2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 11: 2.201, 12: 2.179,
    13: 2.160, 14: 2.145, 15: 2.131, 16: 2.120, 17: 2.110, 18: 2.101, 19: 2.093, 20: 2.086, 21: 2.080, 22: 2.074,
    23: 2.069, 24: 2.064, 25: 2.060, 26: 2.056, 27: 2.052, 28: 2.048, 29: 2.045, 30: 2.042,
}  # fmt: skip


@dataclass
class Difference:
    """
    The share by which the perplexity of runs is below that of others with the same seeds.

    Args:
        share (`float`): This share, for geometric means of perplexity over texts.
        error (`float`): Standard error of the mean difference of losses, over seeds and documents; NaN with one seed.
        low, high (`float`): Ends of its 95 % interval; NaN with fewer than three seeds.
    """

    share: float
    error: float
    low: float
    high: float

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" ({self.low:+.1%} to {self.high:+.1%})"
        return f"{self.share:+.1%}{interval}"


def below(
    losses: Sequence[dict[str, Sequence[float]]],
    others: Sequence[dict[str, Sequence[float]]],
    documents: dict[str, Sequence[int]],
    draws: int = DRAWS,
) -> Difference:
    """
    Compares runs with others, seed by seed and sequence by sequence.

    The variance of the mean difference is that over seeds, plus that over documents by bootstrap: each draw takes as
    many documents of each text as it has, with replacement and with all of their sequences. The interval has the
    quantiles of Student's t for the number of seeds. The choice of texts adds no variance.

    Args:
        losses, others (`list[dict]`): For each seed, the losses of all sequences of each text, in nats per token.
        documents (`dict[str, list[int]]`): For each text, the document of each sequence.
        draws (`int`, *optional*, defaults to 10000): Number of draws.

    Returns:
        [`Difference`]

    Raises:
        `ValueError`: if there are more seeds than `T_QUANTILES` has.
    """
    generator, num_seeds = np.random.default_rng(0), len(losses)
    of_seeds, of_draws = np.zeros(num_seeds), np.zeros(draws)
    for text, of_sequences in documents.items():
        differences = np.array(
            [np.subtract(own[text], other[text]) for own, other in zip(losses, others, strict=True)]
        )
        of_seeds += differences.mean(1) / len(documents)
        of_draws += _means_over_documents(differences.mean(0), of_sequences, draws, generator) / len(documents)
    share = 1 - math.exp(of_seeds.mean())
    if num_seeds == 1:
        return Difference(share, math.nan, math.nan, math.nan)
    error = math.hypot(of_seeds.std(ddof=1) / math.sqrt(num_seeds), of_draws.std(ddof=1))
    if num_seeds == 2:
        return Difference(share, error, math.nan, math.nan)
    if num_seeds - 1 not in T_QUANTILES:
        raise ValueError(f"Intervals are known for up to {max(T_QUANTILES) + 1} seeds, but got {num_seeds}.")
    margin = T_QUANTILES[num_seeds - 1] * error
    return Difference(share, error, *(1 - math.exp(of_seeds.mean() + sign * margin) for sign in (1, -1)))


def _means_over_documents(values, documents, draws, generator):
    """Means of `values` over the sequences of documents that are drawn with replacement, of shape `(draws,)`."""
    _, places, counts = np.unique(np.asarray(documents), return_inverse=True, return_counts=True)
    times = generator.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=draws)
    return times @ np.bincount(places, values) / (times @ counts)


def factor_effects(losses: Sequence[float], levels: Sequence[dict[str, bool]]) -> dict[str, Difference]:
    """
    Estimate the share by which each factor lowers perplexity, by least squares with all factors. Errors come from the
    residuals. Runs that diverged, whose loss is not finite, are left out.

    Args:
        losses (`list[float]`): Loss of each run, in nats per token.
        levels (`list[dict[str, bool]]`): For each run, whether it has each factor.

    Raises:
        `ValueError`: if the effects cannot be told apart, or leave too few degrees of freedom or more than are known.
    """
    names = list(levels[0])
    is_finite = np.isfinite(losses)
    losses, levels = (
        np.asarray(losses)[is_finite],
        [level for level, kept in zip(levels, is_finite, strict=True) if kept],
    )
    columns = np.array([[1.0, *(0.5 if level[name] else -0.5 for name in names)] for level in levels])
    freedom = len(losses) - columns.shape[1]
    if np.linalg.matrix_rank(columns) < columns.shape[1] or freedom not in T_QUANTILES:
        raise ValueError(
            f"Effects of {len(names)} factors need runs in which they vary on their own, and {min(T_QUANTILES)} to "
            f"{max(T_QUANTILES)} runs beyond that, but got {len(losses)} runs."
        )
    inverse = np.linalg.inv(columns.T @ columns)
    effects = inverse @ columns.T @ losses
    residuals = losses - columns @ effects
    errors = np.sqrt(np.diag(inverse) * (residuals @ residuals) / freedom)
    quantile = T_QUANTILES[freedom]
    return {
        name: Difference(
            1 - math.exp(effect), float(error), *(1 - math.exp(effect + sign * quantile * error) for sign in (1, -1))
        )
        for name, effect, error in zip(names, effects[1:], errors[1:], strict=True)
    }


@dataclass
class SizeCurve:
    """The loss of dense models that were trained on the same tokens: `a + b * parameters ** -c`."""

    a: float
    b: float
    c: float

    def loss_of(self, parameters: np.ndarray) -> np.ndarray:
        """The loss of dense models with these numbers of parameters."""
        return self.a + self.b * parameters**-self.c

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
