# Copyright 2026 The PEER for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The number of experts per head, set on a live model: applied, or refused before anything is read."""

import pytest
import torch
from tiny_models import PROTECTED, random_tokens, tiny_config, tiny_model

from modeling_peer import masked_experts


@pytest.mark.parametrize("kernels", ["cpu", "torch", "eager"])
@pytest.mark.parametrize("name", ["peer", "pkm"])
class TestNumExpertsPerHead:
    def test_it_is_applied(self, name, kernels):
        model, tokens = tiny_model(tiny_config(name, expert_kernels=kernels)), random_tokens(2, 5)
        other = tiny_model(tiny_config(name, expert_kernels=kernels, num_experts_per_head=5))
        other.load_state_dict(model.state_dict())
        assert not torch.equal(model(tokens).logits, other(tokens).logits)
        model.config.num_experts_per_head = 5
        assert model.model.layers[0].mlp.router(torch.randn(1, 4, 24))[0].shape == (1, 4, 2, 5)
        assert torch.equal(model(tokens).logits, other(tokens).logits)

    @pytest.mark.parametrize("k", [0, 7, 100])
    def test_more_than_sub_keys(self, name, kernels, k):
        model = tiny_model(tiny_config(name, expert_kernels=kernels))  # 36 experts
        model.config.num_experts_per_head = k
        for mode in (torch.enable_grad, torch.no_grad):
            with mode(), pytest.raises(ValueError, match=f"`num_experts_per_head`.*at most √num_experts = 6.*got {k}"):
                model(random_tokens(2, 5))


def test_on_a_router_it_is_refused():
    router = tiny_model(tiny_config()).model.layers[0].mlp.router
    with pytest.raises(ValueError, match="`num_experts_per_head` of a router.*got 100.*configuration"):
        router.num_experts_per_head = 100


def test_that_of_an_addition_stays():
    addition = PROTECTED | {"layers": [0]}
    model = tiny_model(tiny_config(expert_additions=[addition]))
    model.config.num_experts_per_head = 2
    layer = model.model.layers[0].mlp
    assert layer.router.num_experts_per_head == 2
    assert layer.added_routers[0].num_experts_per_head == PROTECTED["num_experts_per_head"] == 4
    model(random_tokens(2, 5))


def test_more_than_are_not_masked():
    model = tiny_model(tiny_config())
    with masked_experts(model, range(4, 36)):  # of 36, retrieving 3
        model(random_tokens(2, 5))
        model.config.num_experts_per_head = 5
        with pytest.raises(ValueError, match="`num_experts_per_head`.*not masked, 4, got 5"):
            model(random_tokens(2, 5))
