# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The PEER layer against the literal Algorithm 1, in float64, outputs and gradients."""

import pytest
import torch
from literal_algorithm import literal_peer, retrieve
from tiny_models import EXPERTS, ROUTERS, tiny_config

from modeling_peer.configuration_peer import generations_of
from modeling_peer.experts import ExpertPool, expert_index
from modeling_peer.feed_forward import PeerFeedForward, PkmFeedForward


CONFIGS = {
    **ROUTERS,
    **EXPERTS,
    "large epsilon": tiny_config(rms_norm_eps=0.1),
    "one expert per head": tiny_config(num_experts_per_head=1, expert_act="relu"),
    "ReLU in the branch": tiny_config(hidden_act="relu", shared_expert_intermediate_size=8),
}


def layer_in_float64(config, layer_class=PeerFeedForward):
    torch.manual_seed(0)
    layer = layer_class(config, 0).double().eval()
    for name, tensor in layer.state_dict().items():
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.5, 1.5) if "norm" in name else torch.nn.init.normal_(tensor)
    return layer


def assert_same_gradients(output, expected, modules, hidden_states):
    inputs = [*(p for module in modules for p in module.parameters()), hidden_states]
    direction = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(2))
    found, literal = (torch.autograd.grad(each, inputs, direction) for each in (output, expected))
    for gradient, by_hand in zip(found, literal, strict=True):
        assert torch.allclose(gradient, by_hand, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_outputs_and_gradients_equal_algorithm_1(config):
    layer = layer_in_float64(config)
    pool = None
    if layer.expert_pool is None:
        pool = layer_in_float64(config, lambda config, _: ExpertPool(config, generations_of(config)))
    hidden_states = torch.randn(2, 4, config.hidden_size, dtype=torch.float64, requires_grad=True)
    output = layer(hidden_states, expert_pool=pool)
    expected = literal_peer(config, layer, hidden_states, pool)
    assert torch.allclose(output, expected, rtol=1e-10, atol=1e-10)
    assert_same_gradients(output, expected, [layer] if pool is None else [layer, pool], hidden_states)


@pytest.mark.parametrize("config", [c for name, c in ROUTERS.items() if "batch" in name or "softmax" in name])
def test_pkm_equals_brute_force(config):
    layer = layer_in_float64(config, PkmFeedForward)
    hidden_states = torch.randn(2, 4, config.hidden_size, dtype=torch.float64, requires_grad=True)
    expected = [
        sum(weights @ layer.values.weight[experts] for experts, weights in retrieve(config, layer.router, x))
        for x in hidden_states.flatten(0, -2)
    ]
    output, expected = layer(hidden_states), torch.stack(expected).view_as(hidden_states)
    assert torch.allclose(output, expected, rtol=1e-10)
    assert_same_gradients(output, expected, [layer], hidden_states)


def test_of_no_tokens():
    config = tiny_config()
    assert layer_in_float64(config)(torch.empty(0, 5, config.hidden_size, dtype=torch.float64)).shape == (
        0,
        5,
        config.hidden_size,
    )


def test_scores_are_computed_in_float32_whatever_the_dtype():
    config = tiny_config(num_experts=32**2, num_experts_per_head=8, query_norm=None)
    layer = layer_in_float64(config).bfloat16()
    hidden_states = torch.randn(1, 64, config.hidden_size).bfloat16()
    queries = layer.router.query_proj(hidden_states).float().view(64, 2, 2, -1)
    scores = torch.einsum("thpc,pnc->thpn", queries, layer.router.sub_keys[0].float())
    every_pair = scores[:, :, 0, :, None] + scores[:, :, 1, None, :]
    best = every_pair.flatten(-2).topk(8)
    size = scores.shape[-1]
    expected = expert_index(best.indices // size, best.indices % size).sort().values
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            indices, _ = layer.router(hidden_states)
        assert torch.equal(indices.view(64, 2, 8).sort().values, expected)
