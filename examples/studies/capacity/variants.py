# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The compared models: two layers of width 64, which differ only in their feed-forward."""

from typing import Any

from transformers import set_seed

from modeling_peer import ModelCosts, PeerConfig, PeerForCausalLM, model_costs
from studies.capacity.facts import LENGTH, VOCABULARY


LAYERS = 2
SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}


def _peer(num_experts: int, heads: int, k: int, kind: str = "peer") -> dict[str, Any]:
    sizes = {"num_experts": num_experts, "num_retrieval_heads": heads, "num_experts_per_head": k, "query_size": 32}
    recipe = {"sub_keys_per_head": True, "expert_initializer_range": 0.1}
    return {"feed_forward_types": [kind] * LAYERS, **sizes, **recipe}


def _dense(width: int) -> dict[str, Any]:
    return {"feed_forward_types": ["dense"] * LAYERS, "intermediate_size": width}


# Fields of the configuration, by the name of the variant. All of these take 218,000 FLOPs a token ± 5 %.
AT_EQUAL_FLOPS = {
    "dense": _dense(149),
    "moe-32": {
        "feed_forward_types": ["moe"] * LAYERS,
        "moe_num_experts": 32,
        "moe_num_experts_per_tok": 2,
        "moe_intermediate_size": 68,
        "intermediate_size": 149,  # by which it is initialized
        "output_router_logits": True,  # with the loss that balances its experts
    },
    # Memories have as many parameters as 4,096 and 16,384 experts.
    "pkm-8281": _peer(8281, 3, 72, "pkm"),
    "pkm-32761": _peer(32761, 2, 100, "pkm"),
    "peer-1024": _peer(1024, 4, 32),
    "peer-4096": _peer(4096, 3, 42),
    "peer-16384": _peer(16384, 2, 64),
    "peer-65536": _peer(65536, 2, 32),
}
# Dense models of other widths, which see facts as often as equal seconds allow.
OF_OTHER_WIDTHS = {f"dense-{width}": _dense(width) for width in (298, 596)}
VARIANTS = AT_EQUAL_FLOPS | OF_OTHER_WIDTHS


def has_tables(variant: str) -> bool:
    """Whether a variant is PEER or PKM, whose v_i have a learning rate of their own."""
    return variant.startswith(("peer", "pkm"))


def configuration(variant: str, **changes: Any) -> PeerConfig:
    """The configuration of a variant, with other values of some fields."""
    return PeerConfig(**SHARED | VARIANTS[variant] | changes)


def costs(variant: str) -> ModelCosts:
    """Costs of a variant per token of a fact."""
    return model_costs(configuration(variant), sequence_length=LENGTH)


def make_model(variant: str, seed: int, **changes: Any) -> PeerForCausalLM:
    """A new model of a variant, with other values of some fields of its configuration."""
    set_seed(seed)
    return PeerForCausalLM(configuration(variant, **changes))
