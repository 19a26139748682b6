# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Growing a model leaves old experts and outputs what they were, to the bit in protected mode."""

import pytest
import torch
from grown_models import CONFIGS, SIZES, logits_of, old_state, train_a_little
from tiny_models import random_tokens, tiny_config, tiny_model
from torch.testing import assert_close
from trainer_worker import counting_sequences, logged, trainer_of
from transformers import AutoModelForCausalLM

from modeling_peer import (
    PeerForCausalLM,
    PeerForSequenceClassification,
    RowAdamW,
    add_experts,
    expert_parameter_groups,
    masked_experts,
    train_added_experts_only,
)
from modeling_peer.experts import ExpertPool, expert_cell, retrieve
from modeling_peer.optim.frozen_rows import freezes_of
from modeling_peer.router import QueryBatchNorm


# Each option of a grown layer once, for what does not depend on how these go together.
SOME_CONFIGS = ["shared pool", "gated, dense branch", "no norm, keys per head", "beside the others"]


@pytest.fixture(params=CONFIGS)
def model(request):
    return tiny_model(CONFIGS[request.param])


@pytest.fixture(params=SIZES)
def mode(request):
    return request.param


class TestProtected:
    def test_leaves_outputs_as_they_were(self, model):
        before = logits_of(model)
        add_experts(model, 25)
        assert_close(logits_of(model), before, rtol=0, atol=1e-6)

    def test_old_outputs_stay_to_the_bit_whatever_is_trained(self, model):
        before, state = logits_of(model), old_state(model)
        add_experts(model, 25)
        train_a_little(model)
        assert not torch.equal(logits_of(model), before)
        with masked_experts(model):
            assert torch.equal(logits_of(model), before)
        for name, tensor in state.items():
            assert torch.equal(model.state_dict()[name], tensor), name

    def test_old_outputs_survive_even_broken_new_experts(self):
        model = tiny_model(CONFIGS["two layers"])
        before = logits_of(model)
        add_experts(model, 25)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.fill_(1e3)
        with masked_experts(model):
            assert torch.equal(logits_of(model), before)

    def test_trains_the_new_experts_their_keys_and_queries_alone(self, model):
        state = old_state(model)
        add_experts(model, 25)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        added = {name for name, _ in model.named_parameters() if name not in state}
        assert trainable == {name for name in added if ".gate." not in name}
        added = {name: tensor.clone() for name, tensor in model.named_parameters() if name in trainable}
        train_a_little(model)
        assert all(not torch.equal(model.get_parameter(name), tensor) for name, tensor in added.items())

    def test_trains_new_queries_on_their_own_statistics(self):
        model = tiny_model(CONFIGS["one layer"])
        add_experts(model, 25)
        old, new = [module for module in model.modules() if isinstance(module, QueryBatchNorm)]
        # What the old network knew of its queries is where the new one starts.
        layer = model.model.layers[0].mlp
        assert torch.equal(layer.added_routers[0].query_proj.weight, layer.router.query_proj.weight)
        assert torch.equal(new.running_mean, old.running_mean) and torch.equal(new.running_var, old.running_var)
        before = old.running_mean.clone()
        train_a_little(model)
        assert torch.equal(old.running_mean, before) and not torch.equal(new.running_mean, before)

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
        row, column = expert_cell(torch.arange(36, 49))
        assert torch.equal(torch.maximum(row, column), torch.full((13,), 6))

    def test_new_experts_start_silent_but_not_deaf(self, model):
        add_experts(model, 13, mode="open")
        pools = [module for module in model.modules() if isinstance(module, ExpertPool)]
        assert pools
        for pool in pools:
            assert not pool.down_proj.weight[36:].any() and pool.down_proj.weight[:36].any(1).all()
            assert pool.up_proj.weight[36:].any(1).all()

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
        before = logits_of(model)
        add_experts(model, 13, mode="open")
        train_a_little(model)
        with masked_experts(model):
            assert torch.equal(logits_of(model), before)

    @pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, RowAdamW])
    def test_trains_the_new_rows_and_keys_alone(self, optimizer_class):
        model = tiny_model(CONFIGS["two layers"])
        add_experts(model, 13, mode="open")
        state = old_state(model)
        train_a_little(model, optimizer_class=optimizer_class)
        for name, tensor in model.state_dict().items():
            if "expert_pool" in name:
                assert torch.equal(tensor[:36], state[name][:36]) and not torch.equal(tensor, state[name])
            elif name.endswith("router.sub_keys"):
                assert torch.equal(tensor[:, :, :6], state[name][:, :, :6]) and not torch.equal(tensor, state[name])
            else:
                assert torch.equal(tensor, state[name]), name

    def test_its_freeze_is_one_and_can_be_lifted(self):
        model = tiny_model(CONFIGS["one layer"])
        add_experts(model, 13, mode="open")
        for _ in range(3):
            frozen = train_added_experts_only(model)
        table = model.model.layers[0].mlp.expert_pool.up_proj
        assert len(freezes_of(table)) == 1 and frozen.num_frozen == {"layer_0": 36}
        frozen.remove()
        before = table.weight.detach().clone()
        train_a_little(model)
        assert table.weight[:36].ne(before[:36]).any()


