# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Which runs the recipe study makes of its plan, and that the committed results are of these."""

import math
from contextlib import suppress
from itertools import chain
from types import SimpleNamespace

import pytest
from recipe_plans import PLANS, SMALL

from modeling_peer import PeerConfig
from studies.common.single_run import comparable
from studies.common.training_plan import configuration_of, training_flops, trains_by_rows
from studies.common.training_study import TimeIsUp
from studies.recipe.__main__ import run_study
from studies.recipe.plan import (
    RecipePlan,
    runs_beyond,
    screening_runs,
    search_runs,
    tuned,
    tuning_runs,
)
from studies.recipe.results import read_results
from studies.recipe.study import Study


def test_what_diverged_is_not_chosen():
    rates = [{"learning_rate": 0.01}, {"learning_rate": 0.02}]
    plan = RecipePlan(**SMALL | {"trials": {"dense": rates, "peer": rates}})
    runs = tuning_runs(plan)
    losses = {"dense": [math.nan, 2.0], "peer": [2.0, math.nan]}
    results = {
        run.name: {"losses": {"corpus": loss}}
        for name in losses
        for run, loss in zip(runs[name], losses[name], strict=True)
    }
    results |= {run.name: {"losses": {"corpus": 3.0}} for run in runs_beyond(plan, results).values()}
    best = tuned(plan, results)
    assert (best["dense"], best["peer"]) == (runs["dense"][1], runs["peer"][0])


@pytest.mark.parametrize("file", sorted(PLANS.glob("*.json")), ids=lambda file: file.stem)
def test_committed_plans_make_models(file):
    plan = RecipePlan.read(file)
    runs = [*screening_runs(plan).values(), *search_runs(plan), *chain.from_iterable(tuning_runs(plan).values())]
    assert runs
    for run in runs:
        assert isinstance(configuration_of(run, plan), PeerConfig)
        # Or its multipliers of rates would be refused when it is trained.
        assert trains_by_rows(run, plan) or "peer" not in configuration_of(run, plan).feed_forward_types
        assert training_flops(run, plan) == pytest.approx(plan.budgets[0], rel=0.01)


@pytest.fixture(scope="module")
def committed():
    return read_results(PLANS.parent / "results.json")


def test_every_run_was_made_as_planned(committed, tmp_path):
    """Those that the study asks for, up to the step that lacks results."""
    plan, asked = RecipePlan.read(PLANS / "two-cores.json"), {}

    def make(runs, _):
        asked.update({run.name: run for run in runs})
        if not committed.are_made(runs):
            raise TimeIsUp
        return committed.runs

    with suppress(TimeIsUp):
        run_study(SimpleNamespace(plan=plan, make=make, seconds=dict, all_results=lambda: committed))
    study = Study(plan, tmp_path, 1)
    made = {name: run for name, run in asked.items() if name in committed.runs}
    assert made.keys() == committed.runs.keys() >= {run.name for run in screening_runs(plan).values()}
    for name, run in made.items():
        result = committed.runs[name]
        assert comparable(result["run_clm"]) == comparable(study.arguments(run)), name
        assert result["trial"] == plan.trial_of(run)
        for text, documents in committed.documents.items():
            assert len(documents) == len(result["sequence_losses"][text]) == plan.eval_sequences
