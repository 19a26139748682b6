# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Parameter groups of a model: expert tables by rows, all else as `Trainer` groups it."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from grown_models import CONFIGS, SIZES
from tiny_models import tiny_model
from trainer_worker import small_model
from transformers import AutoConfig, Trainer, TrainingArguments

from modeling_peer import (
    RowAdamW,
    add_experts,
    expert_parameter_groups,
    freeze_experts,
    make_optimizer,
    train_added_experts_only,
)
from modeling_peer.experts import expert_tables
from modeling_peer.optim.parameter_groups import learning_rate_of_new_model


def is_down(name):
    return name.endswith(("down_proj", "values"))


@pytest.mark.parametrize(
    "model",
    [
        lambda: small_model("dense", "peer"),
        lambda: small_model("peer", "peer", share_experts_across_layers=True, gated_experts=True),
        lambda: small_model("pkm", "moe", query_norm="rms", attention_bias=True, tie_word_embeddings=True),
        lambda: small_model("dense", "dense"),
    ],
    ids=["peer", "shared", "pkm", "dense"],
)
def test_follow_the_trainer(model):
    model = model()
    groups = expert_parameter_groups(model, learning_rate=0.1, weight_decay=0.3, expert_lr_multiplier=4.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [names[parameter] for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(names.values())
    tables = {table.weight for table in expert_tables(model).values()}
    assert {parameter for group in groups if group["rows"] for parameter in group["params"]} == tables
    decayed = {names[parameter] for group in groups if group["weight_decay"] for parameter in group["params"]}
    assert decayed == set(Trainer.get_decay_parameter_names(None, model)) & set(names.values())
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert all(group["lr"] == (0.4 if group["rows"] else 0.1) for group in groups)
    # What `Trainer` logs is the rate of the first.
    assert not groups[0]["rows"]
    RowAdamW(groups)


@pytest.mark.parametrize(
    ("variant", "part", "expected"),
    [("peer", "whole", (0.025, 4.8)), ("pkm", "whole", (0.025, 4.8)), ("peer", "added", (0.1, 0.1))],
)
def test_rates_of_an_optimizer_for_all_and_for_a_part_of_the_model(variant, part, expected):
    """With betas and epsilon of the training arguments, and without what is frozen."""
    model, adam = small_model("dense", variant), {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-5}
    args = TrainingArguments("unused", learning_rate=0.1, **adam)
    if part == "added":
        add_experts(model, 16)
    tables = {each.weight: name for name, each in expert_tables(model).items() if each.weight.requires_grad}
    own = {"expert_lr_multiplier": 2.0, "down_proj_lr_multiplier": 3.0}
    facts = (0.1, 0.1) if part == "added" else (0.4, 38.4)
    for multipliers, (up, down) in (
        ({}, expected),
        ({"rates": "facts"}, facts),
        (own | {"rates": "facts"}, (0.2, 0.6)),
    ):
        groups = make_optimizer(model, args, **multipliers).param_groups
        assert {(group["betas"], group["eps"]) for group in groups} == {((0.8, 0.95), 1e-5)}
        rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
        assert tables and set(rates) == {p for p in model.parameters() if p.requires_grad}
        for parameter, rate in rates.items():
            name = tables.get(parameter)
            assert rate == pytest.approx(0.1 if name is None else down if is_down(name) else up)


def test_other_rates_are_refused():
    with pytest.raises(ValueError, match=r"`rates` must be one of \['text', 'facts'\], got 'fact'"):
        make_optimizer(small_model("peer"), TrainingArguments("unused", learning_rate=1e-3), rates="fact")


def warnings_of(model):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        make_optimizer(model, TrainingArguments("unused"))
    return [each for each in found if "train_added_experts_only" in str(each.message)]


@pytest.mark.parametrize("mode", SIZES)
@pytest.mark.parametrize("config", ["one layer", "shared pool"])
@pytest.mark.parametrize("freeze", [train_added_experts_only, lambda model: freeze_experts(model, range(36))])
def test_copies_of_grown_models_are_warned_of_until_their_old_experts_are_frozen(config, mode, freeze):
    model = tiny_model(CONFIGS[config])
    add_experts(model, SIZES[mode], mode=mode)
    assert not warnings_of(model)
    copied = copy.deepcopy(model).requires_grad_(True)
    assert warnings_of(copied)
    freeze(copied)
    assert not warnings_of(copied)


def test_a_new_model_at_the_default_rate_is_warned_of_with_one_for_its_size(tmp_path):
    model, args = small_model("dense", "peer"), TrainingArguments("unused")
    model.save_pretrained(tmp_path)
    named = type(model)(AutoConfig.from_pretrained(tmp_path))  # after the folder of its configuration
    for new in (model, named):
        with pytest.warns(UserWarning, match="`learning_rate` is 5e-05.*this model is new: take about 0.004"):
            make_optimizer(new, args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_optimizer(type(model).from_pretrained(tmp_path), args)
        make_optimizer(model, TrainingArguments("unused", learning_rate=2e-3))


def test_a_model_of_another_library():
    model = torch.nn.Embedding(64, 4)
    model.config = SimpleNamespace(n_embd=4)
    (group,) = make_optimizer(model, TrainingArguments("unused"), embeddings=True).param_groups
    assert group["rows"] and group["params"] == [model.weight]


def test_a_training_without_the_optimizer_is_told_of_it_whatever_its_tables_take(monkeypatch):
    said, model, tokens = [], small_model("peer"), torch.arange(8)[None]
    monkeypatch.setattr("modeling_peer.ops.factored_gradient.logger.warning_once", said.append)
    model(tokens, labels=tokens).loss.backward()
    assert said and all("make_optimizer(model, args)" in each for each in said)
    said.clear()
    model.zero_grad()
    optimizer = make_optimizer(model, TrainingArguments("unused", learning_rate=1e-3))
    model(tokens, labels=tokens).loss.backward()
    assert not said and optimizer


@pytest.mark.parametrize("rates", [{"learning_rate": "1e-3"}, {"learning_rate": 0.1, "down_proj_lr_multiplier": "2"}])
def test_rates_of_another_type_are_refused_by_name(rates):
    name = list(rates)[-1]
    with pytest.raises(TypeError, match=f"`{name}` must be of type float, got '{rates[name]}'"):
        expert_parameter_groups(small_model("peer"), **rates)


def test_rates_follow_the_width():
    assert [learning_rate_of_new_model(width) for width in (32, 128, 768)] == [4e-3, 2e-3, 3.3e-4]


def test_models_that_did_not_grow_are_not_warned_of():
    assert not warnings_of(small_model("peer", "pkm")) and not warnings_of(torch.nn.Linear(2, 2))
