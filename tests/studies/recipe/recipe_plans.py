# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Plans of the recipe study for its tests."""

from pathlib import Path


PLANS = Path(__file__).parents[3] / "examples" / "studies" / "recipe" / "plans"

SMALL = {
    "training_texts": ["old"],
    "evaluation_texts": ["new"],
    "block_size": 32,
    "batch_size": 4,
    "eval_sequences": 8,
    "training": {"lr_scheduler_type": "cosine", "warmup_steps": 0.1},
    "fields": {"initializer_range": 0.08},
    "budgets": [6e8],
    "hidden_size": 32,
    "learning_rate": 0.01,
    "variants": {
        "dense": {"configuration": "dense-tiny"},
        "peer": {
            "configuration": "peer-tiny",
            "training": {"down_proj_lr_multiplier": 4},
            "sparse_expert_gradients": True,
            "num_experts": 64,
            "num_retrieval_heads": 2,
            "num_experts_per_head": 4,
            "query_size": 64,
        },
        "gated": {"parent": "peer", "gated_experts": True, "training": {"expert_lr_multiplier": 0.5}},
        "apart": {"parent": "gated", "trial": {"apart": True, "dense_moments": True, "down_rate": [2.0, 0.2]}},
    },
    "screened": ["gated", "apart"],
    "factors": {},
    "designs": [],
    "trials": {},
    "hidden_sizes": {},
    "transfer_size": None,
    "exponents": {},
    "timed_trials": [],
    "sizes_at_equal_seconds": [],
    "seeds": {},
    "dense_sizes": [32],
    "nums_experts": [64],
}

# With a recipe, and all that is made of it.
WHOLE = SMALL | {
    "variants": SMALL["variants"] | {"recipe": {"parent": "gated", "query_norm": "rms"}},
    "screened": [],
    "factors": {"gated": {"gated_experts": True}, "apart": {"trial": {"apart": True}}},
    "designs": [{"variant": "peer", "factors": ["gated", "apart"], "runs": 16, "seeds": [1, 2], "bar": "interval"}],
    "trials": {
        "dense": [{"learning_rate": 0.01}, {"learning_rate": 0.02}],
        "peer": [{"learning_rate": 0.01}, {"learning_rate": 0.01, "query_norm": "rms"}],
        "recipe": [{"learning_rate": 0.02, "training": {"down_proj_lr_multiplier": 8}}, {"learning_rate": 0.01}],
    },
    "hidden_sizes": {"dense": [[32, 64]], "peer": [[64]], "recipe": [[32, 64]]},
    "transfer_size": 64,
    "exponents": {"dense": 0.5},
    "timed_trials": [0, 1],
    "sizes_at_equal_seconds": [32, 64],
    "seeds": {"dense": [2], "peer": [1], "recipe": [2]},
    "dense_sizes": [32, 64],
    "nums_experts": [16, 64],
    "later_runs": [{"variant": "dense", "hidden_size": 32, "steps": 2, "learning_rate": 0.001}],
}
