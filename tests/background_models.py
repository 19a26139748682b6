# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""For tests of background counts and of sparse finetuning: a corpus, and a model with 256 experts per layer."""

from trainer_worker import counting_sequences, small_model

from modeling_peer.analysis.expert_background import ExpertBackground


CORPUS = counting_sequences(30, seed=3)
FIRST_POOL, PKM, LAST_POOL = "model.layers.0.mlp.expert_pool", "model.layers.1.mlp", "model.layers.2.mlp.expert_pool"


def model_of_three(**fields):
    """Two layers with a pool, of gated experts, and a PKM layer between, with 256 experts each."""
    return small_model("peer", "pkm", "peer", **{"num_experts": 16**2, "gated_experts": True, **fields})


def measured(model, **options):
    return ExpertBackground.measure(model, CORPUS, progress_bar=False, **options)
