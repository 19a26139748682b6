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
BATCH_SIZE = 256


@dataclass(frozen=True)
class Facts:
    """
    Random facts: keys, all different, and values, whose tokens are drawn uniformly from the first `2**token_bits`.

    Args:
        tokens (`torch.Tensor` of shape `(num_facts, LENGTH)`): Keys, each with its value behind it.
        token_bits (`float`): Entropy of a token of a value.
    """

    tokens: torch.Tensor
    token_bits: float

    @property
    def bits(self) -> float:
        """What there is to store."""
        return len(self.tokens) * VALUE_TOKENS * self.token_bits

    @property
    def examples(self) -> list[dict[str, torch.Tensor]]:
        """Training examples, of which the values alone are learned: keys are noise that no model can predict."""
        labels = self.tokens.clone()
        labels[:, :KEY_TOKENS] = -100
        return [{"input_ids": own, "labels": label} for own, label in zip(self.tokens, labels, strict=True)]


def make_facts(num_facts: int, token_bits: float, seed: int) -> tuple[Facts, dict[str, Facts]]:
    """
    Facts to store, and controls, of which a model has stored nothing: other keys, and the same keys with the values of
    others.
    """
    generator = np.random.default_rng(seed)
    numbers = generator.choice(VOCABULARY**KEY_TOKENS, 2 * num_facts, replace=False)
    keys = np.stack([numbers // VOCABULARY**place % VOCABULARY for place in range(KEY_TOKENS)], axis=1)
    values = generator.integers(round(2**token_bits), size=(2 * num_facts, VALUE_TOKENS))
    tokens = torch.from_numpy(np.concatenate([keys, values], axis=1))
    known, unseen = tokens.split(num_facts)
    permuted = torch.cat([known[:, :KEY_TOKENS], known[:, KEY_TOKENS:].roll(1, 0)], dim=1)
    controls = {"unseen keys": unseen, "permuted values": permuted}
    return Facts(known, token_bits), {name: Facts(each, token_bits) for name, each in controls.items()}


def measure(model: nn.Module, facts: Facts) -> dict[str, float]:
    """
    What a model has stored of facts: `bits`, the entropy of the values minus the model's `-log2 p(value | key)`, summed
    over facts and not clipped, so that chance gives no bits; and `recalled`, the share of values that greedy decoding
    completes without an error.
    """
    surprise, recalled = 0.0, 0
    with evaluation(model):
        for tokens in facts.tokens.split(1024):
            logits = model(tokens).logits[:, KEY_TOKENS - 1 : -1].float()
            values = tokens[:, KEY_TOKENS:]
            surprise += F.cross_entropy(logits.flatten(0, 1), values.flatten(), reduction="sum").item() / math.log(2)
            recalled += (logits.argmax(-1) == values).all(-1).sum().item()
    return {"bits": facts.bits - surprise, "recalled": recalled / len(facts.tokens)}
