# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What the recipe study tries beside flags: shared initialization, changes of the training, other feed-forwards."""

import pytest
import torch
from tiny_models import random_tokens, tiny_config, tiny_model
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from trainer_worker import small_model

from modeling_peer import PeerForCausalLM, model_costs
from studies.recipe.trials import share_initialization


def test_models_of_a_seed_share_what_they_have_in_common():
    """Made with other seeds: tables and keys too, if those are what two variants have in common."""
    kinds = [("dense", "dense"), ("dense", "peer"), ("dense", "peer")]
    models = [
        small_model(*kind, seed=seed, num_retrieval_heads=1 + seed % 2, expert_initializer_range=0.1)
        for seed, kind in enumerate(kinds)
    ]
    for model in models:
        share_initialization(model, 5)
    dense, one_head, two_heads = (model.state_dict() for model in models)
    for own, other, there in (
        (dense, one_head, "model.layers.1.self_attn.q_proj.weight"),
        (one_head, two_heads, "model.layers.1.mlp.expert_pool.down_proj.weight"),
        (one_head, two_heads, "model.layers.1.mlp.router.sub_keys"),
    ):
        shared = [name for name in own.keys() & other.keys() if own[name].shape == other[name].shape]
        assert there in shared and all(torch.equal(own[name], other[name]) for name in shared)
    assert len({float(value[0, 0]) for value in dense.values() if value.ndim == 2}) > 10
    before = dense["model.embed_tokens.weight"].clone()
    share_initialization(models[0], 6)
    assert not torch.equal(before, models[0].state_dict()["model.embed_tokens.weight"])
    assert before.std() == pytest.approx(0.1, rel=0.1)


def test_the_gate_of_a_product_key_memory():
    layer = tiny_model(tiny_config("gated_pkm")).model.layers[0].mlp
    hidden_states = torch.randn(2, 5, 24)
    with torch.no_grad():
        memory = super(type(layer), layer).forward(hidden_states)
        gate = F.silu(hidden_states @ layer.gate_proj.weight.T)
        torch.testing.assert_close(layer(hidden_states), (memory * gate) @ layer.output_proj.weight.T)


@pytest.mark.parametrize(
    ("variant", "options"), [("gated_pkm", {}), ("narrow_peer", {}), ("narrow_peer", {"gated_experts": True})]
)
def test_costs_are_those_of_the_model(variant, options):
    config = tiny_config(
        "dense", variant, expert_kernels="eager", **options
    )  # torch counts nothing inside an operator
    model, costs = PeerForCausalLM(config).eval(), model_costs(config, 6)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(random_tokens(1, 6), use_cache=False)
    counted = counter.get_flop_counts()["PeerForCausalLM.model.layers.1.mlp"]
    assert sum(counted.values()) == 6 * costs.feed_forwards[1].flops
    assert sum(each.numel() for each in model.parameters()) == costs.total.parameters
