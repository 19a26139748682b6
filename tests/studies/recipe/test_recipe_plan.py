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
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub.errors import StrictDataclassError
from recipe_plans import PLANS, SMALL

from modeling_peer import PeerConfig
from studies.common.training_plan import (
    Run,
    changed_fields,
    configuration_of,
    training_arguments,
    training_flops,
)
from studies.recipe.__main__ import compare_at_equal_seconds, run_study
from studies.recipe.differences import Difference
from studies.recipe.plan import (
    BARS,
    BLOCK,
    FIRST_SEED,
    MOST_FACTORS,
    RecipePlan,
    check_models,
    choose,
    choose_rate,
    compared_runs,
    dense_runs,
    design_runs,
    expert_runs,
    factor_levels,
    factors_of,
    read_plan,
    run_of_size,
    runs_beyond,
    runs_by_size,
    runs_of_widths,
    runs_to_tune,
    screening_runs,
    search_runs,
    size_runs,
    transfer_runs,
    transfer_runs_beyond,
    tuned,
    tuning_runs,
)
from studies.recipe.report import is_adopted
from studies.recipe.results import Results


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


def test_factors_add_blocks_and_keep_those_that_there_are():
    factors = {"last": {"blocks": [2, 3]}, "first": {"blocks": [0]}, "narrow": {"feed_forward": "narrow_peer"}}
    design = {"variant": "gated", "factors": list(factors), "runs": 16, "seeds": [2, 1], "bar": "mean"}
    plan = plan_of(factors=factors, designs=[design], budgets=[6e11])
    for run in search_runs(plan):
        has = {name: name in factors_of(run) for name in factors}
        config, kind = configuration_of(run, plan), "narrow_peer" if has["narrow"] else "peer"
        blocks = [has["first"], True, has["last"], has["last"]]
        assert config.feed_forward_types == [kind if is_there else "dense" for is_there in blocks]
        assert config.gated_experts and run.variant == "gated"


def test_what_diverged_is_not_chosen():
    plan = plan_of(trials=TRIALS)
    runs = tuning_runs(plan)
    results = with_losses({"dense": [math.nan, 2.0], "peer": [2.0, math.nan]}, runs)
    for run in runs_beyond(plan, results).values():
        results[run.name] = {"losses": {"corpus": 3.0}}
    best = tuned(plan, results)
    assert (best["dense"], best["peer"]) == (runs["dense"][1], runs["peer"][0])


@pytest.mark.parametrize(
    ("effect", "expected"),
    [((0.02, 0.001), (True, True)), ((0.02, -0.001), (False, True)), ((0.009, 0.005), (False, False))],
)
def test_what_is_adopted(effect, expected):
    share, low = effect
    difference = Difference(share, 0.01, low, 2 * share - low)
    assert tuple(is_adopted(difference, bar) for bar in BARS) == expected


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


@pytest.mark.parametrize(
    ("tuned_size", "hidden_size", "multiplier"), [(64, 32, 4), (32, 32, 4), (32, 64, 8), (32, 96, 12)]
)
def test_in_wider_models_the_rate_of_output_tables_stays(tuned_size, hidden_size, multiplier):
    plan = plan_of(trials=TRIALS, hidden_size=tuned_size)
    run = run_of_size(tuning_runs(plan)["peer"][0], hidden_size, 6e8, plan)
    arguments = training_arguments(run, plan)
    assert arguments["down_proj_lr_multiplier"] == multiplier
    assert run.learning_rate == pytest.approx(0.01 * tuned_size / hidden_size, rel=1e-2)
    assert "down_proj_lr_multiplier" not in training_arguments(replace(run, variant="dense", ablation=None), plan)


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
    assert same == screening_runs(plan)["peer"] and other.name != same.name


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


def test_the_exponent_of_learning_rates_is_tried_at_a_larger_size():
    """The rate of the output tables, 0.01 · 0.5 · 8, stays."""
    trials = TRIALS | {"recipe": [{"learning_rate": 0.01, "training": {"down_proj_lr_multiplier": 8}}] * 2}
    plan = plan_of(
        **WITH_RECIPE | {"trials": trials, "transfer_size": 128, "exponents": {"recipe": 0.5}}, budgets=[6e11]
    )
    best = {name: runs[0] for name, runs in tuning_runs(plan).items()}
    runs = transfer_runs(plan, best)
    rates = [0.0025, 0.005, 0.01]
    assert {name: [run.learning_rate for run in own] for name, own in runs.items()} == {
        "dense": rates,
        "recipe": rates,
    }
    for run in (*runs["dense"], *runs["recipe"]):
        assert (run.hidden_size, run.seed) == (128, 0)
        assert training_flops(run, plan) == pytest.approx(6e11, rel=0.01)
    assert len({run.name for run in runs["recipe"]}) == 3 and plan.tuned_changes(runs["recipe"][1])["training"]
    for run, multiplier in zip(runs["recipe"], (32, 16, 8), strict=True):
        assert training_arguments(run, plan)["down_proj_lr_multiplier"] == multiplier
    losses = with_losses({"dense": [1, 2, 3], "recipe": [3, 2, 1]}, runs)
    assert {name: run.learning_rate for name, run in transfer_runs_beyond(plan, best, losses).items()} == {
        "dense": 0.00125,
        "recipe": 0.02,
    }
    middle = with_losses({"dense": [2, 1, 3], "recipe": [2, 1, 3]}, runs)
    assert transfer_runs_beyond(plan, best, middle) == {}
    assert transfer_runs(plan_of(**WITH_RECIPE), best) == {}
    level = with_losses({"dense": [1.02, 1.009, 1.0], "recipe": [1.011, 1.01, 1.0]}, runs)
    assert [choose_rate(own, level) for own in runs.values()] == [runs["dense"][1], runs["recipe"][2]]


