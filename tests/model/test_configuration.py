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
"""Bad input is refused at once, with the field's name and the reason."""

import json
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from tiny_models import tiny_config

from modeling_peer import PeerConfig, PeerForCausalLM, PeerModel


REFUSED_VALUES = [
    ({"num_experts": 1000}, "`num_experts` must be a perfect square.*got 1000; the nearest are 961 and 1024"),
    ({"num_experts": 0}, "`num_experts` must be a perfect square"),
    ({"num_experts": 16, "num_experts_per_head": 5}, "`num_experts_per_head` must be at most √num_experts = 4.*got 5"),
    ({"query_size": 7}, "`query_size` must be even.*got 7"),
    ({"num_retrieval_heads": 0}, "`num_retrieval_heads` must be at least 1, got 0"),
    ({"num_experts_per_head": -1}, "`num_experts_per_head` must be at least 1, got -1"),
    ({"num_hidden_layers": 0, "feed_forward_types": []}, "`num_hidden_layers` must be at least 1, got 0"),
    ({"feed_forward_types": ["peer"]}, "`feed_forward_types` must name one variant for each.*2 layers, got 1"),
    ({"expert_act": "no_such"}, "`expert_act` is 'no_such', not one of the activations of Transformers"),
    ({"hidden_act": "no_such"}, "`hidden_act` is 'no_such'"),
    ({"num_key_value_heads": 3}, "`num_attention_heads` must be a multiple of `num_key_value_heads`, got 4 and 3"),
    ({"moe_num_experts": 2, "moe_num_experts_per_tok": 3}, "`moe_num_experts_per_tok` must be at most.*= 2, got 3"),
    ({"shared_expert_intermediate_size": 0}, "`shared_expert_intermediate_size` must be at least 1, got 0"),
    ({"num_key_value_heads": 0}, "`num_key_value_heads` must be at least 1, got 0"),
    ({"num_attention_heads": 0}, "`num_attention_heads` must be at least 1, got 0"),
    ({"vocab_size": 0}, "`vocab_size` must be at least 1, got 0"),
    ({"head_dim": 3}, "`head_dim` must be even.*got 3"),
    ({"initializer_range": 0.0}, "`initializer_range` must be positive and finite, got 0.0"),
    ({"expert_act": "prelu"}, "`expert_act` is 'prelu', an activation with parameters"),
    ({"format_version": 99}, "`format_version` is 99"),
    ({"initializer_range": math.nan}, "`initializer_range` must be positive and finite, got nan"),
    ({"expert_initializer_range": math.inf}, "`expert_initializer_range` must be positive and finite, got inf"),
    ({"rms_norm_eps": -1e-5}, "`rms_norm_eps` must be positive and finite, got -1e-05"),
    ({"attention_dropout": 1.5}, "`attention_dropout` must be a probability between 0 and 1, got 1.5"),
    ({"classifier_dropout": math.nan}, "`classifier_dropout` must be a probability between 0 and 1, got nan"),
    ({"router_aux_loss_coef": -0.1}, "`router_aux_loss_coef` must be at least 0 and finite, got -0.1"),
    ({"max_position_embeddings": 0}, "`max_position_embeddings` must be at least 1, got 0"),
    ({"rope_parameters": {"rope_type": "lienar", "factor": 2.0}}, "`rope_type`.*'default' or one of.*got 'lienar'"),
    ({"rope_parameters": {"type": "no_such"}}, "`rope_type` of `rope_parameters` must be.*got 'no_such'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "`rope_theta` of `rope_parameters`.*got -1.0"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "`rope_theta` of `rope_parameters`.*got 'x'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": True}}, "`rope_theta` of `rope_parameters`.*got True"),
    ({"pad_token_id": 64}, "`pad_token_id` must be `None` or within the vocabulary, from 0 to 63, got 64"),
    ({"pad_token_id": -1}, "`pad_token_id` must be `None` or within the vocabulary, from 0 to 63, got -1"),
]
REFUSED_TYPES = [
    ({"scoring_func": "tanh"}, "scoring_func"),
    ({"query_norm": "layer"}, "query_norm"),
    ({"moe_routing": "hash"}, "moe_routing"),
    ({"num_experts": "many"}, "num_experts"),
    ({"gated_experts": "yes"}, "gated_experts"),
    ({"feed_forward_types": "peer"}, "feed_forward_types"),
    ({"output_router_indices": "yes"}, "output_router_indices"),
    ({"num_experts": True}, "num_experts"),
    ({"pad_token_id": True}, "pad_token_id"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED_VALUES)
def test_values_that_cannot_work(fields, message, tmp_path):
    with pytest.raises(StrictDataclassClassValidationError, match=f"(?s){message}"):
        tiny_config("peer", "dense", **fields)

    # The same when they are loaded, and when they are set on a configuration that was right.
    good = tiny_config("peer", "dense").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(good | fields))
    with pytest.raises(StrictDataclassClassValidationError, match=f"(?s){message}"):
        PeerConfig.from_pretrained(tmp_path)
    config = tiny_config("peer", "dense")
    for name, value in fields.items():
        setattr(config, name, value)
    for action in (
        lambda: PeerModel(config),
        lambda: PeerForCausalLM(config),
        lambda: config.save_pretrained(tmp_path),
    ):
        with pytest.raises(StrictDataclassClassValidationError, match=f"(?s){message}"):
            action()


@pytest.mark.parametrize(("fields", "name"), REFUSED_TYPES)
def test_values_of_another_kind(fields, name):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"field '{name}'"):
        tiny_config("peer", "dense", **fields)
    config = tiny_config("peer", "dense")
    with pytest.raises(StrictDataclassFieldValidationError, match=f"field '{name}'"):
        setattr(config, name, fields[name])


