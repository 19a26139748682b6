# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Plans of the scaling study for its tests: the committed one with other sizes, and one that trains in seconds."""

from dataclasses import replace
from pathlib import Path

from studies.scaling.plan import read_plan


ROOT = Path(__file__).parents[3]
SCALING = ROOT / "examples" / "studies" / "scaling"

PLAN = replace(
    read_plan(SCALING / "plans" / "two-cores.json"),
    budgets=[6e12, 2e13],
    hidden_sizes=[[32, 64, 96, 128]] * 2,
    learning_rates=[0.002, 0.004, 0.008],
)

PEER_FIELDS = {"num_experts": 64, "num_retrieval_heads": 2, "num_experts_per_head": 4, "query_size": 64}
SMALL = {
    "training_texts": ["old"],
    "evaluation_texts": ["new"],
    "block_size": 32,
    "batch_size": 4,
    "hidden_sizes": [[32]],
    "budgets": [6e8],
    "learning_rates": [0.01],
    "seeds": 2,
    "eval_sequences": 8,
    "training": {"lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2},
    "fields": {"initializer_range": 0.08},
    "variants": {
        "dense": {"configuration": "dense-tiny"},
        "moe-expert-choice": {"configuration": "moe-tiny", "moe_num_experts": 4, "moe_routing": "expert_choice"},
        "peer": {
            "configuration": "peer-tiny",
            "training": {"down_proj_lr_multiplier": 4},
            "sparse_expert_gradients": True,
            **PEER_FIELDS,
        },
    },
    "reference_hidden_size": 32,
    "ablations": {
        "num_experts": {"16": {"num_experts": 16}},
        "active": {},
        "query_norm": {},
        "variation": {
            "no activation": {"expert_act": None},
            "one learning rate": {"training": {"down_proj_lr_multiplier": 1}},
        },
    },
    "repeated_ablations": ["num_experts"],
    "after_training": {"k = 2": {"num_experts_per_head": 2}, "h = 1": {"num_retrieval_heads": 1}},
}
