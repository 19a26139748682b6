# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Which runs the recipe study makes of its plan, and that the committed results are of these."""

import math
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub.errors import StrictDataclassError
from recipe_plans import PLANS, SMALL

from modeling_peer import PeerConfig
from studies.common.single_run import comparable
from studies.common.training_plan import (
    Run,
    changed_fields,
    configuration_of,
    merge_changes,
    training_arguments,
    training_flops,
)
from studies.common.training_study import TimeIsUp
from studies.recipe.__main__ import run_study
from studies.recipe.plan import (
    BLOCK,
    MOST_FACTORS,
    RecipePlan,
    check_models,
    compared_runs,
    design_runs,
    factor_levels,
    factors_of,
    read_plan,
    runs_beyond,
    runs_of_widths,
    screening_runs,
    search_runs,
    size_runs,
    tuned,
    tuning_runs,
    with_factors,
)
from studies.recipe.report import is_adopted
from studies.recipe.results import read_results
from studies.recipe.study import Study


EIGHT = {str(number): {} for number in range(8)}
MANY = {"variant": "peer", "factors": ["0", "1"], "runs": 16, "seeds": [1, 2], "bar": "mean"}

TRIALS = {
    "dense": [{"learning_rate": 0.01}, {"learning_rate": 0.02}],
    "peer": [{"learning_rate": 0.01, "num_experts_per_head": 2}, {"learning_rate": 0.02, "training": {"seed": 3}}],
}


RECIPE = SMALL["variants"] | {"recipe": {"parent": "gated"}}
SIZES = {"dense": [[32, 64]], "peer": [[32]], "recipe": [[32, 64]]}
WITH_RECIPE = {
    "variants": RECIPE,
    "trials": TRIALS | {"recipe": TRIALS["peer"]},
    "seeds": {"dense": [2], "peer": [1], "recipe": [2]},
    "hidden_sizes": SIZES,
    "timed_trials": [0],
    "sizes_at_equal_seconds": [32, 64],
}


def plan_of(**fields):
    return RecipePlan(**SMALL | fields)


def with_losses(losses, runs):
    """Results of runs whose losses on the corpus are these, by variant."""
    pairs = [pair for name, own in losses.items() for pair in zip(runs[name], own, strict=True)]
    return {run.name: {"losses": {"corpus": loss}} for run, loss in pairs}


def test_a_variant_has_what_its_parents_have_and_it_does_not_change():
    run = Run("apart", 32, 1, 0.01)
    plan = plan_of()
    assert training_arguments(run, plan) == {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "down_proj_lr_multiplier": 4,
        "expert_lr_multiplier": 0.5,
    }
    config = configuration_of(run, plan)
    assert config.gated_experts and config.num_experts == 64
    assert plan.trial_of(run) == {"apart": True} and plan.trial_of(Run("gated", 32, 1, 0.01)) == {}
    assert not changed_fields(run, plan).keys() & {"parent", "trial", "training", "configuration"}


def test_the_screening_compares_each_with_its_parent_at_one_budget():
    plan = plan_of(budgets=[6e11])
    runs = screening_runs(plan)
    assert list(runs) == ["dense", "peer", "gated", "apart"]
    for name, run in runs.items():
        assert (run.variant, run.seed) == (name, 0)
        assert training_flops(run, plan) == pytest.approx(6e11, rel=0.01)
    assert runs["gated"].steps < runs["peer"].steps
    assert screening_runs(plan_of(screened=[])) == {}


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


def test_each_run_of_the_search_has_what_its_factors_say():
    factors = {
        "place": {"feed_forward_types": ["dense", "dense", "dense", "peer"]},
        "fewer": {"times": {"num_retrieval_heads": 0.5, "num_experts_per_head": 2}},
        "half": {"times": {"num_experts_per_head": 0.5}, "training": {"max_grad_norm": 2}},
        "narrow": {"feed_forward": "narrow_peer"},
        "apart": {"trial": {"apart": True}},
        "gated": {"gated_experts": True},
    }
    design = {"variant": "peer", "factors": list(factors), "runs": 32, "seeds": [1, 2], "bar": "mean"}
    plan = plan_of(factors=factors, designs=[design], budgets=[6e11])
    runs = search_runs(plan)
    assert runs[:16] == design_runs(plan, design | {"seeds": [1]})
    assert len({run.name for run in runs}) == 32
    assert [run.seed for run in runs] == [1] * 16 + [2] * 16
    for run in runs:
        has = {name: name in factors_of(run) for name in factors}
        config = configuration_of(run, plan)
        assert training_flops(run, plan) == pytest.approx(6e11, rel=0.01)
        assert config.num_retrieval_heads == (1 if has["fewer"] else 2)
        assert config.num_experts_per_head == (8 if has["fewer"] else 4) // (2 if has["half"] else 1)
        kind = "narrow_peer" if has["narrow"] else "peer"
        assert config.feed_forward_types.index(kind) == (3 if has["place"] else 1)
        assert config.gated_experts == has["gated"]
        assert plan.trial_of(run) == ({"apart": True} if has["apart"] else {})
        assert training_arguments(run, plan).get("max_grad_norm") == (2 if has["half"] else None)
        assert training_arguments(run, plan)["down_proj_lr_multiplier"] == 4
    for name in factors:
        assert sum(name in factors_of(run) for run in runs) == 16


def test_what_diverged_is_not_chosen():
    plan = plan_of(trials=TRIALS)
    runs = tuning_runs(plan)
    results = with_losses({"dense": [math.nan, 2.0], "peer": [2.0, math.nan]}, runs)
    for run in runs_beyond(plan, results).values():
        results[run.name] = {"losses": {"corpus": 3.0}}
    best = tuned(plan, results)
    assert (best["dense"], best["peer"]) == (runs["dense"][1], runs["peer"][0])


