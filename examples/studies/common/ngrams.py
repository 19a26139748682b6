# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Prediction of texts by n-grams: an interpolated, modified Kneser-Ney model, alone and with a cache."""

from collections import Counter
from itertools import product
from typing import Any

import numpy as np


ORDER = 5
# Weights of the prediction so far, in occurrences in the sequence: beside counts of tokens, and of longer n-grams.
STRENGTHS = (30.0, 100.0, 300.0), (0.5, 1.0, 2.0, 4.0, 8.0)


class KneserNey:
    """
    An interpolated, modified Kneser-Ney model (Chen and Goodman, 1998). N-grams of the highest order are counted by
    their occurrences, those of lower orders by the number of different tokens before them. Each order has its own
    discounts for counts of one, two and more.

    Args:
        sequences (`np.ndarray` of shape `(num_sequences, length)`): Tokens to count; no n-gram goes beyond a sequence.
        vocabulary (`int`): Number of tokens. `vocabulary**order` must be below `2**63`.
        order (`int`, *optional*, defaults to 5): Length of the longest n-grams.
    """

    def __init__(self, sequences: np.ndarray, vocabulary: int, order: int = ORDER):
        self.vocabulary, self.levels = vocabulary, []
        keys, counts = np.unique(self._keys(sequences, order), return_counts=True)
        for length in range(order, 0, -1):
            contexts, starts = np.unique(keys // vocabulary, return_index=True)
            discounts = _discounts(counts)
            totals, left = np.add.reduceat(counts, starts), np.add.reduceat(discounts, starts)
            self.levels.insert(0, (keys, counts - discounts, contexts, totals, left))
            # The number of different tokens before each n-gram that is shorter by one.
            keys, counts = np.unique(keys % vocabulary ** (length - 1), return_counts=True)

    def _keys(self, sequences, length):
        """The key of each n-gram, by its first position: `(num_sequences, sequence_length - length + 1)`."""
        count = sequences.shape[1] - length + 1
        parts = [sequences[:, start : start + count].astype(np.int64) for start in range(length)]
        return sum(part * self.vocabulary**power for part, power in zip(parts, range(length - 1, -1, -1), strict=True))

    def probabilities(self, sequences: np.ndarray) -> np.ndarray:
        """The probability of each token given those before it, in the shape of `sequences`."""
        found = np.full(sequences.shape, 1 / self.vocabulary)
        for length, (keys, counts, contexts, totals, left) in enumerate(self.levels, 1):
            asked = self._keys(sequences, length)
            count = _look_up(keys, counts, asked)
            total, lower = (_look_up(contexts, each, asked // self.vocabulary) for each in (totals, left))
            own = found[:, length - 1 :]
            found[:, length - 1 :] = np.where(total > 0, (count + lower * own) / np.maximum(total, 1), own)
        return found


def _discounts(counts):
    """The discount of each count, from 0 to the count itself. Unseen n-grams get what is discounted."""
    once, twice, thrice, four = ((counts == each).sum() for each in range(1, 5))
    share = once / max(once + 2 * twice, 1)
    more = np.array([twice / max(once, 1), thrice / max(twice, 1), four / max(thrice, 1)])
    places = np.arange(1, 4)
    return (places - (places + 1) * share * more).clip(0, places)[counts.clip(max=3) - 1]


def _look_up(keys, values, asked):
    """The value of each requested key, 0 for a missing one."""
    places = np.searchsorted(keys, asked).clip(max=len(keys) - 1)
    return np.where(keys[places] == asked, values[places], 0)


def counts_in_sequence(sequences: np.ndarray, order: int = ORDER) -> np.ndarray:
    """
    How often each token has followed its context of 0 to `order - 1` tokens earlier in its sequence, and how often the
    context has occurred there: `(2, order, num_sequences, length)`.
    """
    found = np.zeros((2, order, *sequences.shape))
    for row, sequence in enumerate(sequences.tolist()):
        seen: Counter = Counter()
        for place in range(len(sequence)):
            for length in range(min(place + 1, order)):
                context = tuple(sequence[place - length : place])
                whole = (*context, sequence[place])
                found[:, length, row, place] = seen[whole, "token"], seen[context, "context"]
                seen[whole, "token"] += 1
                seen[context, "context"] += 1
    return found


def with_cache(probabilities: np.ndarray, counts: np.ndarray, strengths: tuple[float, float]) -> np.ndarray:
    """Correct probabilities by the sequence so far, from single tokens to the longest n-grams, see `STRENGTHS`."""
    for length, (count, total) in enumerate(zip(*counts, strict=True)):
        strength = strengths[min(length, 1)]
        probabilities = np.where(total > 0, (count + strength * probabilities) / (total + strength), probabilities)
    return probabilities


def losses(probabilities: np.ndarray, first: int = 1) -> float:
    """Mean loss in nats per token, from the token `first` of each sequence on."""
    return float(-np.log(probabilities[:, first:]).mean())


def losses_by_ngrams(
    train: np.ndarray,
    held_out: dict[str, np.ndarray],
    vocabulary: int,
    choose_by: str,
    order: int = ORDER,
    first: int = 1,
) -> dict[str, Any]:
    """
    Losses of held-out texts, in nats per token, by n-grams of the training text, alone and with a cache.

    Args:
        train (`np.ndarray` of shape `(num_sequences, length)`): Sequences to count.
        held_out (`dict[str, np.ndarray]`): Sequences of each held-out text.
        vocabulary (`int`): Number of tokens.
        choose_by (`str`): The text by which the strengths of the cache are chosen.
        order (`int`, *optional*, defaults to 5): Length of the longest n-grams, see [`KneserNey`].
        first (`int`, *optional*, defaults to 1): The token of each sequence from which on losses count.
    """
    model = KneserNey(train, vocabulary, order)
    alone = {name: model.probabilities(sequences) for name, sequences in held_out.items()}
    counts = {name: counts_in_sequence(sequences, order) for name, sequences in held_out.items()}
    strengths = min(
        product(*STRENGTHS), key=lambda each: losses(with_cache(alone[choose_by], counts[choose_by], each), first)
    )
    return {
        "tokens": train.size,
        "strengths": strengths,
        "ngrams": {name: losses(each, first) for name, each in alone.items()},
        "cache": {name: losses(with_cache(alone[name], counts[name], strengths), first) for name in held_out},
    }
