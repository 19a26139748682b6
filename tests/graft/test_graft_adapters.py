# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Grafts as adapters of PEFT: they train and save alone, come back to the bit, are switched, disabled and deleted."""

import copy

import pytest
import torch
from graft_models import (
    FAMILIES_AND_PLACEMENTS,
    PLACEMENTS,
    assert_same_state,
    base_model_of,
    graft_config,
    grafted,
    grafts_of,
    logits_of,
    state_of,
    trained,
)
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import random_tokens


class TestTraining:
    @pytest.mark.parametrize(("family", "placement"), FAMILIES_AND_PLACEMENTS)
    def test_moves_the_graft_alone_and_comes_back_to_the_bit(self, family, placement, tmp_path):
        fields = PLACEMENTS[placement]
        base_model = base_model_of(family)
        before = copy.deepcopy(base_model)
        base_logits = logits_of(base_model)
        model = grafted(base_model, **fields)
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trained(model)
        logits = logits_of(model)
        assert (logits - base_logits).abs().max() > 1e-3
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
        assert moved and all("peer_graft_layer" in name for name in moved)
        assert {"up_proj", "down_proj", "query_proj"} <= {part for name in moved for part in name.split(".")}
        assert any("sub_keys" in name for name in moved)
        assert fields.get("query_norm") != "batch" or any("running_var" in name for name in moved)
        with model.disable_adapter():
            assert torch.equal(logits_of(model), base_logits)
        assert torch.equal(logits_of(model), logits)

        model.save_pretrained(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert all(
            ".mlp.peer_graft_layer.router." in k or ".mlp.peer_graft_layer.expert_pool." in k or "output_bias" in k
            for k in saved
        )
        assert len(saved) == len(grafts_of(model)[0].state_dict())
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(copy.deepcopy(before), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
            assert torch.equal(logits_of(loaded.eval()), logits)
            assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.parameters())

    def test_goes_on_from_a_saved_adapter(self, tmp_path):
        model = trained(grafted(query_norm="batch"))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base_model_of(), tmp_path, is_trainable=True)
        assert torch.equal(logits_of(trained(loaded)), logits_of(trained(model)))

    def test_in_the_dtype_of_the_base_model_or_in_float32(self, tmp_path):
        tokens = random_tokens(2, 9)
        base_model = base_model_of(dtype=torch.bfloat16)
        before = logits_of(base_model)
        model = grafted(base_model, query_norm="batch")
        assert {parameter.dtype for parameter in grafts_of(model)[0].parameters()} == {torch.float32}
        assert torch.equal(logits_of(model), before)
        logits = logits_of(trained(model))
        assert logits.dtype == torch.bfloat16 and not torch.equal(logits, before)
        model.save_pretrained(tmp_path)
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(
                base_model_of(dtype=torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
            )
            assert torch.equal(logits_of(loaded.eval()), logits)
        narrow = get_peft_model(
            base_model_of(dtype=torch.bfloat16), graft_config(query_norm="batch"), autocast_adapter_dtype=False
        )
        graft = grafts_of(narrow)[0]
        assert {parameter.dtype for parameter in graft.parameters()} == {torch.bfloat16}
        assert graft.router.query_norm.running_var.dtype == torch.float32
        assert trained(narrow)(input_ids=tokens).logits.isfinite().all()
        assert graft.expert_pool.down_proj.weight.any()


class TestSeveralAdapters:
    def test_are_switched_added_up_and_deleted(self, tmp_path):
        model = trained(grafted(adapter_name="first"))
        torch.manual_seed(1)
        model.add_adapter("second", graft_config(num_experts=6**2, layers_to_transform=[1, 2], expert_act="relu"))
        first = logits_of(model)
        model.set_adapter("second")
        assert torch.equal(logits_of(model), logits_of(base_model_of()))
        trained(model)
        second = logits_of(model)
        assert not torch.equal(second, first)
        model.set_adapter("first")
        assert torch.equal(logits_of(model), first)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable and all(".first." in name for name in trainable)

        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base_model_of(), tmp_path / "first", adapter_name="one").eval()
        loaded.load_adapter(tmp_path / "second", adapter_name="other")
        assert torch.equal(logits_of(loaded), first)
        loaded.set_adapter("other")
        assert torch.equal(logits_of(loaded), second)
        loaded.base_model.set_adapter(["one", "other"])
        both = logits_of(loaded)
        assert not torch.equal(both, first) and not torch.equal(both, second)
        # One after the other, at layers that only one of them has, or that both have.
        hidden_states = torch.randn(1, 3, 24)
        layer = loaded.base_model.model.model.layers[1].mlp
        expected = layer.base_layer(hidden_states) + sum(
            graft(hidden_states) for graft in layer.peer_graft_layer.values()
        )
        torch.testing.assert_close(layer(hidden_states), expected)

        loaded.delete_adapter("one")
        assert torch.equal(logits_of(loaded), second)
        assert len(grafts_of(loaded)) == 2 and list(loaded.peft_config) == ["other"]
        assert list(layer.peer_graft_placement) == ["other"]

    def test_two_cannot_be_in_one_place(self):
        model = grafted(adapter_name="first", placement="in_place")
        model.add_adapter("second", graft_config(placement="in_place", layers_to_transform=[1]))
        model.add_adapter("elsewhere", graft_config(placement="in_place", layers_to_transform=[2]))
        logits = logits_of(model)
        for part in (model.base_model, model.base_model.model.model.layers[1].mlp):  # the library sets each layer
            with pytest.raises(ValueError, match=r"\['first', 'second'\]"):
                part.set_adapter(["first", "second"])
            assert torch.equal(logits_of(model), logits)
        before = state_of(model)
        with pytest.raises(ValueError, match=r"\['first', 'second'\]"):
            model.merge_and_unload(adapter_names=["first", "second"])
        assert_same_state(state_of(model), before)
        model.base_model.set_adapter(["first", "elsewhere"])
        assert not torch.equal(logits_of(model), logits)
        model.set_adapter("first")
        model.add_adapter("both", graft_config(placement="in_place", layers_to_transform=[0, 1]))
        with pytest.raises(ValueError, match=r"\['first', 'both'\]"):
            model.base_model.set_adapter(["first", "both"])
        assert torch.equal(logits_of(model), logits)

    def test_of_a_name_in_the_model_are_refused(self):
        names = {"mlp"}
        for fields in (*PLACEMENTS.values(), {"sub_keys_per_head": True}):
            graft = grafts_of(grafted("gpt2", **fields))[0]
            names |= {part for name in graft.state_dict() for part in name.split(".")}
        assert {"router", "output_bias", "gate_proj", "running_mean", "key_norm", "weight"} <= names
        for name in names:
            base_model = base_model_of()
            with pytest.raises(ValueError, match=f"`adapter_name` .*got '{name}'"):
                get_peft_model(base_model, graft_config(), adapter_name=name)
            assert_same_state(state_of(base_model), state_of(base_model_of()))

    def test_unloading_leaves_the_host(self):
        base_model = base_model_of()
        before = state_of(base_model)
        unloaded = trained(grafted(base_model)).unload()
        assert unloaded is base_model
        after = state_of(unloaded)
        assert_same_state((*after[:2], *before[2:4], *after[4:]), before)  # hooks of the decoder stay

    def test_adapters_of_rows_are_refused(self):
        model = grafted()
        for call in (model, model.generate):
            with pytest.raises(ValueError, match="adapter_names"):
                call(input_ids=random_tokens(2, 5), adapter_names=["default", "default"])


def test_the_configuration_says_what_was_found_in_the_host():
    config = grafted("gpt2", placement="in_place", init_from_ffn=True, num_experts=100).peft_config["default"]
    assert config.target_modules == {"transformer.h.1.mlp"}
    assert (config.expert_act, config.gated_experts) == ("gelu_new", False)
    assert (config.host_model_type, config.host_hidden_size, config.host_num_layers) == ("gpt2", 24, 3)
    assert (config.host_intermediate_size, config.host_has_biases) == (96, True)
