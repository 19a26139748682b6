# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The PEER layer against the literal Algorithm 1, in float64, outputs and gradients."""

import pytest
import torch
from literal_algorithm import literal_peer, retrieve
from tiny_models import EXPERTS, ROUTERS, tiny_config
from torch.nn import functional as F

from modeling_peer.configuration_peer import generations_of
from modeling_peer.experts import ExpertPool, expert_index
from modeling_peer.feed_forward import PeerFeedForward, PkmFeedForward


CONFIGS = {
    **ROUTERS,
    **EXPERTS,
    "large epsilon": tiny_config(rms_norm_eps=0.1),
    "ReLU in the branch": tiny_config(hidden_act="relu", shared_expert_intermediate_size=8),
}


def layer_in_float64(config, layer_class=PeerFeedForward):
    torch.manual_seed(0)
    layer = layer_class(config, 0).double().eval()
    for name, tensor in layer.state_dict().items():
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.5, 1.5) if "norm" in name else torch.nn.init.normal_(tensor)
    return layer


def gradients(output, modules, hidden_states):
    parameters = [p for module in modules for p in module.parameters()]
    direction = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad((output * direction).sum(), [*parameters, hidden_states])


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

    modules = [layer] if pool is None else [layer, pool]
    for gradient, literal in zip(
        gradients(output, modules, hidden_states), gradients(expected, modules, hidden_states), strict=True
    ):
        assert torch.allclose(gradient, literal, rtol=1e-9, atol=1e-9)


def test_every_retrieved_expert_and_sub_key_gets_a_gradient():
    config = tiny_config(num_experts=6**2)
    layer = layer_in_float64(config)
    hidden_states = torch.randn(64, 8, config.hidden_size, dtype=torch.float64)
    indices, _ = layer.router(hidden_states)
    layer(hidden_states).square().sum().backward()
    retrieved = torch.zeros(config.num_experts, dtype=torch.bool)
    retrieved[indices.flatten()] = True
    assert retrieved.all()  # with so many tokens every expert is reached
    for table in (layer.expert_pool.up_proj, layer.expert_pool.down_proj):
        assert table.weight.grad.abs().sum(-1).gt(0).all()
    assert layer.router.sub_keys.grad.abs().sum(-1).gt(0).all()


def test_with_one_expert_per_head_it_is_a_feed_forward_of_picked_neurons():
    config = tiny_config(num_experts_per_head=1, expert_act="relu")
    layer = layer_in_float64(config)
    hidden_states = torch.randn(3, 5, config.hidden_size, dtype=torch.float64)
    picked = layer.router(hidden_states)[0].squeeze(-1)  # [3, 5, heads]
    up, down = layer.expert_pool.up_proj.weight[picked], layer.expert_pool.down_proj.weight[picked]
    neurons = F.relu(torch.einsum("bsd,bshd->bsh", hidden_states, up))
    assert torch.allclose(layer(hidden_states), torch.einsum("bsh,bshd->bsd", neurons, down))


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
    for gradient, literal in zip(
        gradients(output, [layer], hidden_states), gradients(expected, [layer], hidden_states), strict=True
    ):
        assert torch.allclose(gradient, literal, rtol=1e-9, atol=1e-9)


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
