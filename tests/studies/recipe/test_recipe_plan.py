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
"""Which runs the recipe study makes of its plan."""

import math

import pytest
from recipe_plans import PLANS, SMALL

from modeling_peer import PeerConfig
from studies.common.training_plan import (
    Run,
    changed_fields,
    configuration_of,
    training_arguments,
    training_flops,
)
from studies.recipe.plan import (
    RecipePlan,
    choose_size,
    combination_runs,
    compared_runs,
    dense_runs,
    expert_runs,
    read_plan,
    run_of_size,
    runs_beyond,
    runs_by_size,
    runs_of_widths,
    runs_to_tune,
    search_runs,
    second_round_runs,
    size_runs,
    tuned,
    tuning_runs,
)
from studies.recipe.report import is_adopted


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
}

SEARCHED = ("peer", "gated", "apart")


def plan_of(**fields):
    return RecipePlan(**SMALL | {"search_seeds": [2, 0]} | fields)


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


def test_the_search_compares_each_with_its_parent_at_one_budget():
    plan = plan_of(budgets=[6e11])
    search = search_runs(plan)
    assert list(search) == ["dense", "peer", "gated", "apart"]
    for name, runs in search.items():
        assert [(run.variant, run.seed) for run in runs] == [(name, 0), (name, 1)]
        assert training_flops(runs[0], plan) == pytest.approx(6e11, rel=0.01)
    assert search["gated"][0].steps < search["peer"][0].steps


@pytest.mark.parametrize(("losses", "best"), [([3.0, 2.9, 2.7], "apart"), ([3.0, 2.7, 2.6], "gated")])
def test_the_second_round_is_of_those_furthest_below_their_parents(losses, best):
    """`apart` is a change of `gated`, so its loss counts against that of `gated`."""
    plan = plan_of(search_seeds=[2, 1], finalists=1)
    results = with_losses(
        {"dense": [4.0] * 2} | {name: [loss, loss + 1] for name, loss in zip(SEARCHED, losses, strict=True)},
        search_runs(plan),
    )
    second = second_round_runs(plan, results)
    assert list(second) == (["peer", "gated", "apart"] if best == "apart" else ["peer", "gated"])
    for name, runs in second.items():
        assert [(run.variant, run.seed) for run in runs] == [(name, 0), (name, 1), (name, 2)]


def test_at_most_two_of_a_setting_come_to_the_second_round():
    names = ["one", "two", "three", "four"]
    changed = {name: {"parent": "peer", "num_experts_per_head": place} for place, name in enumerate(names, 1)}
    fields = {"variants": SMALL["variants"] | changed, "searched": names, "alternatives": [names[:3]]}
    plan = plan_of(search_seeds=[1, 1], finalists=3, **fields)
    losses = {"dense": [4.0], "peer": [3.0]} | {name: [2.0 + place] for place, name in enumerate(names)}
    assert list(second_round_runs(plan, with_losses(losses, search_runs(plan)))) == ["peer", "one", "two", "four"]


def test_what_diverged_is_not_chosen():
    plan = plan_of(trials=TRIALS)
    runs = tuning_runs(plan)
    results = with_losses({"dense": [math.nan, 2.0], "peer": [2.0, math.nan]}, runs)
    for run in runs_beyond(plan, results).values():
        results[run.name] = {"losses": {"corpus": 3.0}}
    best = tuned(plan, results)
    assert (best["dense"], best["peer"]) == (runs["dense"][1], runs["peer"][0])


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ((0.02, 0.02, 0.01, 0.01), True),
        ((0.04, 0.04, 0.0, 0.005), False),  # not with the seeds that did not choose
        ((0.02, 0.02, 0.005, -0.006), False),  # not by one percent in the mean
        ((0.01, 0.02, 0.03, -0.01), True),
        ((-0.001, 0.04, 0.04, -0.01), False),  # with two of four
    ],
)
def test_what_is_adopted(shares, expected):
    assert is_adopted(list(shares), 2) == expected


