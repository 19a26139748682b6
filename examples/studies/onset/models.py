# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The compared models: four layers of width 64 that differ in which layers have experts, and how they begin."""

from torch import nn
from transformers import set_seed

from modeling_peer import PeerConfig, PeerForCausalLM
from studies.onset.texts import BLOCK, VOCABULARY


LAYERS, WIDTH = 4, 64
SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 256,
    "max_position_embeddings": BLOCK,
    "tie_word_embeddings": True,
    "num_experts": 16384,
    "num_retrieval_heads": 2,
    "num_experts_per_head": 16,
    "query_size": 32,
    "sub_keys_per_head": True,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
# The feed-forwards of each placement, from the first layer on.
PLACEMENTS = {
    "dense": ["dense"] * LAYERS,
    "peer": ["peer"] * LAYERS,
    "alternate": ["dense", "peer"] * (LAYERS // 2),
    "one": ["dense", "dense", "peer", "dense"],
}


def make_model(placement: str, initializer_range: float, attention: float, seed: int) -> PeerForCausalLM:
    """A new model. The weights of its attention begin with a standard deviation of their own."""
    set_seed(seed)
    config = PeerConfig(**SHARED, feed_forward_types=PLACEMENTS[placement], initializer_range=initializer_range)
    model = PeerForCausalLM(config)
    for layer in model.model.layers:
        for module in layer.self_attn.modules():
            if isinstance(module, nn.Linear):
                module.weight.data *= attention / initializer_range
    return model
