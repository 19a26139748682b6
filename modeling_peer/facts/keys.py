# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Fitting the keys by which a graft of facts recognizes questions, and their threshold."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..fact_graft import KeyMatcher


STEPS, LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 3000, 1e-2, 0.05, 0.3
TEMPERATURE, BATCH = 0.02, 256
HELD_OUT = 5  # one in this many negatives of the first kind
PIECE = 4096  # states that are compared with all keys at a time


def learned_keys(
    matcher: KeyMatcher,
    key_subjects: torch.Tensor,
    states: torch.Tensor,
    labels: torch.Tensor,
    negatives: Sequence[tuple[torch.Tensor, torch.Tensor]],
    progress_bar: bool = True,
) -> None:
    """
    Fit the projection, keys and threshold of a matcher, so that each state is nearest to the key of its label, and
    negatives to no key. The loss is a softmax over the similarities and the threshold. The key of one subject does not
    compete for states that name another subject, because the router does not compare it with them.

    Args:
        matcher ([`KeyMatcher`]): Changed in place, on its device.
        key_subjects (`torch.Tensor` of shape `(num_keys,)`): The subject of each key, -1 for keys of all subjects.
        states (`torch.Tensor` of shape `(num_states, hidden_size)`)
        labels (`torch.Tensor` of shape `(num_states,)`): The key of each state.
        negatives (sequence of pairs of `torch.Tensor`):
            For each kind of states that match no key, the states, of shape `(num, hidden_size)`, and the subjects that
            they name, of shape `(num,)`, -1 for none. The first kind is other questions about the subjects.
        progress_bar (`bool`, *optional*, defaults to `True`)
    """
    generator = torch.Generator().manual_seed(0)
    num_keys, key_size = matcher.keys.shape
    # Untaught wordings are less similar to their keys: held-out questions say how far the threshold can be lowered.
    others, named_there = negatives[0]
    is_held_out = torch.arange(len(others)) % HELD_OUT == 0
    first = others[~is_held_out], named_there[~is_held_out]
    negatives = [pair for pair in (first, *negatives[1:]) if len(pair[0])]
    mean, deviation = states.mean(0), states.std(0) + 1e-2 * states.std() + 1e-6
    projection = torch.randn(states.shape[1], key_size, generator=generator) / states.shape[1] ** 0.5
    keys = torch.randn(num_keys, key_size, generator=generator)
    threshold = torch.tensor(0.5)
    for tensor in (projection, keys, threshold):
        tensor.requires_grad_()
    groups = [{"params": [projection], "weight_decay": WEIGHT_DECAY}, {"params": [keys, threshold], "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    subjects = key_subjects[labels]

    def draw(number, of):
        return torch.randint(of, (number,), generator=generator)

    with torch.enable_grad():
        for _ in tqdm(range(STEPS), desc="Keys of questions", disable=not progress_bar):
            own = draw(BATCH, len(states))
            drawn = [draw(BATCH // len(negatives), len(each)) for each, _ in negatives]
            parts = [each[some] for (each, _), some in zip(negatives, drawn, strict=True)]
            batch = (torch.cat([states[own], *parts]) - mean) / deviation
            named = torch.cat([subjects[own], *(each[some] for (_, each), some in zip(negatives, drawn, strict=True))])
            # Dropout with a generator of its own, so that the caller's random numbers stay the same.
            kept = torch.rand(batch.shape, generator=generator) >= DROPOUT
            similarities = F.normalize((batch * kept) @ projection, dim=-1) @ F.normalize(keys, dim=-1).T
            competes = (key_subjects < 0) | (key_subjects == named[:, None]) | (named[:, None] < 0)
            similarities = similarities.masked_fill(~competes, -1.0)
            logits = torch.cat([similarities, threshold.expand(len(batch), 1)], -1) / TEMPERATURE
            targets = F.pad(labels[own], (0, len(batch) - len(own)), value=num_keys)
            optimizer.zero_grad()
            F.cross_entropy(logits, targets).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        weight, bias = (projection / deviation[:, None]).T, -(mean / deviation) @ projection
        # All are rounded to bfloat16, as in saved adapters: thresholds are close to similarities.
        found = ((matcher.weight, weight), (matcher.bias, bias), (matcher.keys, F.normalize(keys, dim=-1)))
        for parameter, value in found:
            parameter.copy_(value.bfloat16())
        nearest = _nearest(matcher, others[is_held_out], named_there[is_held_out], key_subjects)
        lowest = _nearest(matcher, states).quantile(0.01, interpolation="lower") - 0.01
        matcher.threshold.copy_(torch.minimum((threshold + nearest.quantile(0.99)) / 2, lowest).bfloat16())


def _nearest(
    matcher: KeyMatcher,
    states: torch.Tensor,
    named: torch.Tensor | None = None,
    key_subjects: torch.Tensor | None = None,
) -> torch.Tensor:
    """The similarity of each state with the nearest key, on the CPU; if `named`, without keys of other subjects."""
    found = []
    for piece in torch.arange(len(states)).split(PIECE):
        similarities = matcher(states[piece].to(matcher.keys.device)).cpu()
        if named is not None and key_subjects is not None:
            competes = (key_subjects < 0) | (key_subjects == named[piece, None])
            similarities = similarities.masked_fill(~competes, -1.0)
        found.append(similarities.amax(-1))
    return torch.cat(found)
