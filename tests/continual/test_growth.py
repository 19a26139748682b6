# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Growing a model leaves old experts and outputs what they were, to the bit in protected mode."""

import copy

import pytest
import torch
from grown_models import CONFIGS, SIZES, logits_of, train_a_little
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny_models import random_tokens, tiny_config, tiny_model
from torch.testing import assert_close
from trainer_worker import copy_of_state

from modeling_peer import (
    PeerForCausalLM,
    PeerForSequenceClassification,
    RowAdamW,
    add_experts,
    masked_experts,
    train_added_experts_only,
)
from modeling_peer.experts import expert_cell
from modeling_peer.optim.frozen_rows import freezes_of


# Each option of a grown layer once, for what does not depend on how these go together.
SOME_CONFIGS = ["shared pool", "gated, dense branch", "no norm, keys per head", "beside the others"]


@pytest.fixture(params=CONFIGS)
def model(request):
    return tiny_model(CONFIGS[request.param])


@pytest.fixture(params=SIZES)
def mode(request):
    return request.param


class TestProtected:
    def test_old_outputs_stay_to_the_bit_whatever_is_trained(self, model):
        """And all is trained of the new experts, their keys, queries and statistics; nothing of the old, nor of gates."""
        before, state = logits_of(model), copy_of_state(model)
        add_experts(model, 25)
        assert_close(logits_of(model), before, rtol=0, atol=1e-6)
        added = {n: t.clone() for n, t in model.state_dict().items() if n not in state and ".gate." not in n}
        assert all(p.requires_grad == (name in added) for name, p in model.named_parameters())
        train_a_little(model)
        assert not torch.equal(logits_of(model), before)
        with masked_experts(model):
            assert torch.equal(logits_of(model), before)
        after = model.state_dict()
        assert_close({name: after[name] for name in state}, state, rtol=0, atol=0)
        assert not any(torch.equal(after[name], tensor) for name, tensor in added.items())

    @pytest.mark.parametrize("query_norm", ["batch", "rms"])
    def test_starts_with_the_first_heads_and_their_norms(self, query_norm):
        model = tiny_model(tiny_config("peer", query_norm=query_norm))
        layer = model.model.layers[0].mlp
        for parameter in layer.router.query_norm.parameters():
            torch.nn.init.normal_(parameter)  # as if it had been trained
        if query_norm == "rms":
            torch.nn.init.normal_(layer.router.key_norm.weight)
        add_experts(model, 25, num_retrieval_heads=1)
        copied = layer.added_routers[0].state_dict()
        names = [name for name in layer.router.state_dict() if name != "sub_keys"]
        assert len(names) == {"batch": 6, "rms": 3}[query_norm]
        for name in names:
            tensor = layer.router.state_dict()[name]
            assert torch.equal(copied[name], tensor[:8] if tensor.ndim else tensor), name

    def test_has_a_budget_of_its_own(self):
        model = tiny_model(CONFIGS["two layers"])
        model(random_tokens(2, 20), output_router_indices=True)
        add_experts(model, 16, layers=2, num_retrieval_heads=1, num_experts_per_head=4)
        output = model(random_tokens(2, 20), output_router_indices=True, output_router_weights=True)
        old_0, old_2, new_2 = output.router_indices
        assert old_0.shape == old_2.shape == (2, 20, 2, 3) and new_2.shape == (2, 20, 1, 4)
        assert old_2.max() < 36 <= new_2.min() and new_2.max() < 52
        assert_close(output.router_weights[2].sum(-1), torch.ones(2, 20, 1))

    def test_adds_what_the_new_experts_say(self):
        """The layer's output is the old one, and Algorithm 1 on the new generation."""
        model = tiny_model(tiny_config("peer")).double()
        layer = model.model.layers[0].mlp
        hidden_states = torch.randn(1, 5, 24, dtype=torch.float64)
        before = layer(hidden_states)
        add_experts(model, 16)
        router, pool = layer.added_routers[0], layer.expert_pool.added[0]
        with torch.no_grad():
            pool.down_proj.weight.normal_()
        indices, weights = (tensor[0].flatten(1) for tensor in router(hidden_states))
        expected = before.clone()
        for token in range(5):
            x = hidden_states[0, token]
            for expert, weight in zip(indices[token] - 36, weights[token], strict=True):
                neuron = torch.nn.functional.gelu(pool.up_proj.weight[expert] @ x)
                expected[0, token] += weight * neuron * pool.down_proj.weight[expert]
        assert_close(layer(hidden_states), expected)

    def test_starts_silent_but_not_deaf(self):
        """No expert puts anything out, and every expert that is retrieved would learn to."""
        model = tiny_model(CONFIGS["one layer"])
        add_experts(model, 25)
        pool = model.model.layers[0].mlp.expert_pool.added[0]
        assert not pool.down_proj.weight.any() and pool.up_proj.weight.any(1).all()
        tokens = random_tokens(4, 20)
        model.train()(tokens, labels=tokens).loss.backward()
        assert pool.down_proj.weight.grad.any(1).float().mean() > 0.5