UNKNOWN_NAMES = [
    (
        {"feed_forward_types": ["peer", "sparse"]},
        r"`feed_forward_types` names the unknown variant 'sparse'; known are \['dense', 'moe', 'peer', 'pkm'\]. "
        r"Register others with `FeedForwardInterface.register\(name, class\)` before the model is built.",
    ),
    (
        {"expert_kernels": "fast"},
        "`expert_kernels` is 'fast', neither 'auto' nor one of .*'eager'.*. "
        r"Register others with `ExpertKernelsInterface.register\(name, class\)` before the model is built.",
    ),
]


@pytest.mark.parametrize(("fields", "message"), UNKNOWN_NAMES, ids=["variant", "kernels"])
def test_names_that_are_not_registered(fields, message, tmp_path):
    """A configuration knows no registry: the model refuses them, before it allocates memory (here more than there is)."""
    config = tiny_config("peer", "dense", **fields, vocab_size=10**12)
    with pytest.raises(ValueError, match=message):
        PeerModel(config)
    with pytest.raises(ValueError, match=message):
        PeerForCausalLM(config)

    model = PeerForCausalLM(tiny_config("peer", "dense"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        PeerForCausalLM.from_pretrained(tmp_path, **fields)
    for name, value in fields.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed").exists()


def test_what_is_changed_at_load_is_checked_too(tmp_path):
    tiny_config("peer", "dense").save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassClassValidationError, match="`num_experts_per_head` must be at most"):
        PeerConfig.from_pretrained(tmp_path, num_experts_per_head=7)
    with pytest.raises(ValueError, match="`num_retrieval_heads` can be lowered at load, not raised"):
        PeerConfig.from_pretrained(tmp_path, num_retrieval_heads=3)
    with pytest.raises(StrictDataclassFieldValidationError, match="field 'num_retrieval_heads'"):
        PeerConfig.from_pretrained(tmp_path, num_retrieval_heads="2")


def test_the_former_name_of_the_cpu_kernels_loads(tmp_path):
    """In configurations, checkpoints and grafts of before it was renamed."""
    assert tiny_config(expert_kernels="native").expert_kernels == "cpu"
    model = PeerForCausalLM(tiny_config())
    model.save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"expert_kernels": "native"}))
    loaded = PeerForCausalLM.from_pretrained(tmp_path / "old")
    assert loaded.config.expert_kernels == loaded.model.layers[0].mlp.router.config.expert_kernels == "cpu"
    loaded.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["expert_kernels"] == "cpu"


def test_the_former_name_of_the_cpu_kernels_loads_in_grafts(tmp_path):
    from graft_models import base_model_of, grafted, grafts_of, logits_of
    from peft import PeftModel

    model = grafted()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"expert_kernels": "native"}))
    loaded = PeftModel.from_pretrained(base_model_of(), tmp_path).eval()
    assert [graft.config.expert_kernels for graft in grafts_of(loaded)] == ["cpu"]
    torch.testing.assert_close(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("value", [True, False])
def test_sparse_gradients_of_former_configurations_are_ignored(value, tmp_path):
    """The optimizer decides, and nothing is saved of the field."""
    assert not hasattr(PeerConfig(sparse_expert_gradients=value), "sparse_expert_gradients")
    model = PeerForCausalLM(tiny_config())
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = file.read_text()
    file.write_text(json.dumps(json.loads(written) | {"sparse_expert_gradients": value}))
    loaded = PeerForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    loaded.save_pretrained(tmp_path / "again")
    assert "sparse_expert_gradients" not in (tmp_path / "again" / "config.json").read_text()


def test_sparse_gradients_of_former_grafts_are_ignored(tmp_path):
    from graft_models import base_model_of, grafted, logits_of
    from peft import PeftModel

    model = grafted()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sparse_expert_gradients": True}))
    loaded = PeftModel.from_pretrained(base_model_of(), tmp_path).eval()
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_defaults_are_the_papers():
    config = PeerConfig()
    assert config.feed_forward_types == ["dense"] * 5 + ["peer"] + ["dense"] * 6
    assert (config.num_experts, config.num_retrieval_heads, config.num_experts_per_head) == (1024**2, 8, 16)
    assert config.num_experts_per_tok == 128
    assert (config.query_norm, config.scoring_func, config.sub_keys_per_head) == ("batch", "softmax", False)
    assert not config.gated_experts and config.shared_expert_intermediate_size is None


def test_only_models_with_moe_layers_have_a_balance_loss():
    assert PeerConfig().router_aux_loss_coef == 0
    assert PeerConfig(num_hidden_layers=2, feed_forward_types=["peer", "moe"]).router_aux_loss_coef == 0.001


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 12])
def test_the_middle_block_is_replaced(layers):
    types = PeerConfig(num_hidden_layers=layers).feed_forward_types
    assert types.count("peer") == 1
    assert types.index("peer") == (layers - 1) // 2


def test_kernels_that_a_built_model_does_not_know():
    model = PeerModel(tiny_config("peer", "dense"))
    model.config.expert_kernels = "troch"
    with pytest.raises(ValueError, match="`expert_kernels` is 'troch', neither 'auto' nor one of.*'torch'"):
        model(torch.tensor([[3]]))
