# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A user's own feed-forward variant, by name, in any layer, saved and loaded again; and the MoE baseline."""

import copy

import pytest
import torch
from tiny_models import random_tokens, tiny_config, tiny_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers import initialization as init
from transformers.activations import ACT2FN

from modeling_peer import FeedForwardInterface, PartCosts, PeerForCausalLM, model_costs


class ScaledFeedForward(nn.Module):
    """A variant with a parameter of its own, that tells what it was called with."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.scale = nn.Parameter(torch.empty(config.hidden_size))

    def init_own_weights(self):
        init.constant_(self.scale, 3.0)

    @staticmethod
    def count_costs(config, layer_idx):
        size = config.hidden_size**2
        return PartCosts(2 * size, size + 2 * config.hidden_size, size + 2 * config.hidden_size)

    def forward(self, hidden_states, padding_mask=None, **kwargs):
        self.seen = {"padding_mask": padding_mask, **kwargs}
        return F.relu(self.proj(hidden_states)) * self.scale


def test_a_registered_variant_stands_in_any_layer(tmp_path):
    """And gets the padding mask and the forward pass."""
    FeedForwardInterface.register("scaled", ScaledFeedForward)
    model = tiny_model(tiny_config("peer", "scaled", "dense", "scaled"))
    first, last = (layer.mlp for layer in model.model.layers[1::2])
    assert type(first) is type(last) is ScaledFeedForward
    assert (first.layer_idx, last.layer_idx) == (1, 3)
    assert (first.scale == 3).all()

    nn.init.normal_(first.scale)
    tokens, mask = random_tokens(2, 6), torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    logits = model(tokens, attention_mask=mask).logits
    assert torch.equal(last.seen["padding_mask"], mask)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.feed_forward_types == ["peer", "scaled", "dense", "scaled"]
    assert torch.equal(loaded(tokens, attention_mask=mask).logits, logits)
    assert model_costs(model.config).parameters == model.num_parameters()

    model.train()(tokens)
    assert last.seen["forward_pass"].learns and last.seen["forward_pass"].has_ended
    with torch.no_grad():
        model(tokens)
    assert not last.seen["forward_pass"].learns


class TestMoe:
    def experts_one_by_one(self, layer, x, indices, weights):
        experts, output = layer.experts, torch.zeros_like(x)
        activation = ACT2FN[experts.config.hidden_act]
        for token in range(len(x)):
            for expert, weight in zip(indices[token], weights[token], strict=True):
                gate, up = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
                output[token] += weight * (experts.down_proj[expert] @ (activation(gate) * up))
        return output

    def layer(self, **fields):
        config = tiny_config("moe", moe_num_experts=4, **fields)
        layer = tiny_model(config).model.layers[0].mlp.double()
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        return layer

    @pytest.mark.parametrize("hidden_act", ["silu", "relu"])
    @pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
    def test_token_choice_equals_one_expert_at_a_time(self, implementation, hidden_act):
        layer = self.layer(hidden_act=hidden_act).float()
        layer.experts.config = copy.deepcopy(layer.experts.config)
        layer.experts.config._experts_implementation = implementation
        x = torch.randn(3, 5, 24, requires_grad=True)
        probabilities = (x.flatten(0, 1) @ layer.gate.weight.T).softmax(-1)
        weights, indices = probabilities.topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        expected = self.experts_one_by_one(layer, x.flatten(0, 1), indices, weights)
        output = layer(x).flatten(0, 1)
        assert torch.allclose(output, expected, rtol=1e-4, atol=1e-3)
        inputs, direction = [*layer.parameters(), x], torch.randn(15, 24)
        for gradient, literal in zip(
            torch.autograd.grad(output, inputs, direction),
            torch.autograd.grad(expected, inputs, direction),
            strict=True,
        ):
            assert torch.allclose(gradient, literal, rtol=1e-3, atol=1e-3 * literal.abs().max().item())

    def test_expert_choice_trains_by_expert_and_evaluates_by_token(self):
        layer = self.layer(moe_routing="expert_choice")
        layer.experts.config._experts_implementation = "eager"
        x, padding_mask = torch.randn(2, 8, 24).double(), torch.ones(2, 8, dtype=torch.long)
        padding_mask[1, 4:] = 0
        by_token = copy.deepcopy(layer)
        by_token.expert_choice = False
        assert torch.equal(layer.eval()(x, padding_mask), by_token.eval()(x, padding_mask))

        probabilities = (x.flatten(0, 1) @ layer.gate.weight.T).softmax(-1) * padding_mask.flatten()[:, None]
        chosen = torch.zeros(16, 4, dtype=torch.bool)
        for expert in range(4):  # each takes 16 tokens · 2 / 4 experts = 8 of 12 tokens
            chosen[probabilities[:, expert].topk(8).indices, expert] = True
        assert not chosen[12:].any()  # padding is never chosen
        weights = probabilities * chosen
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
        everything = torch.arange(4).expand(16, 4)
        expected = self.experts_one_by_one(layer, x.flatten(0, 1), everything, weights)
        assert torch.allclose(layer.train()(x, padding_mask).flatten(0, 1), expected, rtol=1e-4, atol=1e-4)

    def test_an_expert_chooses_at_least_one_token(self):
        layer = self.layer(moe_routing="expert_choice").float().train()
        assert layer(torch.randn(1, 1, 24)).any()  # one token · 2 / 4 experts is less than one

    def test_the_balance_loss_reaches_the_router(self):
        model = PeerForCausalLM(tiny_config("moe", "dense", output_router_logits=True, router_aux_loss_coef=0.5))
        tokens = random_tokens(2, 8)
        output = model(tokens, labels=tokens)
        plain = model(tokens, labels=tokens, output_router_logits=False)
        assert plain.aux_loss is None
        assert torch.allclose(output.loss, plain.loss + 0.5 * output.aux_loss)
        (gradient,) = torch.autograd.grad(output.aux_loss, model.model.layers[0].mlp.gate.weight)
        assert gradient.abs().sum() > 0

    def test_padding_is_left_out_of_the_balance_loss(self):
        model = tiny_model(tiny_config("moe", output_router_logits=True))
        tokens = random_tokens(1, 6)
        padded = torch.cat([tokens, torch.zeros(1, 4, dtype=torch.long)], dim=1)
        balance = model(padded, attention_mask=(padded != 0).long()).aux_loss
        assert torch.allclose(balance, model(tokens).aux_loss)
        causal = (padded != 0)[:, None, None] & torch.ones(10, 10, dtype=torch.bool).tril()
        assert torch.allclose(balance, model(padded, attention_mask=causal, padding_mask=padded != 0).aux_loss)
        assert not torch.allclose(balance, model(padded).aux_loss, atol=1e-4)
