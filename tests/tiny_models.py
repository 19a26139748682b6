# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of every variant and option, and models of them whose weights and statistics are not their first."""

import copy
import itertools

import torch

from modeling_peer import PeerConfig, PeerForCausalLM


VOCAB_SIZE = 64


def tiny_config(*feed_forward_types: str, **fields) -> PeerConfig:
    """Two layers (or as many as variants are named) small enough for float64; `fields` override."""
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "num_experts": 6**2,
        "num_retrieval_heads": 2,
        "num_experts_per_head": 3,
        "query_size": 8,
        "moe_num_experts": 4,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    types = list(feed_forward_types) or ["peer", "dense"]
    return PeerConfig(**{**sizes, "num_hidden_layers": len(types), "feed_forward_types": types, **fields})


def tiny_model(config: PeerConfig, seed: int = 0) -> PeerForCausalLM:
    """A model in evaluation, with running statistics from random text."""
    torch.manual_seed(seed)
    model = PeerForCausalLM(copy.deepcopy(config)).train()
    let_added_experts_speak(model)
    for _ in range(3):
        model(torch.randint(0, config.vocab_size, (8, 32)))
    return model.eval()


def let_added_experts_speak(model: PeerForCausalLM) -> None:
    """As if they had been trained: they start with rows of zeros."""
    for name, parameter in model.named_parameters():
        if ".added." in name and "down_proj" in name:
            torch.nn.init.normal_(parameter, std=0.3)


def random_tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    """Tokens other than 0, which pads."""
    return torch.randint(1, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


VARIANTS = {
    "dense": tiny_config("dense", "dense"),
    "moe": tiny_config("moe", "dense"),
    "moe_expert_choice": tiny_config("moe", "dense", moe_routing="expert_choice"),
    "pkm": tiny_config("pkm", "dense"),
    "peer": tiny_config("peer", "dense"),
    "all_in_one": tiny_config("peer", "moe", "pkm", "dense"),
    "tied_embeddings": tiny_config("dense", "peer", tie_word_embeddings=True),
}

# What shapes the router, in every combination …
ROUTERS = {
    f"{norm}-{scoring}-{'own' if per_head else 'shared'}_keys": tiny_config(
        query_norm=norm, scoring_func=scoring, sub_keys_per_head=per_head
    )
    for norm, scoring, per_head in itertools.product(
        ("batch", "rms", None), ("softmax", "sigmoid", "relu"), (False, True)
    )
}

# … and what shapes the experts.
EXPERTS = {
    f"{act}-{'gated' if gated else 'plain'}-{'branch' if branch else 'alone'}-{'one' if shared else 'own'}_pool": tiny_config(
        "peer",
        "peer",
        expert_act=act,
        gated_experts=gated,
        shared_expert_intermediate_size=branch,
        share_experts_across_layers=shared,
    )
    for act, gated, branch, shared in itertools.product(("gelu", None), (False, True), (None, 8), (False, True))
}

PROTECTED = {"mode": "protected", "num_experts": 25, "num_retrieval_heads": 1, "num_experts_per_head": 4}

# The configurations of models that grew.
GROWN = {
    "grown": tiny_config(
        "peer",
        "peer",
        expert_additions=[
            {"layers": [0], "mode": "open", "num_experts": 13},
            {"layers": [0, 1], **PROTECTED},
            {"layers": [1], **PROTECTED},
        ],
    ),
    "grown_one_pool": tiny_config(
        "peer",
        "peer",
        share_experts_across_layers=True,
        gated_experts=True,
        expert_additions=[{"layers": [0, 1], **PROTECTED}],
    ),
}

ALL_CONFIGS = {**VARIANTS, **ROUTERS, **EXPERTS, **GROWN}