class TestGrownModel:
    def test_saves_and_loads(self, model, mode, tmp_path):
        add_experts(model, SIZES[mode], mode=mode)
        train_a_little(model)
        model.save_pretrained(tmp_path)
        loaded = PeerForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.expert_additions == model.config.expert_additions
        assert torch.equal(logits_of(loaded), logits_of(model))
        with masked_experts(model), masked_experts(loaded):
            assert torch.equal(logits_of(loaded), logits_of(model))

    def test_loads_with_the_code_of_its_checkpoint(self, tmp_path):
        model = tiny_model(CONFIGS["two layers"])
        add_experts(model, 25)
        add_experts(model, 16)
        train_a_little(model)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
        assert torch.equal(logits_of(loaded), logits_of(model))

    @pytest.mark.parametrize("model", SOME_CONFIGS, indirect=True)
    def test_grows_again(self, model, mode):
        before = logits_of(model)
        first = add_experts(model, SIZES[mode], mode=mode)
        train_a_little(model)
        between = logits_of(model)
        second = add_experts(model, {"protected": 9, "open": 15}[mode], mode=mode)
        train_a_little(model)
        for layer, experts in second.experts.items():
            assert experts.start == first.experts[layer].stop
        with masked_experts(model, next(iter(second.experts.values())), layers=list(second.experts)):
            assert torch.equal(logits_of(model), between)
        with masked_experts(model):
            assert torch.equal(logits_of(model), before)

    def test_is_protected_after_it_was_open(self, tmp_path):
        model = tiny_model(CONFIGS["two layers"])
        add_experts(model, 13, mode="open")
        train_a_little(model)
        before = logits_of(model)
        addition = add_experts(model, 16, layers=[2])
        assert addition.experts == {2: range(49, 65)} and torch.equal(logits_of(model), before)
        train_a_little(model)
        with masked_experts(model, addition.experts[2], layers=2):
            assert torch.equal(logits_of(model), before)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits_of(PeerForCausalLM.from_pretrained(tmp_path)), logits_of(model))

    def test_goes_on_training_after_it_was_loaded(self, mode, tmp_path):
        model = tiny_model(CONFIGS["two layers"])
        add_experts(model, SIZES[mode], mode=mode)
        model.save_pretrained(tmp_path)
        loaded = PeerForCausalLM.from_pretrained(tmp_path)
        train_added_experts_only(loaded)
        for each in (model, loaded):
            train_a_little(each)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name

    @pytest.mark.parametrize(("mode", "by_rows"), [("protected", False), ("open", True)])
    def test_trains_in_the_stock_trainer(self, mode, by_rows, tmp_path):
        model = tiny_model(CONFIGS["two layers"])
        before, old = logits_of(model), old_state(model)
        add_experts(model, SIZES[mode], mode=mode)
        trainer = trainer_of(model, tmp_path, counting_sequences(64), max_steps=30, weight_decay=0.1)
        if by_rows:
            trainer.optimizer = RowAdamW(expert_parameter_groups(model, 1e-2, 0.1))
        trainer.train()
        losses = logged(trainer)
        assert sum(losses[-8:]) < sum(losses[:8])
        model.eval()
        with masked_experts(model):
            assert torch.equal(logits_of(model), before)
        assert torch.equal(model.get_input_embeddings().weight, old["model.embed_tokens.weight"])

    def test_keeps_dtype_and_mode(self, mode):
        model = tiny_model(CONFIGS["two layers"]).to(torch.bfloat16).train()
        add_experts(model, SIZES[mode], mode=mode)
        assert model.training and {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        statistics = []
        for name, buffer in model.named_buffers():
            if "added_routers" in name and "running_" in name:
                assert buffer.dtype == torch.float32, name
                statistics.append(name)
        assert len(statistics) == (4 if mode == "protected" else 0)
        assert logits_of(model).isfinite().all()

    def test_classifies(self, mode):
        model = PeerForSequenceClassification(tiny_config("peer", pad_token_id=None)).eval()
        before = model(random_tokens(1, 9)).logits
        add_experts(model, SIZES[mode], mode=mode)
        assert torch.equal(model(random_tokens(1, 9)).logits, before) == (mode == "protected")
        with masked_experts(model):
            assert torch.equal(model(random_tokens(1, 9)).logits, before)

    def test_has_every_expert_in_reach(self, mode):
        """Each new expert is the best for the query that is its own key."""
        model = tiny_model(CONFIGS["one layer"])
        (experts,) = add_experts(model, SIZES[mode], mode=mode).experts.values()
        layer = model.model.layers[0].mlp
        router = layer.added_routers[0] if mode == "protected" else layer.router
        row, column = expert_cell(torch.as_tensor(list(experts)) - router.generation.first_expert)
        keys = router.sub_keys[0]
        # Long enough to outdo any other key, along which no other is longer.
        unit = torch.nn.functional.normalize(keys, dim=-1)
        queries = torch.stack([unit[0, row], unit[1, column]], 1)[:, None]
        indices, _ = retrieve(queries, unit[None], 1)
        assert indices.flatten().tolist() == [each - router.generation.first_expert for each in experts]
