# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Masked experts take no part, and their places go to the best of the others."""

import copy

import pytest
import torch
from grown_models import CONFIGS, logits_of
from tiny_models import PROTECTED, random_tokens, tiny_config, tiny_model
from torch.testing import assert_close

from modeling_peer import masked_experts
from modeling_peer.analysis import expert_mask
from modeling_peer.experts import expert_cell, retrieve


class TestMask:
    @pytest.mark.parametrize("masked", [[0, 5, 7, 8, 20, 35], [5, 7, 8]], ids=["many", "few"])
    def test_equals_a_search_of_all_experts(self, masked, monkeypatch):
        """In several parts: five of the 14 queries of two heads at a time."""
        monkeypatch.setattr(expert_mask, "MASKED_SCORES", 5 * 2 * 36)
        model = tiny_model(tiny_config("peer", sub_keys_per_head=True)).double()
        router = model.model.layers[0].mlp.router
        hidden_states = torch.randn(2, 7, 24, dtype=torch.float64)
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

    @pytest.mark.parametrize("masked", [[0], [0, 5, 7], [0, 1, 2, 3, 35]])
    def test_masked_experts_are_last_where_all_scores_are_negative(self, masked):
        queries, sub_keys = torch.rand(9, 2, 2, 4), -torch.rand(1, 2, 6, 4)
        takes_part = torch.ones(36, dtype=torch.bool)
        takes_part[masked] = False
        indices, scores = expert_mask.retrieve_others(takes_part, retrieve, 0, len(masked), queries, sub_keys, 3)
        row, column = expert_cell(torch.arange(36))
        of_halves = torch.einsum("thpc,pnc->thpn", queries, sub_keys[0])
        of_all = of_halves[:, :, 0, row] + of_halves[:, :, 1, column]
        best = of_all.masked_fill(~takes_part, -torch.inf).topk(3)
        assert torch.equal(indices, best.indices)
        assert_close(scores, best.values)

    @pytest.mark.parametrize("kernels", ["torch", "cpu"])
    def test_is_the_same_with_any_kernels(self, kernels):
        """A grid smaller than k among the masks, and a generation masked as a whole."""
        model = tiny_model(tiny_config("peer", "dense", expert_additions=[{"layers": [0], **PROTECTED}]))
        for masked in (range(4, 36), range(9, 36), [3, 5], range(36)):
            model.config.expert_kernels = "eager"
            with masked_experts(model, masked):
                expected = logits_of(model)
            model.config.expert_kernels = kernels
            with masked_experts(model, masked):
                assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)

    def test_compiles(self):
        model = tiny_model(CONFIGS["one layer"])
        tokens = random_tokens(1, 8)
        with masked_experts(model, range(9, 36)), torch.no_grad():
            expected = model(tokens, use_cache=False).logits
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, use_cache=False).logits
        assert_close(compiled, expected, rtol=1e-4, atol=1e-4)

    def test_goes_when_it_ends_and_stays_in_a_copy(self):
        model = tiny_model(CONFIGS["two layers"])
        before = logits_of(model)
        with pytest.raises(KeyError), masked_experts(model, range(9, 36)):
            masked = logits_of(model)
            copied = copy.deepcopy(model)
            raise KeyError
        assert torch.equal(logits_of(model), before)
        assert torch.equal(logits_of(copied), masked) and not torch.equal(masked, before)

    def test_adds_to_an_outer_one_in_the_layers_that_are_named(self):
        model = tiny_model(CONFIGS["two layers"])
        with masked_experts(model, range(5)), masked_experts(model, range(5, 20), layers=2):
            first, second = model(random_tokens(2, 20), output_router_indices=True).router_indices
        assert 5 <= first.min() < 20 <= second.min()

    def test_is_in_all_layers_of_a_shared_pool_and_goes_after_an_error(self):
        model = tiny_model(tiny_config("peer", "dense", "peer", share_experts_across_layers=True))
        hidden_states = torch.randn(1, 200, 24)
        routers = [model.model.layers[layer].mlp.router for layer in (0, 2)]
        with pytest.raises(ZeroDivisionError), masked_experts(model, [3, 5]):
            assert not any(torch.isin(router(hidden_states)[0], torch.tensor([3, 5])).any() for router in routers)
            raise ZeroDivisionError
        assert all(torch.isin(router(hidden_states)[0], torch.tensor([3, 5])).any() for router in routers)

    def test_of_all_experts_leaves_the_rest_of_the_layer(self):
        """The dense branch, and of a PKM layer nothing."""
        model, pkm = tiny_model(CONFIGS["gated, dense branch"]), tiny_model(tiny_config("pkm"))
        layer = model.model.layers[0].mlp
        hidden_states = torch.randn(1, 4, 24)
        with masked_experts(model, range(36)), masked_experts(pkm, range(36)):
            assert torch.equal(layer(hidden_states), layer.shared_expert(hidden_states))
            assert not pkm.model.layers[0].mlp(hidden_states).any()

    @pytest.mark.parametrize(
        ("experts", "layers"),
        [([36], None), (range(34), None), ([0], 1), ([0.5], None), (torch.ones(35).bool(), None)],
    )
    def test_refuses(self, experts, layers):
        """Experts that there are not, too many for a head to retrieve k of the others, and a dense layer."""
        model = tiny_model(CONFIGS["two layers"])
        before = logits_of(model)
        with pytest.raises((ValueError, TypeError)), masked_experts(model, experts, layers=layers):
            pass
        assert torch.equal(logits_of(model), before)
