# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Fitting the keys by which a graft of facts recognizes questions, and their threshold."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..fact_graft import KeyMatcher


STEPS, LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 3000, 1e-2, 0.05, 0.4
TEMPERATURE, BATCH, BATCH_WITHIN = 0.02, 256, 128
STRICTNESS = 0.6  # where the threshold lies between the learned one and the 99 % quantile of held-out negatives
HELD_OUT = 5  # one in this many negatives of the first kind


def learned_keys(
    matcher: KeyMatcher,
    num_relations: int,
    states: torch.Tensor,
    labels: torch.Tensor,
    negatives: Sequence[torch.Tensor],
    progress_bar: bool = True,
) -> None:
    """
    Fit the projection, keys and threshold of a matcher. The loss is a softmax over similarities and the threshold.
    Ends of questions are to be nearest to the key of their relation, and negatives to no key. A state within an answer
    is to be nearest to the mean of all states at this token of this answer, among those of the batch, as in
    prototypical networks (arXiv 1703.05175). The projection of this mean becomes the key.

    Args:
        matcher ([`KeyMatcher`]): Changed in place, on its device.
        num_relations (`int`): Number of keys of relations. They come before those of tokens within answers.
        states (`torch.Tensor` of shape `(num_states, hidden_size)`)
        labels (`torch.Tensor` of shape `(num_states,)`): The key of each state. Each key has a state.
        negatives (sequence of `torch.Tensor` of shape `(num, hidden_size)`):
            For each kind of states that match no key, the states. The first is other questions about the subjects.
        progress_bar (`bool`, *optional*, defaults to `True`)
    """
    generator = torch.Generator().manual_seed(0)
    is_end = labels < num_relations
    ends, relations = states[is_end], labels[is_end]
    within, keys_within = states[~is_end], labels[~is_end] - num_relations
    # Untaught wordings are less similar to their keys: held-out questions say how far the threshold can be lowered.
    is_held_out = torch.arange(len(negatives[0])) % HELD_OUT == 0
    held_out = negatives[0][is_held_out]
    negatives = [each for each in (negatives[0][~is_held_out], *negatives[1:]) if len(each)]
    mean, deviation = states.mean(0), states.std(0) + 1e-2 * states.std() + 1e-6
    num_within = len(matcher.keys) - num_relations
    means = torch.zeros(num_within, states.shape[1]).index_add_(0, keys_within, within)
    means /= torch.bincount(keys_within, minlength=num_within)[:, None]
    projection = torch.randn(states.shape[1], matcher.keys.shape[1], generator=generator) / states.shape[1] ** 0.5
    keys = torch.randn(num_relations, matcher.keys.shape[1], generator=generator)
    threshold = torch.tensor(0.5)
    for tensor in (projection, keys, threshold):
        tensor.requires_grad_()
    groups = [{"params": [projection], "weight_decay": WEIGHT_DECAY}, {"params": [keys, threshold], "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    def draw(number, of):
        return torch.randint(of, (number,), generator=generator)

    def projected(states):
        return F.normalize((states - mean) / deviation @ projection, dim=-1)

    with torch.enable_grad():
        for _ in tqdm(range(STEPS), desc="Keys of questions", disable=not progress_bar):
            own = draw(BATCH, len(ends))
            some = draw(min(BATCH_WITHIN, len(within)), max(len(within), 1))
            others = [each[draw(BATCH // len(negatives), len(each))] for each in negatives]
            drawn, places = keys_within[some].unique(return_inverse=True)
            compared = torch.cat([F.normalize(keys, dim=-1), projected(means[drawn])])
            shut = torch.full((sum(map(len, others)),), len(compared))
            targets = torch.cat([relations[own], num_relations + places, shut])
            batch = torch.cat([ends[own], within[some], *others])
            # Dropout with a generator of its own, so that the caller's random numbers stay the same.
            batch = torch.where(torch.rand(batch.shape, generator=generator) < DROPOUT, mean, batch)
            found = projected(batch)
            similarities = torch.cat([found @ compared.T, threshold.expand(len(found), 1)], -1)
            optimizer.zero_grad()
            F.cross_entropy(similarities / TEMPERATURE, targets).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        # All are rounded to bfloat16, as in saved adapters: thresholds are close to similarities.
        matcher.weight.copy_((projection / deviation[:, None]).T.bfloat16())
        matcher.bias.copy_((-(mean / deviation) @ projection).bfloat16())
        own_keys = torch.cat([F.normalize(keys, dim=-1), projected(means)]).bfloat16().float()
        matcher.keys.copy_(own_keys)
        device = matcher.keys.device
        nearest = matcher(held_out.to(device), matcher.keys[:num_relations]).amax(-1).cpu()
        projections = matcher(states.to(device), torch.eye(own_keys.shape[1], device=device)).cpu()
        similarities = (projections * own_keys[labels]).sum(-1)
        lowest = similarities.quantile(0.01, interpolation="lower") - 0.01
        between = threshold + STRICTNESS * (nearest.quantile(0.99) - threshold)
        matcher.threshold.copy_(torch.minimum(between, lowest).bfloat16())