def test_tuning_goes_beyond_the_best_rate_where_it_is_an_end():
    plan = plan_of(trials={"dense": [{"learning_rate": rate} for rate in (0.01, 0.02, 0.04)]})
    runs = tuning_runs(plan)
    assert runs_beyond(plan, with_losses({"dense": [2.0, 1.0, 2.0]}, runs)) == {}
    results = with_losses({"dense": [2.0, 2.0, 1.0]}, runs)
    beyond = runs_beyond(plan, results)["dense"]
    assert beyond.learning_rate == 0.0566
    assert tuned(plan, results | with_losses({"dense": [0.9]}, {"dense": [beyond]}))["dense"] == beyond


def test_what_is_compared_was_not_chosen_by_its_seed():
    plan = plan_of(trials=TRIALS, seeds={"dense": [3], "peer": [1]}, hidden_sizes={"dense": [[32, 64]]})
    best = tuning_runs(plan)["dense"][0]
    assert [(run.hidden_size, run.seed) for run in size_runs(plan, best, 6e8)] == [(32, 0), (64, 0)]
    assert [run.seed for run in compared_runs(plan, best, 6e8)] == [3, 4, 5]


def test_at_equal_seconds_all_widths_have_the_time_of_dense_as_it_is_compared():
    plan = plan_of(**WITH_RECIPE | {"trials": TRIALS | {"recipe": [{"learning_rate": 0.01}] * 2}}, budgets=[6e11])
    best = {name: runs[0] for name, runs in tuning_runs(plan).items()}
    narrow, wide = size_runs(plan, best["dense"], 6e11)
    runs = runs_of_widths(plan, best, wide, lambda run: {"dense": 1.0, "recipe": 1.25}[run.variant] * run.hidden_size)
    assert runs["dense"] == [replace(narrow, steps=2 * wide.steps), wide]
    fewer = runs_of_widths(replace(plan, sizes_at_equal_seconds=[64]), best, wide, lambda run: 1.0)
    assert fewer["dense"] == [wide] and [run.hidden_size for run in fewer["recipe"]] == [64]
    sizes, steps = zip(*((run.hidden_size, run.steps) for run in runs["recipe"]), strict=True)
    assert sizes == (32, 64) and steps == (round(2 * wide.steps / 1.25), round(wide.steps / 1.25))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"variants": SMALL["variants"] | {"other": {"parent": "none"}}}, "'other'"),
        ({"variants": SMALL["variants"] | {"one": {"parent": "two"}, "two": {"parent": "one"}}}, "'one'"),
        ({"screened": ["dense"]}, "screened"),
        ({"screened": ["missing"]}, "screened"),
        ({"variants": RECIPE, "trials": TRIALS | {"recipe": TRIALS["peer"]}}, "seeds"),
        (WITH_RECIPE | {"sizes_at_equal_seconds": [32, 48]}, "sizes_at_equal_seconds"),
        ({"designs": [MANY | {"factors": ["none"]}]}, "factors"),
        *(
            ({"factors": EIGHT, "designs": [MANY | changed]}, "designs")
            for changed in ({"factors": list(EIGHT)}, {"runs": 8}, {"seeds": [0]}, {"variant": "none"})
        ),
        ({"trials": TRIALS | {"gated": [{"learning_rate": 1}]}}, "gated"),
        ({"hidden_sizes": {"dense": []}}, "hidden_sizes"),
        (WITH_RECIPE | {"transfer_size": 32}, "transfer_size"),
        (WITH_RECIPE | {"timed_trials": [0, 2]}, "timed_trials"),
    ],
)
def test_refuses(fields, named):
    with pytest.raises(ValueError, match=named):
        plan_of(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"nums_experts": [64, 9]},  # less than k² of the first trial
        {
            "trials": TRIALS
            | {"recipe": [{"learning_rate": 0.01, "num_experts_per_head": 16}, {"learning_rate": 0.02}]}
        },
        {"factors": EIGHT | {"1": {"times": {"num_experts_per_head": 8}}}, "designs": [MANY]},
    ],
)
def test_a_model_that_cannot_be_made_is_refused_before_any_run(fields):
    check_models(plan_of(**WITH_RECIPE))
    with pytest.raises((ValueError, StrictDataclassError), match="must be"):
        check_models(plan_of(**WITH_RECIPE | fields))


@pytest.mark.parametrize("file", sorted(PLANS.glob("*.json")), ids=lambda file: file.stem)
def test_committed_plans_make_models(file):
    plan = read_plan(file)
    check_models(plan)
    for run in (*screening_runs(plan).values(), *search_runs(plan)):
        assert isinstance(configuration_of(run, plan), PeerConfig)
        assert training_flops(run, plan) == pytest.approx(plan.budgets[0], rel=0.01)


def runs_asked_for(results, plan):
    """The runs of the study by their names, up to the step that lacks results."""
    asked = {}

    def make(runs, _):
        asked.update({run.name: run for run in runs})
        if not results.are_made(runs):
            raise TimeIsUp
        return results.runs

    study = SimpleNamespace(plan=plan, make=make, seconds=dict, all_results=lambda: results)
    with suppress(TimeIsUp):
        run_study(study)
    return asked


@pytest.fixture(scope="module")
def committed():
    return read_results(PLANS.parent / "results.json")


def test_every_run_was_made_as_planned(committed, tmp_path):
    plan = read_plan(PLANS / "two-cores.json")
    study = Study(plan, tmp_path, 1)
    made = {name: run for name, run in runs_asked_for(committed, plan).items() if name in committed.runs}
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
