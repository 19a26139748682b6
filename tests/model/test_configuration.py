# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Configurations: bad input is refused at once, with the field's name and the reason; the named ones load, say only what
they mean, and are found in a checkout.
"""

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from tiny_models import random_tokens, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_peer import PeerConfig, PeerForCausalLM, PeerModel, configuration_path, list_configurations, model_costs
from studies.common.training_plan import Run, configuration_of
from studies.recipe.plan import RECIPE, RecipePlan


REFUSED_VALUES = [
    {"num_experts": 1000},
    {"num_experts": 0},
    {"num_experts_per_head": 7},
    {"query_size": 7},
    {"head_dim": 0},
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


@pytest.mark.parametrize(
    ("fields", "layers"), [({}, 12), ({"num_hidden_layers": 1}, 1), ({"num_hidden_layers": 2}, 2)]
)
def test_defaults_are_the_papers(fields, layers):
    config, middle = PeerConfig(**fields), (layers - 1) // 2
    assert config.feed_forward_types == ["dense"] * middle + ["peer"] + ["dense"] * (layers - 1 - middle)
    assert (config.num_experts, config.num_retrieval_heads, config.num_experts_per_head) == (1024**2, 8, 16)
    assert config.num_experts_per_tok == 128
    assert (config.query_norm, config.scoring_func, config.sub_keys_per_head) == ("batch", "softmax", False)
    assert not config.gated_experts and config.shared_expert_intermediate_size is None
    assert config.router_aux_loss_coef == 0


def test_defaults_of_moe_layers():
    """Only models that have some get a balance loss; the experts of a token are as wide as a dense layer."""
    config = PeerConfig(num_hidden_layers=2, feed_forward_types=["peer", "moe"], moe_num_experts_per_tok=4)
    assert config.router_aux_loss_coef == 0.001 and 4 * config.moe_intermediate_size == config.intermediate_size


CHECKOUT = Path(__file__).parents[2]
RECIPE_SIZES = ("nano", "toy", "laptop", "gpu")
NAMES = sorted(
    [
        *(f"{each}-{size}" for each in ("dense", "peer") for size in RECIPE_SIZES),
        "pkm-toy",
        *(f"{each}-{size}" for each in ("dense", "moe", "peer", "pkm") for size in ("paper", "tiny")),
    ]
)


def test_named_configurations_are_listed():
    assert list_configurations() == NAMES
    with pytest.raises(ValueError, match="peer-huge"):
        configuration_path("peer-huge")


@pytest.mark.parametrize("name", NAMES)
def test_named_configurations(name):
    """The variant in its blocks, no field that the configuration has not, and a model with the parameters counted."""
    config = AutoConfig.from_pretrained(configuration_path(name))
    assert type(config) is PeerConfig and config.architectures == ["PeerForCausalLM"]
    variant, size = name.split("-")
    last = config.num_hidden_layers - 1
    blocks = range(last + 1) if size in RECIPE_SIZES else (last // 2,)
    assert config.feed_forward_types == [variant if block in blocks else "dense" for block in range(last + 1)]
    written = json.loads((Path(configuration_path(name)) / "config.json").read_text())
    assert written.pop("model_type") == "peer"
    assert set(written) <= {field.name for field in fields(PeerConfig)} - {"transformers_version"}
    assert {field: getattr(config, field) for field in written} == written
    with torch.device("meta" if size in ("paper", "gpu", "laptop") else "cpu"):  # without memory for large ones
        model = AutoModelForCausalLM.from_config(config)
    assert type(model) is PeerForCausalLM
    assert model.num_parameters() == model_costs(config).parameters


def test_pkm_toy_costs_what_peer_toy_does():
    pkm, peer = (model_costs(PeerConfig.from_pretrained(configuration_path(f"{v}-toy"))) for v in ("pkm", "peer"))
    assert (pkm.flops, pkm.active_parameters) == (peer.flops, peer.active_parameters)
    assert pkm.parameters < peer.parameters  # a value where PEER has two vectors


def test_sizes_of_the_paper():
    """Set-up of the paper's section 3.1; a PKM head takes twice as many, of which each costs half."""
    peer, pkm, moe = (AutoConfig.from_pretrained(configuration_path(f"{v}-paper")) for v in ("peer", "pkm", "moe"))
    for config, k in ((peer, 16), (pkm, 32)):
        retrieval = config.num_experts, config.num_retrieval_heads, config.num_experts_per_head, config.query_norm
        assert retrieval == (1024**2, 8, k, "batch")
    assert moe.moe_num_experts == 128
    assert moe.output_router_logits  # without them the balance loss is none


@pytest.mark.parametrize("size", RECIPE_SIZES)
def test_twins_of_the_recipe(size):
    """PEER has the settings of the study, and its twin the same width and no fewer FLOPs per token."""
    peer, dense = (
        PeerConfig.from_pretrained(configuration_path(f"{variant}-{size}")) for variant in ("peer", "dense")
    )
    plan = RecipePlan.read(CHECKOUT / "examples" / "studies" / "recipe" / "plans" / "two-cores.json")
    studied = configuration_of(Run(RECIPE, peer.hidden_size, 1, 0.004), plan)
    for name in ("query_size", "num_retrieval_heads", "num_experts_per_head", "sub_keys_per_head", "query_norm"):
        assert getattr(peer, name) == getattr(studied, name), name
    assert peer.expert_initializer_range == studied.expert_initializer_range
    assert peer.hidden_size == dense.hidden_size
    assert model_costs(peer).flops < model_costs(dense).flops
