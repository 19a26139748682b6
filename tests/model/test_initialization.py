# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""At initialization, the outputs of all feed-forward variants have the same variance."""

import pytest
import torch
from tiny_models import GROWN
from torch import nn

from modeling_peer import PeerConfig, PeerModel, configuration_path
from modeling_peer.experts import expert_tables
from modeling_peer.router import ExpertGate, ForwardPass


NUM_TOKENS = 256


def test_gates_of_added_experts_are_open():
    model = PeerModel(GROWN["grown"])
    gates = [module for module in model.modules() if isinstance(module, ExpertGate)]
    assert len(gates) == 3 and all(gate(torch.randn(5, 24)).eq(1).all() for gate in gates)


class Retrieved(nn.Module):
    """Stands for a router whose result is known."""

    def __init__(self, indices, weights):
        super().__init__()
        self.indices, self.weights = indices, weights

    def forward(self, hidden_states, *args):
        return self.indices, self.weights


def initialized(config, variant, hidden_states, training):
    """
    A feed-forward of `variant` as the model initializes it. Of the paper's tables, 6.4 GB, it holds only the rows
    that are retrieved for `hidden_states`: as rows are drawn independently, that changes nothing for these.
    """
    config = PeerConfig.from_dict(
        config.to_dict() | {"num_hidden_layers": 1, "feed_forward_types": [variant], "vocab_size": 8}
    )
    with torch.device("meta"):
        model = PeerModel(config)
    feed_forward = model.layers[0].mlp.train(training)
    if variant in ("peer", "pkm") and config.num_experts == 1024**2:
        router = feed_forward.router.to_empty(device="cpu").apply(model._init_weights)
        indices, weights = router(hidden_states, forward_pass=ForwardPass(learns=training))
        retrieved, rows = indices.unique(return_inverse=True)
        feed_forward.router = Retrieved(rows, weights)
        for table in expert_tables(feed_forward).values():
            table.weight = nn.Parameter(torch.empty(len(retrieved), config.hidden_size, device="meta"))
    return feed_forward.to_empty(device="cpu").apply(model._init_weights)


@torch.no_grad()
def output_variance(config, variant, training):
    torch.manual_seed(0)
    hidden_states = nn.functional.rms_norm(torch.randn(1, NUM_TOKENS, config.hidden_size), (config.hidden_size,))
    feed_forward = initialized(config, variant, hidden_states, training)
    return feed_forward(hidden_states, forward_pass=ForwardPass(learns=training)).var().item()


def assert_close_to_dense(config, variant, training):
    ratio = output_variance(config, variant, training) / output_variance(config, "dense", training)
    assert 1 / 2 < ratio < 2


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", ["tiny", "paper"])
@pytest.mark.parametrize("variant", ["moe", "pkm", "peer"])
def test_named_configurations_vary_as_dense_ones(variant, size, training):
    config = PeerConfig.from_pretrained(configuration_path(f"{variant}-{size}"))
    assert_close_to_dense(config, variant, training)


@pytest.mark.parametrize(
    "options",
    [
        {"gated_experts": True},
        {"expert_act": None},
        {"scoring_func": "sigmoid"},
        {"scoring_func": "relu"},
        {"query_norm": "rms"},
        {"query_norm": None},
        {"sub_keys_per_head": True},
        {"num_experts_per_head": 1, "num_retrieval_heads": 64},
    ],
    ids=str,
)
def test_options_vary_as_dense_ones(options):
    """While training: in evaluation queries are not normalized before the running statistics have learned."""
    config = PeerConfig.from_pretrained(configuration_path("peer-tiny"))
    assert_close_to_dense(PeerConfig.from_dict(config.to_dict() | options), "peer", training=True)


@pytest.mark.parametrize("variant", ["peer", "pkm"])
def test_rows_that_come_out_can_start_smaller(variant):
    config = PeerConfig.from_pretrained(configuration_path(f"{variant}-tiny"))
    config = PeerConfig.from_dict(config.to_dict() | {"expert_initializer_range": 0.003})
    feed_forward = initialized(config, variant, None, training=True)
    table = feed_forward.values if variant == "pkm" else feed_forward.expert_pool.down_proj
    assert table.weight.std().item() == pytest.approx(0.003, rel=0.02)
    if variant == "peer":
        assert feed_forward.expert_pool.up_proj.weight.std().item() == pytest.approx(
            config.initializer_range, rel=0.02
        )
