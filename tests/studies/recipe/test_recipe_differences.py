# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Paired differences, their intervals, and the size of a dense model that predicts as well."""

import math

import numpy as np
import pytest

from studies.recipe.differences import below, factor_effects, fit_sizes


DOCUMENTS = {"one": [0, 0, 1, 2], "two": [0, 1, 1, 1]}


def losses_of(shift, noise=0.0, seeds=3):
    generator = np.random.default_rng(1)
    return [
        {text: [5.0 + seed + shift + noise * x for x in generator.standard_normal(4)] for text in DOCUMENTS}
        for seed in range(seeds)
    ]


def test_what_seeds_and_sequences_have_in_common_does_not_count():
    """Seeds that differ by whole nats, and a difference that is the same everywhere: an interval of no width."""
    found = below(losses_of(-0.1), losses_of(0.0), DOCUMENTS)
    for share in (found.share, found.low, found.high):
        assert share == pytest.approx(1 - math.exp(-0.1))
    assert found.error == pytest.approx(0.0, abs=1e-12)
    own, others = losses_of(-0.1), losses_of(0.0)[::-1]  # pairs are those of a seed
    assert below(own[::-1], others, DOCUMENTS).error == pytest.approx(0.0, abs=1e-12)
    assert below(own, others, DOCUMENTS).error > 0.5


def test_texts_count_equally_and_documents_by_their_sequences():
    others = losses_of(0.0, seeds=2)
    own = [{"one": [5.0 + s, 5.0 + s, 5.0 + s, 5.4 + s], "two": [5.2 + s, 5.0 + s, 5.0 + s, 5.0 + s]} for s in (0, 1)]
    found = below(own, others, DOCUMENTS)
    assert found.share == pytest.approx(1 - math.exp((0.1 + 0.05) / 2))
    assert math.isnan(found.low) and str(found) == f"{found.share:+.1%}"  # of two seeds there is no interval
    drawn = np.random.default_rng(5).integers(0, 3, (20_000, 3))
    one = 0.4 * (drawn == 2).sum(1) / ((drawn == 0) * 2 + (drawn > 0)).sum(1)
    drawn = np.random.default_rng(6).integers(0, 2, (20_000, 2))
    two = 0.2 * (drawn == 0).sum(1) / ((drawn == 1) * 3 + (drawn == 0)).sum(1)
    assert found.error == pytest.approx(math.hypot(one.std(), two.std()) / 2, rel=0.03)
    assert math.isnan(below(own[:1], others[:1], DOCUMENTS).error)


@pytest.mark.parametrize(("seeds", "of_seeds"), [(10, 0.02), (4, 0.1)])
def test_the_interval_holds_what_is_true_nineteen_times_of_twenty(seeds, of_seeds):
    """Where documents differ most, and where seeds do, of which there are few."""
    generator, documents = np.random.default_rng(0), {"text": np.repeat(np.arange(40), 2).tolist()}
    hits = 0
    for _ in range(300):
        of_documents = np.repeat(generator.normal(-0.1, 0.2, 40), 2)
        own = [{"text": of_documents + generator.normal(0, of_seeds)} for _ in range(seeds)]
        found = below(own, [{"text": np.zeros(80)}] * seeds, documents, draws=200)
        hits += found.low <= 1 - math.exp(-0.1) <= found.high
    assert hits >= 274


def test_a_curve_through_sizes():
    sizes = [4e5, 8e5, 1.6e6, 3.2e6]
    curve = fit_sizes(sizes, [3.0 + 40 * size**-0.3 for size in sizes])
    assert curve.size_of(3.0 + 40 * 1e6**-0.3) == pytest.approx(1e6, rel=0.01)
    assert curve.size_of(curve.a) == math.inf
    with pytest.raises(ValueError, match="larger models must be lower"):
        fit_sizes(sizes, [3.0, 3.1, 3.2, 3.3])


def test_effects_of_factors():
    """Of a design that is not balanced, beside another factor: what numpy's least squares say, and their errors."""
    generator, names = np.random.default_rng(2), ("one", "two")
    levels = [{name: bool(generator.integers(2)) for name in names} for _ in range(12)]
    losses = [4 - 0.2 * level["one"] + 0.1 * level["two"] + 0.01 * generator.standard_normal() for level in levels]
    found = factor_effects(losses, levels)
    columns = np.array([[1, level["one"], level["two"]] for level in levels], dtype=float)
    expected, squares, *_ = np.linalg.lstsq(columns, losses)
    error = np.sqrt(squares[0] / 9 * np.linalg.inv(columns.T @ columns)[1, 1])
    assert found["one"].share == pytest.approx(1 - math.exp(expected[1]))
    assert found["one"].error == pytest.approx(error)
    assert found["one"].low == pytest.approx(1 - math.exp(expected[1] + 2.262 * error))
    assert found["one"].high == pytest.approx(1 - math.exp(expected[1] - 2.262 * error))
    assert found["two"].high < 0  # it raises the loss
    diverged = factor_effects([*losses, math.nan], [*levels, {"one": True, "two": True}])
    assert diverged == found
