# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Which runs the recipe study makes of its plan, and that the committed results are of these."""

import math
from contextlib import suppress
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from recipe_plans import PLANS, SMALL

from modeling_peer import PeerConfig
from studies.common.single_run import comparable
from studies.common.training_plan import configuration_of, merge_changes, training_flops
from studies.common.training_study import TimeIsUp
from studies.recipe.__main__ import run_study
from studies.recipe.plan import (
    BLOCK,
    MOST_FACTORS,
    RecipePlan,
    factor_levels,
    runs_beyond,
    screening_runs,
    search_runs,
    tuned,
    tuning_runs,
    with_factors,
)
from studies.recipe.report import is_adopted
from studies.recipe.results import read_results
from studies.recipe.study import Study


@pytest.mark.parametrize(("num_runs", "most"), MOST_FACTORS.items())
def test_the_design_tells_effects_apart(num_runs, most):
    """Of each other, of those of two others together, and of the seeds."""
    names = [str(number) for number in range(most)]
    levels = factor_levels(names, num_runs)
    assert len({tuple(level.values()) for level in levels}) == num_runs
    columns = {name: np.array([1 if level[name] else -1 for level in levels]) for name in [*names, BLOCK]}
    for name, column in columns.items():
        assert column.sum() == 0
        others = [columns[other] for other in columns if other != name]
        assert not any(column @ other for other in others)
        assert not any(column @ (first * second) for first, second in combinations(others, 2))


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
    for run in (*screening_runs(plan).values(), *search_runs(plan)):
        assert isinstance(configuration_of(run, plan), PeerConfig)
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


def test_the_recipe_is_what_the_last_design_adopted(committed):
    plan, design = committed.plan, committed.plan.designs[-1]
    adopted = [name for name in design["factors"] if is_adopted(committed.effects(design)[name], design["bar"])]
    changes = [
        with_factors(merge_changes(*plan.lineage(variant)), [plan.factors[name] for name in factors])
        for variant, factors in ((design["variant"], adopted), ("recipe", []))
    ]
    expected, found = ({name: each[name] for name in each if name != "parent"} for each in changes)
    assert found == expected and adopted