def test_larger_sizes_have_learning_rates_by_the_exponent_of_the_plan():
    trials = TRIALS | {"recipe": [{"learning_rate": 0.01, "training": {"down_proj_lr_multiplier": 8}}] * 2}
    plan = plan_of(**WITH_RECIPE | {"trials": trials, "exponents": {"recipe": 0.5}}, hidden_size=64)
    best = {name: runs[0] for name, runs in tuning_runs(plan).items()}
    sizes = {
        name: [run_of_size(best[name], size, 6e8, plan) for size in (32, 64, 128)] for name in ("dense", "recipe")
    }
    assert {name: [run.learning_rate for run in runs] for name, runs in sizes.items()} == {
        "dense": [0.02, 0.01, 0.005],
        "recipe": [0.02, 0.01, 0.00707],
    }
    multipliers = [training_arguments(run, plan)["down_proj_lr_multiplier"] for run in sizes["recipe"]]
    assert multipliers == pytest.approx([8, 8, 8 * 2**0.5])


def test_at_equal_seconds_the_recipe_has_the_trial_that_is_best_there():
    """The tuning may have chosen another, whose steps take longer."""
    trials = TRIALS | {"recipe": [{"learning_rate": 0.01, "num_experts_per_head": 2}, {"learning_rate": 0.01}]}
    plan = plan_of(**WITH_RECIPE | {"trials": trials, "timed_trials": [1, 0]}, budgets=[6e11])
    seconds = {"64": {"seconds": {"dense": [6.0], "recipe-tuning=0": [8.0], "recipe": [12.0]}}}
    runs = tuning_runs(plan)
    results = Results(plan, with_losses({"dense": [4, 5], "peer": [3, 5], "recipe": [3, 2]}, runs), seconds, {})
    results.runs |= {run.name: {"losses": {"corpus": 9}} for run in runs_beyond(plan, results.runs).values()}
    assert results.best["dense"] == runs["dense"][0] and results.best["recipe"] == runs["recipe"][1]
    sizes = runs_by_size(plan, results.best, 6e11)
    results.runs = {run.name: {"losses": {"corpus": 9}} for own in sizes.values() for run in own} | results.runs
    dense = sizes["dense"][1]  # the larger size is the better one
    results.runs[dense.name] = {"losses": {"corpus": 1}}
    slow, fast = timed = results.runs_of_timed_trials()
    assert [run.ablation for run in timed] == [None, ("tuning", "0")]
    assert [(run.hidden_size, run.learning_rate) for run in timed] == [(64, 0.005)] * 2
    assert (slow.steps, fast.steps) == (round(dense.steps / 2), round(dense.steps * 3 / 4))
    seconds["32"] = {"seconds": {"dense": [3.0], "recipe-tuning=0": [4.0], "recipe": [6.0]}}
    assert results.best_at_equal_seconds == {}
    results.runs |= with_losses({"recipe": [3, 2.9]}, {"recipe": timed})
    assert results.best_at_equal_seconds == {"dense": runs["dense"][0], "recipe": runs["recipe"][0]}
    widths = results.runs_of_widths()
    assert widths["recipe"][1] == fast and dense in widths["dense"]  # made already
    assert {run.ablation for run in widths["recipe"]} == {("tuning", "0")}
    assert [run.steps for run in widths["recipe"]] == [round(run.steps * 3 / 4) for run in widths["dense"]]
    seconds["32"]["seconds"].pop("recipe")
    assert results.best_at_equal_seconds == {}  # one of the trials has not been timed at the smaller size