class TestOpen:
    def test_experts_keep_indices_and_rows(self, model):
        """And new ones put nothing out, but are not deaf."""
        old = {
            name: tensor.clone()
            for name, tensor in model.state_dict().items()
            if "expert_pool" in name or "router.sub_keys" in name
        }
        add_experts(model, 13, mode="open")
        for name, tensor in old.items():
            grown = model.state_dict()[name]
            if name.endswith("sub_keys") and grown.shape != tensor.shape:
                assert grown.shape[2] == 7 and torch.equal(grown[:, :, :6], tensor)
            elif "expert_pool" in name:
                assert grown.shape[0] == 49 and torch.equal(grown[:36], tensor)
                assert not grown[36:].any() if "down_proj" in name else grown[36:].any(1).all()
        row, column = expert_cell(torch.arange(36, 49))
        assert torch.equal(torch.maximum(row, column), torch.full((13,), 6))

    def test_new_keys_and_rows_are_drawn_at_scale(self):
        """Keys at that of the present ones, which training moved, and rows at that of initialization."""
        model = tiny_model(tiny_config("peer", num_experts=30**2))
        layer = model.model.layers[0].mlp
        layer.router.sub_keys.data.mul_(10)
        expected = layer.router.sub_keys.square().mean().sqrt().item()
        add_experts(model, 60**2 - 30**2, mode="open")
        assert layer.router.sub_keys[:, :, 30:].square().mean().sqrt().item() == pytest.approx(expected, rel=0.25)
        assert layer.expert_pool.up_proj.weight[30**2 :].std().item() == pytest.approx(0.3, rel=0.05)

    def test_without_the_new_experts_is_the_old_model(self, model):
        tokens = random_tokens(3, 30, seed=5)
        before = logits_of(model, tokens)
        add_experts(model, 13, mode="open")
        assert not torch.equal(logits_of(model, tokens), before)
        train_a_little(model)
        with masked_experts(model):
            assert torch.equal(logits_of(model, tokens), before)

    @pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, RowAdamW])
    def test_trains_the_new_rows_and_keys_alone(self, optimizer_class):
        model = tiny_model(CONFIGS["two layers"])
        add_experts(model, 13, mode="open")
        state = copy_of_state(model)
        train_a_little(model, optimizer_class=optimizer_class)
        for name, tensor in model.state_dict().items():
            if "expert_pool" in name:
                assert torch.equal(tensor[:36], state[name][:36]) and not torch.equal(tensor, state[name])
            elif name.endswith("router.sub_keys"):
                assert torch.equal(tensor[:, :, :6], state[name][:, :, :6]) and not torch.equal(tensor, state[name])
            else:
                assert torch.equal(tensor, state[name]), name

    def test_its_freeze_is_one_and_can_be_lifted(self):
        model = tiny_model(CONFIGS["shared pool"])
        add_experts(model, 13, mode="open")
        for _ in range(3):
            frozen = train_added_experts_only(model)
        table = model.model.expert_pool.up_proj
        assert len(freezes_of(table)) == 1 and frozen.num_frozen == {"layer_0": 36, "layer_2": 36}
        frozen.remove()
        before = table.weight.detach().clone()
        train_a_little(model)
        assert table.weight[:36].ne(before[:36]).any()


