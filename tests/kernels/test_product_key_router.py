# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The number of experts per head, set on a live model: applied, or refused before anything is read."""

import pytest
import torch
from tiny_models import PROTECTED, random_tokens, tiny_config, tiny_model


@pytest.mark.parametrize("kernels", ["cpu", "torch", "eager"])
@pytest.mark.parametrize("name", ["peer", "pkm"])
def test_the_number_of_experts_per_head_is_applied(name, kernels):
    model, tokens = tiny_model(tiny_config(name, expert_kernels=kernels)), random_tokens(2, 5)
    other = tiny_model(tiny_config(name, expert_kernels=kernels, num_experts_per_head=5))
    other.load_state_dict(model.state_dict())
    assert not torch.equal(model(tokens).logits, other(tokens).logits)
    model.config.num_experts_per_head = 5
    assert model.model.layers[0].mlp.router(torch.randn(1, 4, 24))[0].shape == (1, 4, 2, 5)
    assert torch.equal(model(tokens).logits, other(tokens).logits)


def test_that_of_an_addition_stays():
    addition = PROTECTED | {"layers": [0]}
    model = tiny_model(tiny_config(expert_additions=[addition]))
    model.config.num_experts_per_head = 2
    layer = model.model.layers[0].mlp
    assert layer.router.num_experts_per_head == 2
    assert layer.added_routers[0].num_experts_per_head == PROTECTED["num_experts_per_head"] == 4
    model(random_tokens(2, 5))
