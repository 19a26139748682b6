# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Fitting the keys of questions to clusters of states."""

import pytest
import torch
from torch.nn import functional as F

from modeling_peer.fact_graft import KeyMatcher
from modeling_peer.facts.keys import HELD_OUT, learned_keys


RELATIONS, WITHIN, EACH, SIZE = 3, 6, 40, 32


def fit(noise):
    """A matcher, the states and labels that it was fitted to, and negatives of two kinds."""
    generator = torch.Generator().manual_seed(1)
    centers = 2 * torch.randn(RELATIONS + WITHIN, SIZE, generator=generator)
    labels = torch.arange(len(centers)).repeat_interleave(EACH)
    states = centers[labels] + noise * torch.randn(len(labels), SIZE, generator=generator)
    # A question about another relation shares half of its elements with one that is taught.
    near = centers[torch.arange(200) % RELATIONS] * (torch.arange(SIZE) % 2)
    negatives = [near + torch.randn(200, SIZE, generator=generator), torch.randn(200, SIZE, generator=generator)]
    matcher = KeyMatcher(SIZE, len(centers), 16).requires_grad_(False)
    before = torch.get_rng_state()
    learned_keys(matcher, RELATIONS, states, labels, negatives, progress_bar=False)
    assert torch.equal(torch.get_rng_state(), before)
    return matcher, states, labels, negatives


@pytest.fixture(scope="module")
def fitted():
    """To states that are far from each other."""
    return fit(1.0)


def lowest(matcher, states, labels):
    """The similarity that all but one in a hundred states have with their keys."""
    return matcher(states).gather(1, labels[:, None]).quantile(0.01, interpolation="lower")


def test_each_state_is_nearest_to_its_key(fitted):
    matcher, states, labels, _ = fitted
    assert (matcher(states).argmax(-1) == labels).float().mean() > 0.99


def test_the_threshold_is_between_questions_and_negatives_that_are_held_out(fitted):
    matcher, states, labels, negatives = fitted
    assert matcher.threshold < lowest(matcher, states, labels) - 0.02
    for each in (negatives[0][::HELD_OUT], negatives[1]):
        assert (matcher(each, matcher.keys[:RELATIONS]).amax(-1) >= matcher.threshold).float().mean() < 0.05


def test_the_threshold_lets_states_open_that_are_like_negatives():
    matcher, states, labels, _ = fit(3.0)
    assert matcher.threshold.item() == pytest.approx(lowest(matcher, states, labels).item() - 0.01, abs=0.003)


def test_a_key_within_an_answer_is_the_projected_mean_of_its_states(fitted):
    matcher, states, labels, _ = fitted
    for key in range(RELATIONS, RELATIONS + WITHIN):
        mean = states[labels == key].mean(0)
        projected = F.linear(mean, matcher.weight, matcher.bias)
        assert F.cosine_similarity(projected, matcher.keys[key], dim=0) > 0.999
    assert torch.equal(matcher.keys, matcher.keys.bfloat16().float())  # in which it is saved
    assert (matcher.keys.norm(dim=-1) - 1).abs().max() < 0.01
