# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What cannot be added is refused, and leaves the model as it was."""

import copy
import itertools

import pytest
import torch
from grown_models import CONFIGS, logits_of, old_state
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny_models import tiny_config, tiny_model

from modeling_peer import PeerForCausalLM, add_experts, train_added_experts_only
from modeling_peer.continual import growth


def assert_unchanged(model, state, config):
    assert model.config.to_dict() == config
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)
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
        {"num_experts": 25, "num_experts_per_head": 0},
        {"num_experts": 25, "num_retrieval_heads": 0},
    ],
)
def test_arguments(arguments):
    model = tiny_model(CONFIGS["two layers"])
    state, config = old_state(model), copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError):
        add_experts(model, **arguments)
    assert_unchanged(model, state, config)


# Two pools and two routers in turn, or four tables and the keys of two routers.
@pytest.mark.parametrize("number", [0, 3])
def test_memory_that_is_not_there(number, monkeypatch):
    """The allocation of the n-th new part fails."""
    model = tiny_model(CONFIGS["two layers"])
    before, state, config = logits_of(model), old_state(model), copy.deepcopy(model.config.to_dict())
    calls = itertools.count()

    def failing(function):
        def call(*args, **kwargs):
            if next(calls) == number:
                raise RuntimeError("out of memory")
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(growth, "_initialized", failing(growth._initialized))
    with pytest.raises(RuntimeError, match="out of memory"):
        add_experts(model, 25)
    monkeypatch.undo()
    assert_unchanged(model, state, config)
    assert torch.equal(logits_of(model), before)
    assert add_experts(model, 25).experts[2].start == 36


def test_models_of_one_configuration_grow_by_themselves():
    config = tiny_config("peer")
    first, second = PeerForCausalLM(config), PeerForCausalLM(config)
    add_experts(first, 25)
    assert second.config.expert_additions is None and config.expert_additions is None
    assert all(module.config is first.config for module in first.modules() if hasattr(module, "config"))
    assert add_experts(second, 16).experts == {0: range(36, 52)}


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_model(tiny_config("dense", "pkm")),
        lambda: inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny_model(CONFIGS["one layer"])),
        lambda: get_peft_model(tiny_model(CONFIGS["one layer"]), LoraConfig(target_modules=["q_proj"])),
    ],
    ids=["no PEER layer", "injected adapters", "adapters"],
)
def test_models_that_cannot_grow(make):
    with pytest.raises(ValueError):
        add_experts(make(), 25)


def test_one_of_the_layers_of_a_shared_pool():
    with pytest.raises(ValueError, match="layers"):
        add_experts(tiny_model(CONFIGS["shared pool"]), 25, layers=0)


def test_open_after_protected():
    model = tiny_model(CONFIGS["two layers"])
    add_experts(model, 25, layers=0)
    with pytest.raises(ValueError, match="expert_additions"):
        add_experts(model, 13, mode="open")
    assert len(model.config.expert_additions) == 1
    assert add_experts(model, 13, layers=2, mode="open").experts == {2: range(36, 49)}


def test_a_model_that_never_grew():
    with pytest.raises(ValueError, match="expert_additions"):
        train_added_experts_only(tiny_model(CONFIGS["one layer"]))