def test_at_equal_seconds_one_width_needs_no_choice():
    rates = {name: [{"learning_rate": 0.01}] for name in ("dense", "peer", "recipe")}
    plan = plan_of(
        **WITH_RECIPE
        | {"trials": rates, "hidden_sizes": {name: [[32]] for name in rates}, "sizes_at_equal_seconds": [32]}
    )
    results = Results(plan, {}, {"32": {"seconds": {"dense": [1.0], "recipe": [1.25]}}}, {})
    asked = []
    study = SimpleNamespace(seconds=dict, all_results=lambda: results, make=lambda runs, _: asked.extend(runs))
    compare_at_equal_seconds(study)
    assert sorted((run.variant, run.seed) for run in asked) == [
        (name, s) for name in ("dense", "recipe") for s in (3, 4)
    ]
    assert results.compared_at_equal_seconds() == {}
    results.runs = dict.fromkeys(run.name for run in asked)
    dense, recipe = results.compared_at_equal_seconds().values()
    assert recipe[0].steps == round(dense[0].steps / 1.25) and results.compared_at_widths() == {}


def test_the_plan_for_a_gpu_makes_three_runs():
    plan, asked = read_plan(PLANS / "one-gpu.json"), []
    seconds = {"768": {"seconds": {"dense": [1.0], "recipe": [1.25]}}}
    study = SimpleNamespace(
        plan=plan,
        seconds=dict,
        make=lambda runs, _: asked.extend(runs) or {},
        all_results=lambda: Results(plan, {}, seconds, {}),
    )
    run_study(study)
    dense, recipe, in_the_seconds_of_dense = dict.fromkeys(asked)
    assert {run.seed for run in asked} == {FIRST_SEED} and dense.hidden_size >= 512
    assert (dense.variant, recipe.variant) == ("dense", "recipe")
    assert in_the_seconds_of_dense == replace(recipe, steps=round(dense.steps / 1.25))
    assert training_flops(dense, plan) == pytest.approx(training_flops(recipe, plan), rel=0.01)
    tokens = [round(run.steps * plan.tokens_of_step / 1e6) for run in (recipe, dense)]
    page = " ".join((PLANS.parents[3] / "docs" / "on-a-gpu.md").read_text().split())
    assert "That is {} million tokens for the recipe and {} million for dense,".format(*tokens) in page


def test_a_budget_is_not_spent_on_variants_without_sizes():
    plan = plan_of(trials=TRIALS, hidden_sizes={"dense": [[32]], "peer": [[]]})
    best = {name: runs[0] for name, runs in tuning_runs(plan).items()}
    assert list(runs_by_size(plan, best, 6e8)) == ["dense"]
    (only,) = runs_by_size(plan, best, 6e8)["dense"]
    assert choose([only], {}) == only  # needs no result


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
        ({"screened": ["dense"]}, "`screened` must name variants that have a `parent`, but 'dense' has none"),
        ({"variants": RECIPE, "trials": TRIALS | {"recipe": TRIALS["peer"]}}, "`seeds` must have all .* lacks"),
        *(
            (
                WITH_RECIPE | {"sizes_at_equal_seconds": sizes},
                "`sizes_at_equal_seconds` must be some of the last .*32, 64",
            )
            for sizes in ([], [32, 48])
        ),
        (
            WITH_RECIPE | {"variants": SMALL["variants"] | {"recipe": {"parent": "apart"}}},
            "recipe must have no `trial`, .* but has {'apart': True}",
        ),
        ({"designs": [{"variant": "peer"}]}, "`designs` must have \\['variant', .* each, but got \\['variant'\\]"),
        ({"designs": [MANY | {"factors": ["none"]}]}, "`designs` must name some of `factors`, but got \\['none'\\]"),
        *(
            ({"factors": EIGHT, "designs": [MANY | changed]}, "`designs` must be of one of `variants`, have 16 runs")
            for changed in (
                {"factors": list(EIGHT)},
                {"factors": ["0"]},
                {"runs": 8},
                {"seeds": [0]},
                {"bar": "none"},
                {"variant": "none"},
            )
        ),
        ({"screened": ["missing"]}, "`screened` must name some of `variants`, but got \\['missing'\\]"),
        ({"trials": TRIALS | {"gated": [{"learning_rate": 1}]}}, "equally many for all variants.*'gated': 1"),
        (
            {"hidden_sizes": {"dense": []}},
            "`hidden_sizes` of 'dense' must have one entry per budget, 1, but got \\[\\]",
        ),
        (WITH_RECIPE | {"transfer_size": 32}, "`transfer_size` must be larger than `hidden_size`, 32, but got 32"),
        (WITH_RECIPE | {"timed_trials": []}, "`timed_trials` must be numbers of .* from 0 to 1, but got \\[\\]"),
        (WITH_RECIPE | {"timed_trials": [0, 2]}, "`timed_trials` must be numbers of .* but got \\[0, 2\\]"),
        ({"seeds": {"dense": [1, 2]}}, "`seeds` of 'dense' must have one entry per budget"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        plan_of(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"nums_experts": [64, 9]},  # less than k² of the first trial
        {
            "trials": TRIALS
            | {"recipe": [{"learning_rate": 0.01, "num_experts_per_head": 16}, {"learning_rate": 0.02}]}
        },
        {"hidden_sizes": SIZES | {"recipe": [[32, 40]], "dense": [[32, 40]]}},  # no multiple of the head size
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