def test_combinations_have_the_seeds_of_both_rounds():
    plan = plan_of(search_seeds=[1, 1], combined=["apart"])
    seeds = {name: [run.seed for run in runs] for name, runs in combination_runs(plan).items()}
    assert seeds == {"gated": [0, 1], "apart": [0, 1]}


def test_tuning_gives_each_variant_its_best_trial():
    plan = plan_of(trials=TRIALS)
    runs = tuning_runs(plan)
    assert [run.learning_rate for run in runs["peer"]] == [0.01, 0.02]
    few, other = (configuration_of(run, plan).num_experts_per_head for run in runs["peer"])
    assert (few, other) == (2, 4) and training_arguments(runs["peer"][1], plan)["seed"] == 3
    results = with_losses({"dense": [1.0, 2.0], "peer": [2.0, 1.0]}, runs)
    beyond = runs_beyond(plan, results)
    assert {name: run.learning_rate for name, run in beyond.items()} == {"dense": 0.00707, "peer": 0.0283}
    results |= with_losses({"dense": [1.5], "peer": [1.5]}, {name: [run] for name, run in beyond.items()})
    best = tuned(plan, results)
    assert (best["dense"], best["peer"]) == (runs["dense"][0], runs["peer"][1])
    wide = run_of_size(best["peer"], 64, 6e8, plan)
    assert wide.learning_rate == 0.01 and wide.ablation == best["peer"].ablation
    assert training_arguments(wide, plan)["seed"] == 3 and wide.steps < best["peer"].steps


def test_tuning_goes_beyond_the_best_rate_where_it_is_an_end():
    plan = plan_of(trials={"dense": [{"learning_rate": rate} for rate in (0.01, 0.02, 0.04)]})
    runs = tuning_runs(plan)
    assert runs_beyond(plan, with_losses({"dense": [2.0, 1.0, 2.0]}, runs)) == {}
    results = with_losses({"dense": [2.0, 2.0, 1.0]}, runs)
    beyond = runs_beyond(plan, results)["dense"]
    assert beyond.learning_rate == 0.0566
    assert tuned(plan, results | with_losses({"dense": [0.9]}, {"dense": [beyond]}))["dense"] == beyond


def test_a_variant_with_one_trial_is_not_tuned():
    plan = plan_of(trials={"dense": [{"learning_rate": 0.01}]})
    assert runs_to_tune(plan) == runs_beyond(plan, {}) == {}
    assert tuned(plan, {}) == {"dense": tuning_runs(plan)["dense"][0]}


def test_a_trial_without_changes_is_the_run_of_the_search():
    plan = plan_of(trials={"peer": [{"learning_rate": 0.01}, {"learning_rate": 0.01, "num_experts_per_head": 2}]})
    same, other = tuning_runs(plan)["peer"]
    assert same == search_runs(plan)["peer"][0] and other.name != same.name


def test_what_is_compared_was_not_chosen_by_its_seed():
    plan = plan_of(trials=TRIALS, seeds={"dense": [3], "peer": [1]}, hidden_sizes={"dense": [[32, 64]]})
    best = tuning_runs(plan)["dense"][0]
    assert [(run.hidden_size, run.seed) for run in size_runs(plan, best, 6e8)] == [(32, 0), (64, 0)]
    assert [run.seed for run in compared_runs(plan, best, 6e8)] == [2, 3, 4]


def test_at_equal_seconds_the_recipe_has_the_time_of_dense_at_each_width():
    plan = plan_of(**WITH_RECIPE | {"trials": TRIALS | {"recipe": [{"learning_rate": 0.01}] * 2}}, budgets=[6e11])
    best = {name: runs[0] for name, runs in tuning_runs(plan).items()}
    runs = runs_of_widths(plan, best, 6e11, lambda run: {"dense": 1.0, "recipe": 1.25}[run.variant] * run.hidden_size)
    assert runs["dense"] == size_runs(plan, best["dense"], 6e11)
    for dense, recipe in zip(*runs.values(), strict=True):
        assert dense.hidden_size == recipe.hidden_size and recipe.steps == round(dense.steps / 1.25)


