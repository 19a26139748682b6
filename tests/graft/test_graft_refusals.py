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
"""Grafts that do not fit are refused, and leave the base model as it was."""

import pytest
import torch
from graft_models import (
    assert_refused,
    assert_same_state,
    base_model_of,
    graft_config,
    grafted,
    logits_of,
    state_of,
    trained,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from modeling_peer.graft.model import PeerGraftConfig, PeerGraftLayer


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"layers_to_transform": [3]},
                r"`layers_to_transform` must be indices of layers, 0 to 2 in this base model, got \[3\]",
            ),
            ({"layers_to_transform": -1}, "`layers_to_transform` must be indices of layers"),
            ({"layers_to_transform": []}, "`layers_to_transform` must be indices of layers"),
            ({"target_modules": ["nothing"]}, "`target_modules` names no module"),
            ({"target_modules": ["self_attn"]}, r"`target_modules` names model.layers.1.self_attn, a LlamaAttention"),
            ({"target_modules": ["up_proj"]}, r"`target_modules` names model.layers.1.mlp.up_proj, a Linear"),
        ],
    )
    def test_of_layers(self, fields, message):
        assert_refused(base_model_of(), graft_config(**fields), message)

    def test_of_other_modules_than_models(self):
        with pytest.raises(
            ValueError, match="needs a base model of Transformers, a `PreTrainedModel`, got Sequential"
        ):
            get_peft_model(nn.Sequential(nn.Linear(2, 2)), PeerGraftConfig())

    def test_of_a_mixture_of_experts(self):
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        base_model = MixtralForCausalLM(
            MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, **sizes)
        )
        assert_refused(base_model, graft_config(), "layer 0, where 0 feed-forwards were recognized")
        assert_refused(
            base_model, graft_config(target_modules=["mlp"]), "a MixtralSparseMoeBlock, expected a feed-forward"
        )

    def test_of_a_feed_forward_without_a_module(self):
        base_model = OPTForCausalLM(
            OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2)
        )
        assert_refused(base_model, graft_config(), "layer 0, where 0 feed-forwards were recognized")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"num_experts": 60}, "`num_experts` must be a perfect square"),
            ({"num_experts_per_head": 9}, "`num_experts_per_head` must be at most √num_experts = 8"),
            ({"query_size": 7}, "`query_size` must be even"),
            ({"num_retrieval_heads": 0}, "`num_retrieval_heads` must be at least 1"),
            ({"query_norm": "layer"}, "query_norm"),
            ({"expert_act": "none"}, "`expert_act` is 'none'"),
            ({"expert_kernels": "fast"}, "`expert_kernels` is 'fast'"),
            ({"placement": "after"}, "`placement` must be one of"),
            ({"init_from_ffn": True}, '`init_from_ffn` needs `placement="in_place"`'),
            ({"target_modules": "mlp", "layers_to_transform": 1}, "`layers_to_transform` cannot be used"),
            ({"layers_pattern": "h"}, "`layers_pattern` needs `layers_to_transform`"),
            ({"layers_to_transform": ["1"]}, r"`layers_to_transform` must be the index .* got \['1'\]"),
            ({"layers_to_transform": True}, "`layers_to_transform` must be the index .* got True"),
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
            ("qwen3", {}, "`host_model_type` = 'llama', this one has 'qwen3'"),
            ("llama", {"num_hidden_layers": 4}, "`host_num_layers` = 3, this one has 4"),
            ("llama", {"hidden_size": 32}, "`host_hidden_size` = 24, this one has 32"),
            ("llama", {"intermediate_size": 40}, "`host_intermediate_size` = 32, this one has 40"),
            ("llama", {"mlp_bias": True}, "`host_has_biases` = False, this one has True"),
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

    def test_leaves_the_name_of_an_adapter_free(self, tmp_path):
        """Also where the library's own `load_adapter` injects it, which does not look after it."""
        for name, fields in (("fits", {}), ("other", {"hidden_size": 32})):
            trained(grafted(base_model_of(**fields))).save_pretrained(tmp_path / name)
        base_model = base_model_of()
        base_model.load_adapter(str(tmp_path / "fits"), adapter_name="one")
        with pytest.raises(ValueError, match="`host_hidden_size` = 32"):
            base_model.load_adapter(str(tmp_path / "other"), adapter_name="two")
        assert list(base_model.peft_config) == ["one"]
        expected = logits_of(PeftModel.from_pretrained(base_model_of(), tmp_path / "fits"))
        assert torch.equal(logits_of(base_model), expected)
        base_model.load_adapter(str(tmp_path / "fits"), adapter_name="two")

    @pytest.mark.parametrize("added", [False, True], ids=["first", "added"])
    def test_of_what_fails_on_the_way(self, added, monkeypatch):
        base_model = grafted(adapter_name="present", layers_to_transform=[0, 2]) if added else base_model_of()
        before, logits = state_of(base_model), logits_of(base_model)
        add_graft, calls = PeerGraftLayer.add_graft, []

        def fails_at_the_second(*args):
            calls.append(args)
            if len(calls) == 2:
                raise RuntimeError("out of memory")
            add_graft(*args)

        monkeypatch.setattr(PeerGraftLayer, "add_graft", fails_at_the_second)
        config = graft_config(layers_to_transform=[1, 2])
        with pytest.raises(RuntimeError, match="out of memory"):
            base_model.add_adapter("other", config) if added else get_peft_model(base_model, config)
        assert_same_state(state_of(base_model), before)
        assert torch.equal(logits_of(base_model), logits)

    def test_of_a_base_model_with_several_lists_of_layers(self):
        base_model = base_model_of()
        base_model.model.others = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
        assert_refused(base_model, graft_config(), r"has 2 lists .* = 3 layers, \['model.layers', 'model.others'\]")

    def test_of_adapters_of_another_method(self):
        model = grafted()
        with pytest.raises(ValueError, match="different peft types"):
            model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
