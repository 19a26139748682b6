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
"""The plans of the scaling study, and the runs that they ask for."""

from dataclasses import replace

import pytest
from scaling_plans import PLAN, SCALING, SMALL

from modeling_peer import PeerConfig, configuration_path
from studies.common.training_plan import (
    PEER,
    Run,
    changed_fields,
    configuration_of,
    costs_of,
    run_of_budget,
    run_of_seconds,
    training_flops,
)
from studies.scaling.plan import Plan, ablation_runs, rate_runs, read_plan, reference_run, size_runs, with_seeds


PLANS = sorted((SCALING / "plans").glob("*.json"))


@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.stem)
class TestPlans:
    def test_every_model_can_be_made_and_takes_its_budget(self, file):
        plan = read_plan(file)
        rates = dict.fromkeys(plan.variants, plan.learning_rates[0])
        for budget in plan.budgets:
            for run in size_runs(plan, rates, budget):
                # The budget, to half a step.
                assert abs(training_flops(run, plan) - budget) <= training_flops(replace(run, steps=1), plan) / 2
        for run in ablation_runs(plan, rates):
            assert costs_of(run, plan).flops > 0
        reference = configuration_of(reference_run(plan, rates), plan)
        for fields in plan.after_training.values():
            assert PeerConfig.from_dict(reference.to_dict(), **fields).num_experts == reference.num_experts

    def test_names_of_runs_differ_and_are_those_of_files(self, file):
        plan = read_plan(file)
        rates = dict.fromkeys(plan.variants, plan.learning_rates[0])
        runs = {*rate_runs(plan), *ablation_runs(plan, rates)}
        sizes = [run for budget in plan.budgets for run in size_runs(plan, rates, budget)]
        runs |= {*sizes, *(each for run in sizes for each in with_seeds(run, plan))}
        assert len({run.name for run in runs}) == len(runs)
        assert not any(set(run.name) & set('/\\ :*?"<>|') for run in runs)

    def test_only_the_middle_block_differs(self, file):
        """As in the paper: everything outside it is the same, so that the feed-forward is what is compared."""
        plan = read_plan(file)
        for size in plan.all_sizes:
            models = [configuration_of(Run(variant, size, 1, 1.0), plan) for variant in plan.variants]
            for name in (
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "intermediate_size",
                "vocab_size",
            ):
                assert len({getattr(config, name) for config in models}) == 1, name
            middle = (models[0].num_hidden_layers - 1) // 2
            for config, (variant, fields) in zip(models, plan.variants.items(), strict=True):
                expected = ["dense"] * config.num_hidden_layers
                expected[middle] = fields["configuration"].split("-")[0]
                assert config.feed_forward_types == expected, variant


REFUSED = [
    ({"variants": {"dense": {"configuration": "dense-tiny"}}}, "`variants` must contain 'peer' and 'dense'"),
    ({"ablations": {"depth": {}}}, r"groups in `ablations` must be some of \['num_experts', .*got 'depth'"),
    (
        {"repeated_ablations": ["depth"]},
        r"groups in `repeated_ablations` must be some of \['num_experts', .*got 'depth'",
    ),
    ({"evaluation_texts": []}, "`evaluation_texts` must have at least one element"),
    ({"hidden_sizes": [[32], [64]]}, "one list per budget, 1, but got 2"),
    ({"seeds": 0}, "`seeds` must be at least 1, but got 0"),
    ({"hidden_sizes": [[]]}, r"`hidden_sizes` must be non-empty and strictly ascending, but got \[\]"),
    ({"hidden_sizes": [[64, 32]]}, r"`hidden_sizes` must be non-empty and strictly ascending, but got \[64, 32\]"),
    ({"budgets": [2e13, 6e12]}, "`budgets` must be non-empty and strictly ascending"),
    ({"batch_size": 3}, "multiple of `gradient_accumulation_steps` = 2, but got 3"),
]


class TestPlan:
    @pytest.mark.parametrize(("fields", "message"), REFUSED)
    def test_refuses_at_once(self, fields, message):
        with pytest.raises(ValueError, match=message):
            Plan(**(SMALL | fields))

    def test_refuses_a_budget_without_a_step(self):
        with pytest.raises(
            ValueError, match="dense of hidden_size 64 must be trained for at least one step, but got 0.00"
        ):
            run_of_budget("dense", 64, 1e6, 1.0, PLAN)

    def test_widths_grow_with_the_hidden_size(self):
        base = PeerConfig.from_pretrained(configuration_path("peer-tiny"))
        assert base.hidden_size == 128
        half = configuration_of(Run(PEER, 64, 1, 1.0), PLAN)
        assert half.intermediate_size == base.intermediate_size // 2
        assert (half.head_dim, half.num_attention_heads, half.num_key_value_heads) == (16, 4, 4)  # 16 is the plan's
        assert half.query_size == PLAN.variants[PEER]["query_size"] // 2
        assert half.num_experts == PLAN.variants[PEER]["num_experts"]
        assert (
            changed_fields(Run(PEER, 64, 1, 1.0, 0, ("variation", "dense branch beside")), PLAN)[
                "shared_expert_intermediate_size"
            ]
            == half.intermediate_size
        )

    def test_refuses_a_size_that_heads_do_not_divide(self):
        with pytest.raises(ValueError, match="multiples of the head size 16 of peer, but got 100"):
            changed_fields(Run(PEER, 100, 1, 1.0), PLAN)

    def test_equal_seconds_are_those_of_the_steps(self):
        dense, peer = Run("dense", 128, 300, 1.0), Run(PEER, 64, 999, 2.0, seed=0)
        seconds = {"dense": 0.2, PEER: 0.3}
        assert run_of_seconds(peer, dense, lambda run: seconds[run.variant]) == replace(peer, steps=200)
