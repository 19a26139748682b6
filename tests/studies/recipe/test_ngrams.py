# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The n-grams that the recipe study compares its models with."""

import numpy as np
import pytest

from studies.common.ngrams import KneserNey, counts_in_sequence, losses, losses_by_ngrams, with_cache


TEXT = np.random.default_rng(0).integers(0, 6, (40, 30)) // 2  # 0, 1 and 2, of unequal contexts


def literal_kneser_ney(text, sequence, place, order, vocabulary):
    """The probability of a token by the formula, with counts made anew."""
    rows = [tuple(row) for row in text.tolist()]

    def grams(length):
        return [row[i : i + length] for row in rows for i in range(len(row) - length + 1)]

    def counts(length):
        # Below the highest order, each longer n-gram that occurs counts once for its ending.
        kept = grams(length) if length == order else [gram[1:] for gram in set(counts_of[length + 1])]
        return {gram: kept.count(gram) for gram in set(kept)}

    counts_of = {}
    for length in range(order, 0, -1):
        counts_of[length] = counts(length)
    probability = 1 / vocabulary
    for length in range(1, min(order, place + 1) + 1):
        context = tuple(sequence[place - length + 1 : place])
        own = {gram[-1]: count for gram, count in counts_of[length].items() if gram[:-1] == context}
        if not own:
            continue
        n1, n2, n3, n4 = (list(counts_of[length].values()).count(each) for each in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2 or 1)
        discounts = {1: 1 - 2 * y * n2 / (n1 or 1), 2: 2 - 3 * y * n3 / (n2 or 1), 3: 3 - 4 * y * n4 / (n3 or 1)}
        discounts = {count: min(max(discount, 0), count) for count, discount in discounts.items()}
        count = own.get(sequence[place], 0)
        kept = count - discounts[min(count, 3)] if count else 0
        left = sum(discounts[min(each, 3)] for each in own.values())
        probability = (kept + left * probability) / sum(own.values())
    return probability


def test_is_the_formula_and_sums_to_one():
    train, (sequence,) = TEXT[:4], TEXT[30:31].tolist()
    model = KneserNey(train, vocabulary=4, order=3)
    found = model.probabilities(np.array([sequence]))[0]
    expected = [literal_kneser_ney(train, sequence, place, 3, 4) for place in range(len(sequence))]
    assert found == pytest.approx(expected)
    for place in (0, 1, 2, 9):
        each = [[*sequence[:place], token, *sequence[place + 1 :]] for token in range(4)]
        assert model.probabilities(np.array(each))[:, place].sum() == pytest.approx(1)


def test_cache_counts_what_came_before_and_sums_to_one():
    counts = counts_in_sequence(np.array([[1, 2, 1, 2, 1]]), order=3)
    assert counts[0, :, 0].tolist() == [[0, 0, 1, 1, 2], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]
    assert counts[1, :, 0].tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]
    last = np.array([[1, 2, 1, 2, token] for token in range(4)])
    each = with_cache(np.full(last.shape, 1 / 4), counts_in_sequence(last, order=3), (2.0, 1.0))[:, 4]
    assert each.sum() == pytest.approx(1) and each.argmax() == 1


def test_reads_repeated_text_better():
    repeated = np.tile(TEXT[:8, :10], (1, 3))
    results = losses_by_ngrams(TEXT[:4], {"corpus": repeated, "other": TEXT[30:]}, 3, "corpus")
    assert results["tokens"] == 4 * 30 and results["ngrams"].keys() == {"corpus", "other"}
    assert results["cache"]["corpus"] < results["ngrams"]["corpus"]
    assert losses(np.full((2, 5), 1 / 4)) == pytest.approx(np.log(4))