class TestGrownModel:
    def test_saves_loads_and_goes_on_training(self, model, mode, tmp_path):
        add_experts(model, SIZES[mode], mode=mode)
        train_a_little(model)
        model.save_pretrained(tmp_path)
        loaded = PeerForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.expert_additions == model.config.expert_additions
        assert torch.equal(logits_of(loaded), logits_of(model))
        with masked_experts(model), masked_experts(loaded):
            assert torch.equal(logits_of(loaded), logits_of(model))
        train_added_experts_only(loaded)
        for each in (model, loaded):
            train_a_little(each)
        assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)

    @pytest.mark.parametrize("model", SOME_CONFIGS, indirect=True)
    def test_grows_again(self, model, mode):
        before = logits_of(model)
        first = add_experts(model, SIZES[mode], mode=mode)
        train_a_little(model)
        between = logits_of(model)
        second = add_experts(model, {"protected": 9, "open": 15}[mode], mode=mode)
        train_a_little(model)
        for layer, experts in second.items():
            assert experts.start == first[layer].stop
        with masked_experts(model, next(iter(second.values())), layers=list(second)):
            assert torch.equal(logits_of(model), between)
        with masked_experts(model):
            assert torch.equal(logits_of(model), before)

    def test_is_protected_after_it_was_open(self, tmp_path):
        model = tiny_model(CONFIGS["two layers"])
        add_experts(model, 13, mode="open")
        train_a_little(model)
        before = logits_of(model)
        addition = add_experts(model, 16, layers=[2])
        assert addition == {2: range(49, 65)} and torch.equal(logits_of(model), before)
        train_a_little(model)
        with masked_experts(model, addition[2], layers=2):
            assert torch.equal(logits_of(model), before)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits_of(PeerForCausalLM.from_pretrained(tmp_path)), logits_of(model))

    def test_keeps_dtype_and_mode(self, mode):
        model = tiny_model(CONFIGS["two layers"]).to(torch.bfloat16).train()
        add_experts(model, SIZES[mode], mode=mode)
        assert model.training and {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        statistics = [b.dtype for n, b in model.named_buffers() if "added_routers" in n and "running_" in n]
        assert statistics == [torch.float32] * (4 if mode == "protected" else 0)
        assert logits_of(model).isfinite().all()

    def test_classifies(self, mode):
        torch.manual_seed(0)
        model = PeerForSequenceClassification(tiny_config("peer", pad_token_id=None)).eval()
        before = model(random_tokens(1, 9)).logits
        add_experts(model, SIZES[mode], mode=mode)
        assert torch.equal(model(random_tokens(1, 9)).logits, before) == (mode == "protected")
        with masked_experts(model):
            assert torch.equal(model(random_tokens(1, 9)).logits, before)


class TestRefusals:
    """What cannot be added is refused, and leaves the model as it was."""

    def assert_unchanged(self, model, state, config):
        assert model.config.to_dict() == config
        assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
        assert all(parameter.requires_grad for parameter in model.parameters())

    @pytest.mark.parametrize(
        "arguments",
        [
            {"num_experts": 24},
            {"num_experts": 12, "mode": "open"},
            {"num_experts": 25, "mode": "closed"},
            {"num_experts": 4},  # fewer than a head retrieves
            {"num_experts": 25, "layers": [0, 1]},
            {"num_experts": 25, "num_retrieval_heads": 3},
            {"num_experts": 13, "mode": "open", "num_experts_per_head": 2},
            {"num_experts": -25},
            {"num_experts": 0, "mode": "open"},
            {"num_experts": -11, "mode": "open"},
            {"num_experts": 25, "num_experts_per_head": 0},
            {"num_experts": 25, "num_retrieval_heads": 0},
        ],
    )
    def test_of_arguments(self, arguments):
        model = tiny_model(CONFIGS["two layers"])
        state, config = copy_of_state(model), copy.deepcopy(model.config.to_dict())
        with pytest.raises(ValueError):
            add_experts(model, **arguments)
        self.assert_unchanged(model, state, config)

    def test_of_what_does_not_go_together(self):
        with pytest.raises(ValueError, match="layers"):
            add_experts(tiny_model(CONFIGS["shared pool"]), 25, layers=0)
        model = tiny_model(CONFIGS["two layers"])
        with pytest.raises(ValueError, match="expert_additions"):
            train_added_experts_only(model)  # it never grew
        add_experts(model, 25, layers=0)
        with pytest.raises(ValueError, match="expert_additions"):
            add_experts(model, 13, mode="open")
        assert len(model.config.expert_additions) == 1
        assert add_experts(model, 13, layers=2, mode="open") == {2: range(36, 49)}

    @pytest.mark.parametrize(
        "make",
        [
            lambda: tiny_model(tiny_config("dense", "pkm")),
            lambda: inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny_model(CONFIGS["one layer"])),
            lambda: get_peft_model(tiny_model(CONFIGS["one layer"]), LoraConfig(target_modules=["q_proj"])),
        ],
        ids=["no PEER layer", "injected adapters", "adapters"],
    )
    def test_of_models_that_cannot_grow(self, make):
        model = make()
        with pytest.raises((TypeError, ValueError), match="PEER|Peer"):
            add_experts(model, 25)


def test_models_of_one_configuration_grow_by_themselves():
    config = tiny_config("peer")
    first, second = PeerForCausalLM(config), PeerForCausalLM(config)
    add_experts(first, 25)
    assert second.config.expert_additions is None and config.expert_additions is None
    assert all(module.config is first.config for module in first.modules() if hasattr(module, "config"))
    assert add_experts(second, 16) == {0: range(36, 52)}
