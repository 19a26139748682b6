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
"""Parameter groups of a model: expert tables by rows, all else as `Trainer` groups it."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from trainer_worker import small_model
from transformers import Trainer, TrainingArguments

from modeling_peer import RowAdamW, add_experts, expert_parameter_groups, make_optimizer
from modeling_peer.expert_table import ExpertDownProjection, ExpertTable


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
        tables = {module.weight for module in model.modules() if isinstance(module, ExpertTable)}
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
        for module in model.modules():
            if isinstance(module, ExpertTable):
                expected = 1.0 if isinstance(module, ExpertDownProjection) else 0.2
                assert rates[module.weight] == pytest.approx(expected)
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
        tables = [each for each in model.modules() if isinstance(each, ExpertTable) and each.weight.requires_grad]
        assert len(tables) == 2
        for table in tables:
            assert rates[table.weight] == pytest.approx(expected[isinstance(table, ExpertDownProjection)])
        own = make_optimizer(model, args, expert_lr_multiplier=2.0, down_proj_lr_multiplier=3.0)
        assert max(group["lr"] for group in own.param_groups) == pytest.approx(0.6)

    def test_an_optimizer_has_betas_and_epsilon_of_the_training_arguments(self):
        args = TrainingArguments("unused", adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-5)
        groups = make_optimizer(small_model(), args).param_groups
        assert {(group["betas"], group["eps"]) for group in groups} == {((0.8, 0.95), 1e-5)}

    def test_multiplier_lasts_through_a_schedule(self):
        model, references = small_model(), []
        optimizer = RowAdamW(expert_parameter_groups(model, learning_rate=0.1, expert_lr_multiplier=3.0))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        others = {}
        for rate in (0.1, 0.3):
            others[rate] = [
                nn.Parameter(p.detach().clone())
                for group in optimizer.param_groups
                if math.isclose(group["lr"], rate)
                for p in group["params"]
            ]
            references.append(torch.optim.AdamW(others[rate], lr=rate, weight_decay=0.0))
        schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1 / (1 + step)) for one in references]
        for _ in range(3):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.ones_like(parameter)
            for other in others[0.1] + others[0.3]:
                other.grad = torch.ones_like(other)
            for one in (
                optimizer,
                scheduler,
                *(one for pair in zip(references, schedules, strict=True) for one in pair),
            ):
                one.step()
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx((0.3 if group["rows"] else 0.1) / 4)
            expected = [others[0.3 if group["rows"] else 0.1].pop(0) for _ in group["params"]]
            assert_close(group["params"], expected, rtol=1e-5, atol=1e-6)
