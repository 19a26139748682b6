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
"""Masked experts take no part, and their places go to the best of the others."""

import pytest
import torch
from grown_models import CONFIGS, logits_of, train_a_little
from tiny_models import random_tokens, tiny_config, tiny_model
from torch.testing import assert_close

from modeling_peer import add_experts, masked_experts, product_key_retrieval
from modeling_peer.key_grid import expert_cell


class TestMask:
    def test_hands_places_to_the_best_of_the_others(self):
        model = tiny_model(CONFIGS["one layer"])
        tokens = random_tokens(2, 20)
        (before,) = model(tokens, output_router_indices=True).router_indices
        masked = before.flatten().bincount(minlength=36).topk(8).indices
        with masked_experts(model, masked):
            (indices,) = model(tokens, output_router_indices=True).router_indices
        assert not torch.isin(indices, masked).any()
        untouched = ~torch.isin(before, masked).any(-1)
        assert untouched.any() and torch.equal(indices[untouched], before[untouched])

    def test_equals_a_search_of_all_experts(self, monkeypatch):
        """In several parts: five of the 14 queries of two heads at a time."""
        monkeypatch.setattr(product_key_retrieval, "MASKED_SCORES", 5 * 2 * 36)
        model = tiny_model(tiny_config("peer", sub_keys_per_head=True)).double()
        router = model.model.layers[0].mlp.router
        hidden_states = torch.randn(2, 7, 24, dtype=torch.float64)
        masked = [0, 5, 7, 8, 20, 35]
        with masked_experts(model, masked):
            indices, weights = router(hidden_states)
        queries, sub_keys = router._normalized(router.query_proj(hidden_states), None, None)
        row, column = expert_cell(torch.arange(36))
        for batch, position, head in torch.cartesian_prod(torch.arange(2), torch.arange(7), torch.arange(2)):
            query = queries[batch, position, head]
            scores = sub_keys[head, 0, row] @ query[0] + sub_keys[head, 1, column] @ query[1]
            scores[masked] = -torch.inf
            best = scores.topk(3)
            assert torch.equal(indices[batch, position, head], best.indices)
            assert_close(weights[batch, position, head], best.values.softmax(-1))

    @pytest.mark.parametrize("kernels", ["eager", "torch", "cpu"])
    def test_is_the_same_with_any_kernels(self, kernels):
        """A grid smaller than k among the masks, and a generation masked as a whole."""
        model = tiny_model(CONFIGS["one layer"])
        add_experts(model, 25)
        train_a_little(model)
        for masked in (range(4, 36), range(9, 36), [3, 5], range(36)):
            model.config.expert_kernels = "eager"
            with masked_experts(model, masked):
                expected = logits_of(model)
            model.config.expert_kernels = kernels
            with masked_experts(model, masked):
                assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)

    def test_of_all_values_of_a_pkm_layer(self):
        model = tiny_model(tiny_config("pkm"))
        with masked_experts(model, range(36)):
            assert not model.model.layers[0].mlp(torch.randn(1, 4, 24)).any()

    def test_compiles(self):
        model = tiny_model(CONFIGS["one layer"])
        tokens = random_tokens(1, 8)
        with masked_experts(model, range(9, 36)), torch.no_grad():
            expected = model(tokens, use_cache=False).logits
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, use_cache=False).logits
        assert_close(compiled, expected, rtol=1e-4, atol=1e-4)

    def test_goes_when_it_ends(self):
        model = tiny_model(CONFIGS["two layers"])
        before = logits_of(model)
        with pytest.raises(KeyError), masked_experts(model, range(5)):
            assert not torch.equal(logits_of(model), before)
            raise KeyError
        assert torch.equal(logits_of(model), before)

    def test_adds_to_an_outer_one(self):
        model = tiny_model(CONFIGS["one layer"])
        with masked_experts(model, range(5)), masked_experts(model, range(5, 9)):
            (indices,) = model(random_tokens(2, 20), output_router_indices=True).router_indices
        assert indices.min() >= 9

    def test_is_of_the_layers_that_are_named(self):
        model = tiny_model(CONFIGS["two layers"])
        with masked_experts(model, range(20), layers=2):
            first, second = model(random_tokens(2, 20), output_router_indices=True).router_indices
        assert first.min() < 20 <= second.min()

    def test_of_all_experts_leaves_the_rest_of_the_layer(self):
        model = tiny_model(CONFIGS["gated, dense branch"])
        layer = model.model.layers[0].mlp
        hidden_states = torch.randn(1, 4, 24)
        with masked_experts(model, range(36)):
            assert torch.equal(layer(hidden_states), layer.shared_expert(hidden_states))

    def test_of_what_was_added_where_nothing_was(self):
        with pytest.raises(ValueError, match="No experts were added"), masked_experts(tiny_model(CONFIGS["rms"])):
            pass

    @pytest.mark.parametrize(
        ("experts", "layers", "message"),
        [
            ([36], None, r"has experts 0 to 35, .*\[36\]"),
            ([-1], None, r"\[-1\]"),
            (range(34), None, "leave 2 of .*layers.0.* to a router whose heads retrieve 3"),
            ([0], 1, r"some of \[0, 2\], the layers with experts, got \[1\]"),
        ],
    )
    def test_refuses(self, experts, layers, message):
        model = tiny_model(CONFIGS["two layers"])
        before = logits_of(model)
        with pytest.raises(ValueError, match=message), masked_experts(model, experts, layers=layers):
            pass
        assert torch.equal(logits_of(model), before)
