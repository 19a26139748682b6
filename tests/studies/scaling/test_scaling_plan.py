# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The plans of the scaling study, and the runs that they ask for."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from scaling_plans import PLAN, SCALING, SMALL

from modeling_peer import PeerConfig, configuration_path
from studies.common.single_run import comparable
from studies.common.training_plan import (
    PEER,
    Run,
    configuration_of,
    costs_of,
    run_of_seconds,
    training_flops,
)
from studies.scaling.__main__ import run_study
from studies.scaling.plan import Plan, ablation_runs, read_plan, reference_run, size_runs
from studies.scaling.report import read_results
from studies.scaling.study import Study


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

    def test_only_the_middle_block_differs(self, file):
        """As in the paper: everything outside it is the same, so that the feed-forward is what is compared."""
        plan = read_plan(file)
        for size in plan.all_sizes:
            models = [configuration_of(Run(variant, size, 1, 1.0), plan) for variant in plan.variants]
            for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"):
                assert len({getattr(config, name) for config in models}) == 1, name
            middle = (models[0].num_hidden_layers - 1) // 2
            for config, (variant, fields) in zip(models, plan.variants.items(), strict=True):
                expected = ["dense"] * config.num_hidden_layers
                expected[middle] = fields["configuration"].split("-")[0]
                assert config.feed_forward_types == expected, variant


REFUSED = [
    ({"variants": {"dense": {"configuration": "dense-tiny"}}}, "variants"),
    ({"ablations": {"depth": {}}}, "depth"),
    ({"hidden_sizes": [[32], [64]]}, "hidden_sizes|per budget"),
    ({"hidden_sizes": [[64, 32]]}, "hidden_sizes"),
    ({"budgets": [2e13, 6e12]}, "budgets"),
    ({"batch_size": 3}, "batch_size|gradient_accumulation_steps"),
]


class TestPlan:
    def test_refuses_at_once(self):
        for fields, named in REFUSED:
            with pytest.raises(ValueError, match=named):
                Plan(**(SMALL | fields))

    def test_widths_grow_with_the_hidden_size(self):
        base = PeerConfig.from_pretrained(configuration_path("peer-tiny"))
        assert base.hidden_size == 128
        half = configuration_of(Run(PEER, 64, 1, 1.0), PLAN)
        assert half.intermediate_size == base.intermediate_size // 2
        assert (half.head_dim, half.num_attention_heads, half.num_key_value_heads) == (16, 4, 4)  # 16 is the plan's
        assert half.query_size == PLAN.variants[PEER]["query_size"] // 2
        assert half.num_experts == PLAN.variants[PEER]["num_experts"]

    def test_equal_seconds_are_those_of_the_steps(self):
        dense, peer = Run("dense", 128, 300, 1.0), Run(PEER, 64, 999, 2.0, seed=0)
        seconds = {"dense": 0.2, PEER: 0.3}
        assert run_of_seconds(peer, dense, lambda run: seconds[run.variant]) == replace(peer, steps=200)


def test_committed_results_were_made_as_planned(tmp_path):
    """All runs of the plan and no others, with the arguments that the plan makes today."""
    committed, asked = read_results(SCALING / "results.json"), set()
    assert committed.plan == read_plan(SCALING / "plans" / "two-cores.json")

    def make(runs, description):
        asked.update(run.name for run in runs)
        return committed.runs

    run_study(SimpleNamespace(plan=committed.plan, make=make, seconds=lambda: committed.seconds))
    assert asked == set(committed.runs)
    study = Study(committed.plan, tmp_path, 1)
    for name, result in committed.runs.items():
        ablation = None if result["ablation"] is None else tuple(result["ablation"])
        run = Run(*(result[each] for each in ("variant", "hidden_size", "steps", "learning_rate", "seed")), ablation)
        assert run.name == name
        assert comparable(result["run_clm"]) == comparable(study.arguments(run))
        assert result["training_flops"] == training_flops(run, committed.plan)
