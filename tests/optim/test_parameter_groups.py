# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Parameter groups of a model: expert tables by rows, all else as `Trainer` groups it."""

import copy
import warnings

import pytest
import torch
from grown_models import CONFIGS, SIZES
from tiny_models import tiny_model
from trainer_worker import small_model
from transformers import Trainer, TrainingArguments

from modeling_peer import (
    RowAdamW,
    add_experts,
    expert_parameter_groups,
    freeze_experts,
    make_optimizer,
    train_added_experts_only,
)
from modeling_peer.experts import expert_tables


def is_down(name):
    return name.endswith(("down_proj", "values"))


class TestGroups:
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
    def test_follow_the_trainer(self, model):
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

    @pytest.mark.parametrize("variant", ["peer", "pkm"])
    def test_rows_that_come_out_have_a_rate_of_their_own(self, variant):
        model = small_model("dense", variant)
        groups = expert_parameter_groups(model, 0.1, expert_lr_multiplier=2.0, down_proj_lr_multiplier=5.0)
        rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
        for name, table in expert_tables(model).items():
            assert rates[table.weight] == pytest.approx(1.0 if is_down(name) else 0.2)
        assert sorted(rates.values())[0] == 0.1 and all(each["rows"] == (each["lr"] > 0.1) for each in groups)

    def test_leave_out_what_is_frozen(self):
        model = small_model()
        model.model.embed_tokens.weight.requires_grad_(False)
        found = [p for group in expert_parameter_groups(model, learning_rate=0.1) for p in group["params"]]
        assert len(found) == len(list(model.parameters())) - 1

    @pytest.mark.parametrize("part", ["whole", "added"])
    def test_rates_of_an_optimizer_for_all_and_for_a_part_of_the_model(self, part):
        model, args = small_model("dense", "peer"), TrainingArguments("unused", learning_rate=0.1)
        if part == "added":
            add_experts(model, 16)
        rates = {p: group["lr"] for group in make_optimizer(model, args).param_groups for p in group["params"]}
        expected = {"whole": (0.025, 4.8), "added": (0.1, 0.1)}[part]
        tables = {name: each for name, each in expert_tables(model).items() if each.weight.requires_grad}
        assert len(tables) == 2
        for name, table in tables.items():
            assert rates[table.weight] == pytest.approx(expected[is_down(name)])
        own = make_optimizer(model, args, expert_lr_multiplier=2.0, down_proj_lr_multiplier=3.0)
        assert max(group["lr"] for group in own.param_groups) == pytest.approx(0.6)

    def test_an_optimizer_has_betas_and_epsilon_of_the_training_arguments(self):
        args = TrainingArguments("unused", adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-5)
        groups = make_optimizer(small_model(), args).param_groups
        assert {(group["betas"], group["eps"]) for group in groups} == {((0.8, 0.95), 1e-5)}

    def test_rates_last_through_a_schedule(self):
        groups = expert_parameter_groups(small_model(), learning_rate=0.1, expert_lr_multiplier=3.0)
        optimizer = RowAdamW(groups)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for _ in range(3):
            optimizer.step()
            scheduler.step()
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx((0.3 if group["rows"] else 0.1) / 4)


def warnings_of(model):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        make_optimizer(model, TrainingArguments("unused"))
    return [each for each in found if "train_added_experts_only" in str(each.message)]


@pytest.mark.parametrize("mode", SIZES)
@pytest.mark.parametrize("config", ["one layer", "shared pool"])
class TestWarningOfGrownModels:
    @pytest.fixture
    def grown(self, config, mode):
        model = tiny_model(CONFIGS[config])
        add_experts(model, SIZES[mode], mode=mode)
        return model

    def test_is_given_to_a_copy_until_its_old_experts_are_frozen(self, grown):
        assert not warnings_of(grown)
        copied = copy.deepcopy(grown).requires_grad_(True)
        assert warnings_of(copied)
        train_added_experts_only(copied)
        assert not warnings_of(copied)

    def test_is_not_given_if_they_are_frozen(self, grown):
        copied = copy.deepcopy(grown).requires_grad_(True)
        freeze_experts(copied, range(36))
        assert not warnings_of(copied)


def test_models_that_did_not_grow_are_not_warned_of():
    assert not warnings_of(small_model("peer", "pkm")) and not warnings_of(torch.nn.Linear(2, 2))