def test_a_budget_is_not_spent_on_variants_without_sizes():
    plan = plan_of(trials=TRIALS, hidden_sizes={"dense": [[32]], "peer": [[]]})
    best = {name: runs[0] for name, runs in tuning_runs(plan).items()}
    assert list(runs_by_size(plan, best, 6e8)) == ["dense"]
    (only,) = runs_by_size(plan, best, 6e8)["dense"]
    assert choose_size([only], {}) == only  # needs no result


@pytest.mark.parametrize(("trial", "num_experts_per_head"), [(0, 4), (1, 2)])
def test_runs_that_differ_in_one_thing(trial, num_experts_per_head):
    trials = TRIALS | {"recipe": [{"learning_rate": 0.01}, TRIALS["peer"][0]]}
    plan = plan_of(**WITH_RECIPE | {"trials": trials}, nums_experts=[16, 64], dense_sizes=[32, 64])
    best = tuning_runs(plan)["recipe"][trial]
    few, many = (configuration_of(runs[0], plan) for runs in expert_runs(plan, best).values())
    assert (few.num_experts, many.num_experts) == (16, 64)
    different = {name for name, value in few.to_dict().items() if value != many.to_dict()[name]}
    assert different == {"num_experts"} and few.num_experts_per_head == num_experts_per_head and few.gated_experts
    assert {run.steps for run in dense_runs(plan, tuning_runs(plan)["dense"][0], best)} == {best.steps}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variants": SMALL["variants"] | {"other": {"parent": "none"}}}, "parents of 'other' must be other .*'none'"),
        (
            {"variants": SMALL["variants"] | {"one": {"parent": "two"}, "two": {"parent": "one"}}},
            "parents of 'one' must be other `variants`, but got \\['one'",
        ),
        ({"searched": ["dense"]}, "`searched` must name variants that have a `parent`, but 'dense' has none"),
        ({"combined": ["peer"]}, "`combined` must name variants that have a `parent`, but 'peer' has none"),
        ({"alternatives": [["peer"]]}, "`alternatives` must name some of `searched`, but got \\['peer'\\]"),
        ({"variants": RECIPE, "trials": TRIALS | {"recipe": TRIALS["peer"]}}, "`seeds` must have all .* lacks"),
        (
            WITH_RECIPE | {"hidden_sizes": SIZES | {"recipe": [[32]]}},
            "last `hidden_sizes` of the recipe must be those",
        ),
        (WITH_RECIPE | {"ingredients": ["peer"]}, "`ingredients` must not be in `trials`.*'peer'"),
        (
            WITH_RECIPE | {"variants": SMALL["variants"] | {"recipe": {"parent": "apart"}}},
            "recipe must have no `trial`, .* but has {'apart': True}",
        ),
        ({"searched": ["missing"]}, "`searched` must name some of `variants`, but got \\['missing'\\]"),
        ({"trials": TRIALS | {"gated": [{"learning_rate": 1}]}}, "equally many for all variants.*'gated': 1"),
        (
            {"hidden_sizes": {"dense": []}},
            "`hidden_sizes` of 'dense' must have one entry per budget, 1, but got \\[\\]",
        ),
        ({"seeds": {"dense": [1, 2]}}, "`seeds` of 'dense' must have one entry per budget"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        plan_of(**fields)


@pytest.mark.parametrize("file", sorted(PLANS.glob("*.json")), ids=lambda file: file.stem)
def test_committed_plans_make_models(file):
    plan = read_plan(file)
    for runs in search_runs(plan).values():
        assert isinstance(configuration_of(runs[0], plan), PeerConfig)
        assert training_flops(runs[0], plan) == pytest.approx(plan.budgets[0], rel=0.01)
