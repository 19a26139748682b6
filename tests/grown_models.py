# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""For tests of models that grow: configurations, sizes of additions, and a training that takes a moment."""

import torch
from tiny_models import random_tokens, tiny_config


CONFIGS = {
    "one layer": tiny_config("peer", "dense"),
    "two layers": tiny_config("peer", "dense", "peer"),
    "shared pool": tiny_config("peer", "dense", "peer", share_experts_across_layers=True),
    "gated, dense branch": tiny_config("peer", gated_experts=True, shared_expert_intermediate_size=8),
    "rms": tiny_config("dense", "peer", query_norm="rms", scoring_func="sigmoid"),
    "no norm, keys per head": tiny_config("peer", query_norm=None, sub_keys_per_head=True),
    "beside the others": tiny_config("peer", "moe", "pkm", "dense"),
}

SIZES = {"protected": 25, "open": 13}  # of six times six experts an open addition makes seven times seven


def logits_of(model, tokens=None):
    with torch.no_grad():
        return model(random_tokens(2, 20) if tokens is None else tokens).logits


def train_a_little(model, steps=5, optimizer_class=torch.optim.AdamW):
    """On tokens of its own; leaves the model in evaluation."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_class(trainable, lr=0.05, weight_decay=0.1)
    model.train()
    for step in range(steps):
        tokens = random_tokens(4, 16, seed=step)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
