# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The plans of the scaling study, the committed runs, and figures against the raw losses of these."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from modeling_peer import PeerConfig
from studies.common.single_run import comparable
from studies.common.training_plan import Run, configuration_of, costs_of, training_flops
from studies.scaling.__main__ import Study, run_study
from studies.scaling.plan import Plan, ablation_runs, reference_run, size_runs
from studies.scaling.report import read_results


SCALING = Path(__file__).parents[3] / "examples" / "studies" / "scaling"
RESULTS = read_results(SCALING / "results.json")
PLAN = RESULTS.plan


@pytest.mark.parametrize("file", sorted((SCALING / "plans").glob("*.json")), ids=lambda file: file.stem)
def test_every_model_can_be_made_and_takes_its_budget(file):
    plan = Plan.read(file)
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


def test_committed_results_were_made_as_planned(tmp_path):
    """All runs of the plan and no others, with the arguments that the plan makes today."""
    assert Plan.read(SCALING / "plans" / "two-cores.json") == PLAN
    asked = set()

    def make(runs, description):
        asked.update(run.name for run in runs)
        return RESULTS.runs

    run_study(SimpleNamespace(plan=PLAN, make=make, seconds=lambda: RESULTS.seconds))
    assert asked == set(RESULTS.runs)
    study = Study(PLAN, tmp_path, 1)
    for name, result in RESULTS.runs.items():
        ablation = None if result["ablation"] is None else tuple(result["ablation"])
        run = Run(*(result[each] for each in ("variant", "hidden_size", "steps", "learning_rate", "seed")), ablation)
        assert run.name == name
        assert comparable(result["run_clm"]) == comparable(study.arguments(run))
        assert result["training_flops"] == training_flops(run, PLAN)
