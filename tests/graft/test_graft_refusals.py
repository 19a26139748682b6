# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Grafts that do not fit are refused, and leave the base model as it was."""

import pytest
from graft_models import (
    assert_refused,
    assert_same_state,
    base_model_of,
    graft_config,
    grafted,
    state_of,
    trained,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from modeling_peer.graft.model import PeerGraftConfig


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"target_modules": ["nothing"]}, "`target_modules`"),
            ({"target_modules": ["self_attn"]}, "`target_modules`"),
            ({"target_modules": ["up_proj"]}, "`target_modules`"),
        ],
    )
    def test_of_layers(self, fields, message):
        assert_refused(base_model_of(), graft_config(**fields), message)

    @pytest.mark.parametrize("layers", [[3], -1])
    def test_of_layers_that_do_not_exist(self, layers):
        base_model = base_model_of()
        before = state_of(base_model)
        with pytest.raises(AttributeError, match=r"3|-1"):
            get_peft_model(base_model, graft_config(layers_to_transform=layers))
        assert_same_state(state_of(base_model), before)

    def test_of_other_modules_than_models(self):
        with pytest.raises(AttributeError, match="'Sequential' object has no attribute"):
            get_peft_model(nn.Sequential(nn.Linear(2, 2)), PeerGraftConfig())

    def test_of_a_mixture_of_experts(self):
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        base_model = MixtralForCausalLM(
            MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, **sizes)
        )
        assert_refused(base_model, graft_config(), "`layers_to_transform`")
        assert_refused(base_model, graft_config(target_modules=["mlp"]), "a MixtralSparseMoeBlock")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"num_experts": 60}, "`num_experts`"),
            ({"num_experts_per_head": 9}, "`num_experts_per_head`"),
            ({"query_size": 7}, "`query_size`"),
            ({"num_retrieval_heads": 0}, "`num_retrieval_heads`"),
            ({"query_norm": "layer"}, "query_norm"),
            ({"expert_act": "none"}, "`expert_act`"),
            ({"placement": "after"}, "`placement`"),
            ({"init_from_ffn": True}, "`init_from_ffn`"),
        ],
    )
    def test_of_values_when_the_configuration_is_made_or_used(self, fields, message):
        with pytest.raises(ValueError, match=message):
            graft_config(**fields)
        config = graft_config()
        for name, value in fields.items():
            setattr(config, name, value)
        assert_refused(base_model_of(), config, message)

    @pytest.mark.parametrize(
        ("family", "fields", "message"),
        [
            ("qwen3", {}, "host_model_type"),
            ("llama", {"num_hidden_layers": 4}, "host_num_layers"),
            ("llama", {"hidden_size": 32}, "host_hidden_size"),
            ("llama", {"intermediate_size": 40}, "host_intermediate_size"),
            ("llama", {"mlp_bias": True}, "host_has_biases"),
        ],
    )
    @pytest.mark.parametrize("added", [False, True], ids=["first", "added"])
    def test_of_adapters_of_another_host(self, tmp_path, family, fields, message, added):
        trained(grafted()).save_pretrained(tmp_path)
        base_model = base_model_of(family, **fields)
        if added:
            base_model = grafted(base_model, adapter_name="present")
        before = state_of(base_model)
        with pytest.raises(ValueError, match=message):
            base_model.load_adapter(tmp_path, "other") if added else PeftModel.from_pretrained(base_model, tmp_path)
        assert_same_state(state_of(base_model), before)

    def test_of_a_base_model_with_several_lists_of_layers(self):
        base_model = base_model_of()
        base_model.model.others = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
        assert_refused(base_model, graft_config(), "has 2 lists")

    def test_of_adapters_of_another_method(self):
        model = grafted()
        with pytest.raises(ValueError, match="different peft types"):
            model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
