# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Bad input is refused at once, with the field's name and the reason."""

import json
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from tiny_models import random_tokens, tiny_config, tiny_model

from modeling_peer import PeerConfig, PeerForCausalLM, PeerModel


REFUSED_VALUES = [
    {"num_experts": 1000},
    {"num_experts": 0},
    {"num_experts_per_head": 7},
    {"query_size": 7},
    {"num_retrieval_heads": 0},
    {"num_experts_per_head": -1},
    {"num_hidden_layers": 0, "feed_forward_types": []},
    {"feed_forward_types": ["peer"]},
    {"expert_act": "no_such"},
    {"expert_act": "prelu"},
    {"hidden_act": "no_such"},
    {"moe_num_experts_per_tok": 5},
    {"num_key_value_heads": 0},
    {"head_dim": 3},
    {"format_version": 99},
    {"initializer_range": math.nan},
    {"expert_initializer_range": math.inf},
    {"rms_norm_eps": -1e-5},
    {"pad_token_id": 64},
]
REFUSED_TYPES = [
    {"scoring_func": "tanh"},
    {"query_norm": "layer"},
    {"moe_routing": "hash"},
    {"num_experts": "many"},
    {"gated_experts": "yes"},
    {"feed_forward_types": "peer"},
]


@pytest.mark.parametrize("fields", REFUSED_VALUES, ids=str)
def test_values_that_cannot_work(fields, tmp_path):
    """When they are given, when they are loaded, and when they are set on a configuration that was right."""
    name = f"`{next(iter(fields))}`"
    with pytest.raises(StrictDataclassClassValidationError, match=name):
        tiny_config("peer", "dense", **fields)
    good = tiny_config("peer", "dense").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(good | fields))
    with pytest.raises(StrictDataclassClassValidationError, match=name):
        PeerConfig.from_pretrained(tmp_path)
    config = tiny_config("peer", "dense")
    for field, value in fields.items():
        setattr(config, field, value)
    with pytest.raises(StrictDataclassClassValidationError, match=name):
        PeerModel(config)


@pytest.mark.parametrize("fields", REFUSED_TYPES, ids=str)
def test_values_of_another_kind(fields):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(fields))):
        tiny_config("peer", "dense", **fields)


def test_a_variant_that_is_not_registered(tmp_path):
    config = tiny_config("peer", "sparse")
    with pytest.raises(ValueError, match="'sparse'"):
        PeerModel(config)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'sparse'"):
        PeerForCausalLM(PeerConfig.from_pretrained(tmp_path))


def test_kernels_that_are_not_registered_are_the_fastest():
    """A checkpoint may name some that are not there where it is loaded."""
    tokens = random_tokens(2, 5)
    expected = tiny_model(tiny_config("peer", "dense"))(tokens).logits
    assert torch.equal(tiny_model(tiny_config("peer", "dense", expert_kernels="theirs"))(tokens).logits, expected)


def test_what_is_changed_at_load_is_checked_too(tmp_path):
    tiny_config("peer", "dense").save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassClassValidationError, match="`num_experts_per_head` must be at most"):
        PeerModel(PeerConfig.from_pretrained(tmp_path, num_experts_per_head=7))
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


@pytest.mark.parametrize("fields", [{"sparse_expert_gradients": True}, {"expert_kernels": "native"}], ids=str)
def test_fields_of_former_grafts_load(fields, tmp_path):
    from graft_models import base_model_of, grafted, logits_of
    from peft import PeftModel

    model = grafted()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    loaded = PeftModel.from_pretrained(base_model_of(), tmp_path).eval()
    torch.testing.assert_close(logits_of(loaded), logits_of(model))


def test_sparse_gradients_of_former_configurations_are_ignored():
    """The optimizer decides."""
    assert not hasattr(PeerConfig(sparse_expert_gradients=True), "sparse_expert_gradients")


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


@pytest.mark.parametrize("layers", [1, 2, 12])
def test_the_middle_block_is_replaced(layers):
    types = PeerConfig(num_hidden_layers=layers).feed_forward_types
    assert types.count("peer") == 1
    assert types.index("peer") == (layers - 1) // 2
