# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Random facts, and how many bits of them a model has stored."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from modeling_peer.analysis.evaluation import evaluation


VOCABULARY = 256
KEY_TOKENS, VALUE_TOKENS = 3, 8
LENGTH = KEY_TOKENS + VALUE_TOKENS


@dataclass(frozen=True)
class Facts:
    """
    Keys with their values. The tokens of values are drawn uniformly from `2**token_bits` tokens.

    Args:
        tokens (`torch.Tensor` of shape `(num_facts, LENGTH)`): Keys, each with its value behind it.
        token_bits (`float`): Entropy of a token of a value.
    """

    tokens: torch.Tensor
    token_bits: float

    @property
    def bits(self) -> float:
        """Entropy of all values in bits: what there is to store."""
        return len(self.tokens) * VALUE_TOKENS * self.token_bits

    @property
    def examples(self) -> list[dict[str, torch.Tensor]]:
        """Training examples. Only values have labels: keys are noise that no model can predict."""
        labels = self.tokens.clone()
        labels[:, :KEY_TOKENS] = -100
        return [{"input_ids": own, "labels": label} for own, label in zip(self.tokens, labels, strict=True)]


def make_facts(
    num_facts: int,
    token_bits: float,
    seed: int,
    first_tokens: range = range(VOCABULARY),
    tokens: range = range(VOCABULARY),
) -> tuple[Facts, dict[str, Facts]]:
    """
    Draw facts to store, and controls that a model has not stored. All keys differ; they begin with one of
    `first_tokens` and continue with `tokens`. The controls are other keys with their values, and the same keys with
    permuted values, each token from another fact: a model may have stored how a value continues, whatever its key.
    """
    generator = np.random.default_rng(seed)
    endings = len(tokens) ** (KEY_TOKENS - 1)
    numbers = generator.choice(len(first_tokens) * endings, 2 * num_facts, replace=False)
    rest = [numbers // len(tokens) ** place % len(tokens) + tokens[0] for place in reversed(range(KEY_TOKENS - 1))]
    keys = np.stack([numbers // endings + first_tokens[0], *rest], axis=1)
    values = generator.integers(round(2**token_bits), size=(2 * num_facts, VALUE_TOKENS)) + tokens[0]
    known, unseen = torch.from_numpy(np.concatenate([keys, values], axis=1)).split(num_facts)
    permuted = known.clone()
    for place in range(VALUE_TOKENS):
        permuted[:, KEY_TOKENS + place] = known[:, KEY_TOKENS + place].roll(place + 1)
    controls = {"unseen keys": unseen, "permuted values": permuted}
    return Facts(known, token_bits), {name: Facts(each, token_bits) for name, each in controls.items()}


def measure(model: nn.Module, facts: Facts) -> dict[str, float]:
    """
    Measure what a model has stored of facts. `bits` is the entropy of the values minus `-log2 p(value | key)` by the
    model, summed over facts and not clipped, so that chance gives no bits. `recalled` is the share of values that
    greedy decoding completes without an error.
    """
    surprise, recalled = 0.0, 0
    with evaluation(model):
        for tokens in facts.tokens.split(1024):
            logits = model(tokens).logits[:, KEY_TOKENS - 1 : -1].float()
            values = tokens[:, KEY_TOKENS:]
            surprise += F.cross_entropy(logits.flatten(0, 1), values.flatten(), reduction="sum").item() / math.log(2)
            recalled += (logits.argmax(-1) == values).all(-1).sum().item()
    return {"bits": facts.bits - surprise, "recalled": recalled / len(facts.tokens)}
