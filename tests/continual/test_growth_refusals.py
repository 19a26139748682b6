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
"""What cannot be added is refused, and leaves the model as it was."""

import copy
import itertools

import pytest
import torch
from grown_models import CONFIGS, SIZES, logits_of, old_state
from huggingface_hub.errors import StrictDataclassClassValidationError
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny_models import tiny_config, tiny_model

from modeling_peer import PeerForCausalLM, add_experts, masked_experts, train_added_experts_only
from modeling_peer.expert_table import ExpertTable
from modeling_peer.feed_forward_peer import ExpertPool
from modeling_peer.product_key_router import AddedRouter, ProductKeyRouter


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_experts": 24}, "perfect square.*got 24"),
            ({"num_experts": 12, "mode": "open"}, "12 experts makes 48 in layer 0: .*nearest are 36 and 49"),
            ({"num_experts": 25, "mode": "closed"}, r"\('protected', 'open'\), got 'closed'"),
            ({"num_experts": 4}, "at most √num_experts = 2, got 3"),
            ({"num_experts": 25, "layers": [0, 1]}, r"PEER layers \[0, 2\], got \[1\]"),
            ({"num_experts": 25, "num_retrieval_heads": 3}, "at most 2, .*got 3"),
            (
                {"num_experts": 13, "mode": "open", "num_experts_per_head": 2},
                "are for protected experts, .* got {'num_retrieval_heads': None, 'num_experts_per_head': 2}",
            ),
            ({"num_experts": -25}, "got -25"),
            ({"num_experts": True, "num_experts_per_head": 1}, "integer of at least 1, got True"),
            ({"num_experts": 25, "num_retrieval_heads": 0}, "`num_retrieval_heads` .* at least 1, got 0"),
            ({"num_experts": 25, "layers": [False]}, r"`layers` must be a layer index, .* got \[False\] \(list\)"),
            ({"num_experts": 25, "layers": [0.0]}, r"`layers` must be a layer index, .* got \[0.0\] \(list\)"),
            ({"num_experts": 25, "layers": 1.0}, r"`layers` must be a layer index, .* got 1.0 \(float\)"),
            ({"num_experts": 25, "layers": True}, r"`layers` must be a layer index, .* got True \(bool\)"),
            ({"num_experts": 25, "layers": "1"}, r"`layers` must be a layer index, .* got '1' \(str\)"),
            ({"num_experts": 25, "inputs": "text"}, "`inputs` must be token ids, .* got 'text'"),
            ({"num_experts": 25, "inputs": torch.zeros(2, 3)}, r"`inputs` .* got torch.float32 of shape \(2, 3\)"),
            ({"num_experts": 25, "inputs": torch.tensor([[1, -1]])}, "`inputs` .*, from -1 to 1"),
        ],
    )
    def test_leave_the_model_as_it_was(self, arguments, message):
        model = tiny_model(CONFIGS["two layers"])
        state, config = old_state(model), copy.deepcopy(model.config.to_dict())
        with pytest.raises(ValueError, match=message):
            add_experts(model, **arguments)
        assert model.config.to_dict() == config
        after = old_state(model)
        assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)
        assert all(parameter.requires_grad for parameter in model.parameters())

    @pytest.mark.parametrize("mode", ["protected", "open"])
    def test_a_model_with_masked_experts(self, mode):
        model = tiny_model(CONFIGS["two layers"])
        config = copy.deepcopy(model.config.to_dict())
        with masked_experts(model, [3]), pytest.raises(ValueError, match="while some are masked"):
            add_experts(model, 25 if mode == "protected" else 13, mode=mode)
        assert model.config.to_dict() == config

    # Two pools and two routers in turn, or four tables and the keys of two routers.
    @pytest.mark.parametrize(
        ("mode", "number"), [("protected", number) for number in range(4)] + [("open", number) for number in range(6)]
    )
    def test_memory_that_is_not_there(self, mode, number, monkeypatch):
        """The allocation of the n-th new part fails."""
        model = tiny_model(CONFIGS["two layers"])
        before, state, config = logits_of(model), old_state(model), copy.deepcopy(model.config.to_dict())
        calls = itertools.count()

        def failing(method):
            def call(*args, **kwargs):
                if next(calls) == number:
                    raise RuntimeError("out of memory")
                return method(*args, **kwargs)

            return call

        for owner, name in (
            (ExpertTable, "append_rows"),
            (ProductKeyRouter, "enlarge"),
            (ExpertPool, "__init__"),
            (AddedRouter, "__init__"),
        ):
            monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
        with pytest.raises(RuntimeError, match="out of memory"):
            add_experts(model, SIZES[mode], mode=mode)
        monkeypatch.undo()
        after = old_state(model)
        assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)
        assert torch.equal(logits_of(model), before) and model.config.to_dict() == config
        assert add_experts(model, SIZES[mode], mode=mode).experts[2].start == 36

    def test_models_of_one_configuration(self):
        config = tiny_config("peer")
        first, second = PeerForCausalLM(config), PeerForCausalLM(config)
        add_experts(first, 25)
        assert second.config.expert_additions is None and config.expert_additions is None
        assert all(module.config is first.config for module in first.modules() if hasattr(module, "config"))
        assert add_experts(second, 16).experts == {0: range(36, 52)}
        second.config.expert_additions = None
        with pytest.raises(ValueError, match="not how layer 0 grew"):
            add_experts(second, 16)

    def test_no_peer_layer(self):
        model = tiny_model(tiny_config("dense", "pkm"))
        with pytest.raises(ValueError, match="PeerForCausalLM has no PEER layer"):
            add_experts(model, 25)

    def test_a_model_with_injected_adapters(self):
        model = inject_adapter_in_model(LoraConfig(target_modules=["query_proj"]), tiny_model(CONFIGS["one layer"]))
        with pytest.raises(ValueError, match="without adapters: merge or unload"):
            add_experts(model, 25)

    def test_a_model_with_adapters(self):
        model = get_peft_model(tiny_model(CONFIGS["one layer"]), LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="got a PeftModel.* merge or unload them first"):
            add_experts(model, 25)

    def test_one_of_the_layers_of_a_shared_pool(self):
        model = tiny_model(CONFIGS["shared pool"])
        with pytest.raises(ValueError, match=r"all PEER layers \[0, 2\], as they share one pool"):
            add_experts(model, 25, layers=0)

    def test_open_after_protected(self):
        model = tiny_model(CONFIGS["one layer"])
        add_experts(model, 25)
        with pytest.raises(ValueError, match="open addition after a protected one"):
            add_experts(model, 13, mode="open")
        assert len(model.config.expert_additions) == 1
        other = tiny_model(CONFIGS["two layers"])
        add_experts(other, 25, layers=0)
        assert add_experts(other, 13, layers=2, mode="open").experts == {2: range(36, 49)}

    def test_a_model_that_never_grew(self):
        with pytest.raises(ValueError, match="No experts were added"):
            train_added_experts_only(tiny_model(CONFIGS["one layer"]))

    @pytest.mark.parametrize(
        ("addition", "message"),
        [
            ({"layers": [1], "mode": "open", "num_experts": 13}, r"PEER layers \[0\], got \[1\]"),
            ({"layers": [False], "mode": "open", "num_experts": 13}, r"PEER layers \[0\], got \[False\]"),
            ({"layers": 0, "mode": "open", "num_experts": 13}, r"must be a list of some of .*, got 0"),
            ({"layers": [0], "mode": "protected", "num_experts": 25}, "has the fields"),
            ({"layers": [0], "mode": "open", "num_experts": "13"}, "must be an integer of at least 1, got .13."),
        ],
    )
    def test_a_configuration_that_nothing_made(self, addition, message):
        with pytest.raises(StrictDataclassClassValidationError, match=message):
            tiny_config("peer", "dense", expert_additions=[addition])
