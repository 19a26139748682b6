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
"""The committed results of the recipe study are those of its plan."""

import json
import math
from contextlib import suppress
from itertools import pairwise
from statistics import median
from types import SimpleNamespace

import pytest
from recipe_plans import PLANS

from studies.common.single_run import comparable
from studies.common.training_plan import CORPUS, DENSE, Run, merge_changes
from studies.common.training_study import TimeIsUp
from studies.recipe.__main__ import run_study
from studies.recipe.cards import make_cards
from studies.recipe.differences import SizeCurve
from studies.recipe.plan import (
    RECIPE,
    choose_rate,
    read_plan,
    run_of_size,
    runs_by_size,
    screening_runs,
    tuning_runs,
    with_factors,
)
from studies.recipe.plots import PLOTS
from studies.recipe.report import describe, is_adopted, table_of_dense_sizes, table_of_seeds
from studies.recipe.results import read_results
from studies.recipe.study import Study


def runs_asked_for(results, plan):
    """The runs of the study by their names, up to the step that lacks results."""
    asked = {}

    def make(runs, _):
        asked.update({run.name: run for run in runs})
        if not results.are_made(runs):
            raise TimeIsUp
        return results.runs

    def seconds():
        if not results.seconds:
            raise TimeIsUp

    study = SimpleNamespace(plan=plan, make=make, seconds=seconds, all_results=lambda: results)
    with suppress(TimeIsUp):
        run_study(study)
    return asked


def test_every_run_was_made_as_planned(tmp_path):
    results = read_results(PLANS.parent / "results.json")
    plan = read_plan(PLANS / "two-cores.json")
    study = Study(plan, tmp_path, 1)
    planned = runs_asked_for(results, plan)
    made = {name: run for name, run in planned.items() if name in results.runs}
    assert made.keys() == results.runs.keys() >= {run.name for run in screening_runs(plan).values()}
    for name, run in made.items():
        result = results.runs[name]
        assert comparable(result["run_clm"]) == comparable(study.arguments(run)), name
        assert result["trial"] == plan.trial_of(run)
        assert result["losses"].keys() == {CORPUS, *plan.evaluation_texts}
        for text, documents in results.documents.items():
            assert len(documents) == len(result["sequence_losses"][text]) == plan.eval_sequences
    page = (PLANS.parent / "README.md").read_text()
    assert describe(results).replace("## ", "### ").strip() in page


def test_the_recipe_is_what_the_last_design_adopted():
    results = read_results(PLANS.parent / "results.json")
    plan, design = results.plan, results.plan.designs[-1]
    adopted = [name for name in design["factors"] if is_adopted(results.effects(design)[name], design["bar"])]
    changes = [
        with_factors(merge_changes(*plan.lineage(variant)), [plan.factors[name] for name in factors])
        for variant, factors in ((design["variant"], adopted), (RECIPE, []))
    ]
    expected, found = ({name: each[name] for name in each if name != "parent"} for each in changes)
    assert found == expected and adopted


def test_exponents_of_learning_rates_are_those_that_the_table_chooses():
    results = read_results(PLANS.parent / "results.json")
    plan = results.plan
    for variant, runs in results.compared_rates().items():
        chosen, tuned = choose_rate(runs, results.runs), results.best[variant]
        ratio = chosen.hidden_size / tuned.hidden_size
        exponent = math.log(tuned.learning_rate / chosen.learning_rate) / math.log(ratio)
        assert exponent == pytest.approx(plan.exponents.get(variant, 1.0), abs=0.01)
    # Those that were not tried have that of dense, or, with tables, that of the recipe.
    assert {name for name in plan.exponents if name not in results.compared_rates()} == {"pkm", "peer"}
    assert plan.exponents["pkm"] == plan.exponents["peer"] == plan.exponents[RECIPE]


def test_steps_are_timed_with_the_rates_of_the_runs(tmp_path, monkeypatch):
    results = read_results(PLANS.parent / "results.json")
    plan = results.plan
    study = Study(plan, tmp_path, 1)
    monkeypatch.setattr(study, "all_results", lambda: results)
    timed = study.timed_runs()
    assert list(timed) == ["80", "128"]
    for size, (dense, *recipes) in timed.items():
        for run in (dense, *recipes):
            rate = run_of_size(results.best[run.variant], int(size), plan.budgets[0], plan).learning_rate
            assert (run.hidden_size, run.steps, run.learning_rate) == (int(size), 1, rate)
        assert dense.variant == "dense" and [run.ablation for run in recipes] == [("tuning", "3"), ("tuning", "4")]


def in_words(difference):
    return f"{100 * difference.share:.1f} % below dense ({100 * difference.low:.1f} to {100 * difference.high:.1f} %)"


def across_zero(difference):
    return f"{100 * difference.share:.1f} % below dense ({100 * difference.low:.1f} to {100 * difference.high:+.1f} %)"


def test_what_the_page_says_of_equal_compute_is_what_was_found():
    results, page = read_results(PLANS.parent / "results.json"), (PLANS.parent / "README.md").read_text()
    page = " ".join(page.split())
    small, large = (results.compared(budget) for budget in results.plan.budgets)
    assert f"At 2e13 FLOPs the recipe is {in_words(results.below(small[RECIPE], small[DENSE]))}, at 1e14 " in page
    assert f", at 1e14 {in_words(results.below(large[RECIPE], large[DENSE]))}:".replace(" below dense", "") in page
    falls = {
        variant: [parts[0] - parts[-1] for parts in (results.part_losses([run]) for run in runs)]
        for variant, runs in large.items()
    }
    perplexities = [results.perplexity([run]) for run in large[DENSE]]
    seeds = [run.seed for run in large[DENSE]]
    (other,) = (seed for seed, fall in zip(seeds, falls[DENSE], strict=True) if fall < 0.3)
    place = seeds.index(other)
    fall, perplexity = falls[DENSE].pop(place), perplexities.pop(place)
    assert f"falls by {min(falls[DENSE]):.2f} to {max(falls[DENSE]):.2f} nats." in page
    assert f"With seed {other} it falls by {fall:.2f}, and perplexity is {perplexity:.2f} in place of" in page
    assert f"in place of {min(perplexities):.2f} to {max(perplexities):.2f}." in page
    assert f"with falls of {min(falls[RECIPE]):.2f} to {max(falls[RECIPE]):.2f}." in page
    alike = ([run for run in large[variant] if run.seed != other] for variant in (RECIPE, DENSE))
    assert f"the recipe is {in_words(results.below(*alike))}." in page
    sizes = runs_by_size(results.plan, results.best, results.plan.budgets[-1])[DENSE]
    best, *others = sorted(results.corpus_perplexity([run]) for run in sizes)
    said = f"alone came to {best:.2f} on the corpus, the others to {others[0]:.2f} to {others[-1]:.2f}."
    assert f"{results.chosen(results.plan.budgets[-1])[DENSE].hidden_size} {said}" in page


def test_what_the_page_says_of_other_feed_forwards_is_what_was_found():
    results, page = read_results(PLANS.parent / "results.json"), (PLANS.parent / "README.md").read_text()
    runs, page = results.compared(results.plan.budgets[0]), " ".join(page.split())
    found = {variant: results.below(runs[RECIPE], own) for variant, own in runs.items() if variant != RECIPE}
    errors = {
        variant: f"{-math.log(1 - each.share) / each.error:.1f} standard errors" for variant, each in found.items()
    }
    said = {variant: in_words(each).replace(" below dense", "") for variant, each in found.items()}
    assert f"Below MoE by {said['moe-token-choice']}, {errors['moe-token-choice']}, and below `peer` in all" in page
    assert f"in all blocks by {said['peer']}, {errors['peer']}." in page
    assert (
        f"gated memory by {100 * found['pkm-gated'].share:.1f} %, {errors['pkm-gated']}, which the aim asks for"
        in page
    )
    low, high = (100 * value for value in (found["pkm-gated"].low, found["pkm-gated"].high))
    assert f"includes zero ({low:.1f} to {high:+.1f} %)" in page
    share, low, high = (100 * value for value in (found["pkm"].share, found["pkm"].low, found["pkm"].high))
    assert f"is {share:.1f} % below it ({low:.1f} to {high:+.1f} %), {errors['pkm']}, with" in page
    own, of_pkm = (results.runs[runs[variant][0].name]["parameters"] for variant in (RECIPE, "pkm"))
    assert f"with {own / of_pkm:.1f} times as many parameters." in page


def test_what_the_page_says_of_each_ingredient_is_what_was_found():
    results, page = read_results(PLANS.parent / "results.json"), (PLANS.parent / "README.md").read_text()
    page = " ".join(page.split())
    first, second = (results.effects(design) for design in results.plan.designs)

    def said(effect):
        low, high = 100 * effect.low, 100 * effect.high
        return f"{100 * effect.share:.1f} % ({low:.1f} to {f'{high:.1f}' if low > 0 else f'{high:+.1f}'} %)"

    assert f"PEER in the last two blocks too {said(second['last two blocks'])}, in the first one too" in page
    assert (
        f"in the first one too {said(second['first block'])}, own sub-keys {said(second['own sub-keys'])}, two" in page
    )
    assert f"in place of four of k = 16 {said(first['two heads'])}." in page
    _, whole, _, half, twice = (results.corpus_perplexity([run]) for run in tuning_runs(results.plan)[RECIPE])
    assert f"half the rate of v is worth {1 - half / whole:.1%} ({whole:.2f} to {half:.2f})".replace("%", " %") in page
    assert f"k = 64 in place of 32 {1 - twice / half:.1%} ({half:.2f} to {twice:.2f})".replace("%", " %") in page


def test_what_the_page_says_of_equal_seconds_is_what_was_found():
    results, page = read_results(PLANS.parent / "results.json"), (PLANS.parent / "README.md").read_text()
    dense = results.dense_of_seconds()
    few, many = results.runs_of_timed_trials()
    texts, corpus = (-results.below([few], [dense]).share, results.below_on_the_corpus(few, dense))
    said = f"is {100 * texts:.1f} % above dense with d = 80 on the five texts and {100 * corpus:.1f} % below it on the corpus;"
    page = " ".join(page.split())
    assert said in page
    assert results.below([many], [dense]).share < 0 > results.below_on_the_corpus(many, dense)
    (_, wide), (_, wide_recipe) = results.compared_at_widths().values()
    assert wide.hidden_size == wide_recipe.hidden_size == 128
    texts, corpus = results.below([wide_recipe], [dense]).share, results.below_on_the_corpus(wide_recipe, dense)
    assert f"it is {100 * texts:.1f} % below it on the five texts and {100 * corpus:.1f} % on the corpus." in page
    first, *_, last = results.part_losses([wide])
    assert f"the recipe is {100 * results.below([wide_recipe], [wide]).share:.1f} % below it, and" in page
    assert f"its loss falls by {first - last:.2f} nats along a sequence" in page
    seconds = [[results.step_seconds(run) for run in pair] for pair in ((dense, few), (wide, wide_recipe))]
    short, long = (recipe / of_dense for of_dense, recipe in seconds)
    assert f"its steps take {long:.2f} times as long as those of dense in place of {short:.2f} times." in page
    compared = results.compared_at_equal_seconds()
    assert [runs[0].hidden_size for runs in compared.values()] == [80, 128]
    found = results.below(compared[RECIPE], compared[DENSE])
    ahead = [
        results.below(list(pair[:1]), list(pair[1:])).share
        for pair in zip(compared[RECIPE], compared[DENSE], strict=True)
    ]
    assert f"the recipe is {across_zero(found)} after the seconds that dense takes for 1e14 FLOPs, and" in page
    assert f"ahead with each seed, by {100 * min(ahead):.1f} % at least." in page and min(ahead) > 0 > found.low
    alike = [[run for run in compared[variant] if run.seed != 4] for variant in (RECIPE, DENSE)]
    assert f"the recipe is {across_zero(results.below(*alike)).replace(' dense', '')}." in page
    of_corpus = [100 * results.below_on_the_corpus(*pair) for pair in zip(*alike, strict=True)]
    assert f"it is {min(of_corpus):.1f} to {max(of_corpus):.1f} % below dense with these seeds." in page


def test_what_the_page_says_of_numbers_of_experts_is_what_was_found():
    results, page = read_results(PLANS.parent / "results.json"), (PLANS.parent / "README.md").read_text()
    page, runs = " ".join(page.split()), results.by_num_experts()
    assert [len(own) for own in runs.values()] == [1] * 4
    falls = [100 * results.below(more, fewer).share for fewer, more in pairwise(runs.values())]
    few, some, many, most = (f"{number:,}" for number in runs)
    assert f"from {few} to {some} experts in each block perplexity falls by {falls[0]:.1f} %, to {many}" in page
    assert f"to {many} it rises by {-falls[1]:.1f} %, to {most} it falls by {falls[2]:.1f} %," in page
    first, *_, last = perplexities = [results.perplexity(own) for own in runs.values()]
    assert "from {:.2f} to {:.2f}, {:.2f} and {:.2f}.".format(*perplexities) in page
    seeds = results.compared(results.plan.budgets[0])[RECIPE]
    of_seeds = [results.perplexity([run]) for run in seeds]
    assert of_seeds[0] == max(of_seeds) and seeds[0].seed == runs[16384][0].seed
    apart, own = 100 * (max(of_seeds) / min(of_seeds) - 1), results.perplexity(seeds)
    assert f"are up to {apart:.1f} % apart and come to {own:.2f} in the mean, as good as the one run with" in page
    assert own == pytest.approx(last, rel=1e-3)
    (least,), *_, (run,) = runs.values()
    flops = results.runs[run.name]["training_flops"] / results.runs[least.name]["training_flops"] - 1
    corpus = results.below_on_the_corpus(run, least)
    said = (
        f"it is {100 * (1 - last / first):.1f} %, and {100 * corpus:.1f} % on the corpus, for {100 * flops:.0f} % more"
    )
    assert f"{said} FLOPs." in page


def test_what_the_page_says_of_dense_sizes_is_what_was_found():
    results, page = read_results(PLANS.parent / "results.json"), (PLANS.parent / "README.md").read_text()
    page = " ".join(page.split())
    recipe, dense = results.dense_sizes()
    sizes = [results.active_parameters(run) / results.active_parameters(recipe) for run in dense]
    perplexities = [results.perplexity([run]) for run in dense]
    own, tokens = results.perplexity([recipe]), recipe.steps * results.plan.tokens_of_step
    assert own < min(perplexities) == perplexities[-1]
    assert f"One of more than {sizes[-1]:.1f} times the recipe's active parameters, which is the largest" in page
    said = f"dense with d = {dense[-1].hidden_size} comes to {perplexities[-1]:.2f} on the five texts, the recipe with"
    assert f"on the same {tokens / 1e6:.1f} M tokens {said} d = {recipe.hidden_size} to {own:.2f}," in page
    texts, corpus = results.below([recipe], dense[-1:]).share, results.below_on_the_corpus(recipe, dense[-1])
    flops = [results.runs[run.name]["training_flops"] for run in (dense[-1], recipe)]
    said = f"which is {100 * texts:.1f} % below, and {100 * corpus:.1f} % on the corpus. That dense model takes"
    assert f"{said} {flops[0] / flops[1]:.1f} times as many FLOPs." in page
    assert f"The recipe reads like a dense model of more than {sizes[-1]:.2f} times its active parameters," in page
    gain = 100 * (1 - perplexities[-1] / perplexities[0])
    assert f"{gain:.1f} % from {dense[0].hidden_size} to {dense[-1].hidden_size}, and neither these" in page
    other_numbers = [run for (run,) in results.by_num_experts().values() if run != recipe]
    falls = [parts[0] - parts[-1] for parts in (results.part_losses([run]) for run in (*dense, *other_numbers))]
    assert f"along a sequence losses fall by {min(falls):.2f} to {max(falls):.2f} nats." in page


def test_what_the_page_says_first_is_what_was_found():
    results, page = read_results(PLANS.parent / "results.json"), (PLANS.parent / "README.md").read_text()
    short = " ".join(page.partition("**In short**")[2].partition("\n\n")[0].split())
    small, large = (results.compared(budget) for budget in results.plan.budgets)
    share, interval = in_words(results.below(small[RECIPE], small[DENSE])).split(" below dense ")
    assert f"is {share} below dense in perplexity {interval} with 2e13 FLOPs" in short
    assert f"{in_words(results.below(large[RECIPE], large[DENSE]))} with 1e14".replace(" below dense", "") in short
    compared = results.compared_at_equal_seconds()
    found = results.below(compared[RECIPE], compared[DENSE])
    assert f"it is {across_zero(found)}, so not beyond doubt" in short
    numbers = list(results.by_num_experts().values())
    assert min(results.below(more, fewer).share for fewer, more in pairwise(numbers)) < 0
    assert "More experts are not better with each step." in short


def test_what_the_page_says_of_sizes_is_what_was_trained():
    results, page = read_results(PLANS.parent / "results.json"), (PLANS.parent / "README.md").read_text()
    page, dense_sizes = " ".join(page.split()), [run.name for run in results.dense_sizes()[1]]
    active = [run["active_parameters"] / 1e6 for run in results.runs.values()]
    assert f"the models have {min(active):.1f} to {max(active):.1f} million active parameters" in page
    tokens = {True: [], False: []}  # whether of the larger budget
    for name, run in results.runs.items():
        is_large = run["training_flops"] > 4e13 and name not in dense_sizes
        tokens[is_large].append(run["steps"] * results.plan.tokens_of_step / 1e6)
    small, large = (f"{min(tokens[each]):.0f} to {max(tokens[each]):.0f} M" for each in (False, True))
    said = (
        f"train on {small} tokens of English documentation and prose at 2e13 and for dense sizes, on {large} at 1e14,"
    )
    assert said in page
    assert f"have 0.2 to {max(active):.1f} M active" in (PLANS.parents[3] / "docs" / "quality.md").read_text()


def test_what_the_page_says_of_step_times_is_what_was_measured():
    """Of each width by its ratio to dense, and of the second time of one of them by its ratio to the first."""
    results, page = read_results(PLANS.parent / "results.json"), (PLANS.parent / "README.md").read_text()
    page = " ".join(page.split())
    again = json.loads((PLANS.parent / "step_times_again.json").read_text())["seconds"]
    narrow, wide = ([median(times) for times in results.seconds[size]["seconds"].values()] for size in ("64", "80"))
    dense, few, many = (f"{1e3 * seconds:.0f}" for seconds in narrow)
    assert f"with d = 64 a step took {dense} ms of dense and {few} and {many} ms of the recipe" in page
    ratios = [[f"{seconds / of_size[0]:.2f}" for seconds in of_size[1:]] for of_size in (narrow, wide)]
    said = " times as long, with 80 ".join(" and ".join(of_size) for of_size in ratios)
    assert f"so {said} times, and at equal FLOPs" in page
    assert list(again) == list(results.seconds["80"]["seconds"])
    dense, few, _ = (median(times) / first for times, first in zip(again.values(), wide, strict=True))
    longer = f"dense took {dense - 1:.1%} and the recipe with k = 32 {few - 1:.1%} longer then.".replace("%", " %")
    assert longer in page
    assert f"get {1 - 1 / dense:.1%} fewer steps".replace("%", " %") in page
    assert f"the recipe with 80 {few / dense - 1:.1%} more.".replace("%", " %") in page


def test_the_table_of_seeds_has_each_run_of_a_mean():
    results = read_results(PLANS.parent / "results.json")
    budget = results.plan.budgets[0]
    runs = results.compared(budget)
    _, _, *rows = table_of_seeds(results, budget).splitlines()
    for (variant, own), row in zip(runs.items(), rows, strict=True):
        name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        assert name == variant and [bool(cell) for cell in cells] == [seed < len(own) for seed in range(5)]
        found = [float(cell) for cell in cells if cell]
        assert found == pytest.approx([results.perplexity([run]) for run in own], abs=0.005)
        assert math.prod(found) ** (1 / len(found)) == pytest.approx(results.perplexity(own), abs=0.01)


def test_pictures_and_cards_are_those_of_the_results(tmp_path):
    results, page = read_results(PLANS.parent / "results.json"), (PLANS.parent / "README.md").read_text()
    for name, plot in PLOTS.items():
        is_there = (PLANS.parent / f"{name}.png").exists()
        assert is_there == (f"({name}.png)" in page) == plot(results, tmp_path / "drawn.png")
    folder = PLANS.parents[3] / "model_cards" / "recipe"
    assert {file.name: file.read_text() for file in folder.iterdir()} == {
        f"{name}.md": str(card) for name, card in make_cards(results).items()
    }


def test_models_that_diverged_have_no_card():
    results = read_results(PLANS.parent / "results.json")
    assert {"dense-2e13-flops", "recipe-2e13-flops"} <= make_cards(results).keys()
    assert "trial 5 of the tuning" in str(make_cards(results)["recipe-2e13-flops"])
    losses = results.runs[results.compared(2e13)["dense"][1].name]["losses"]
    losses |= dict.fromkeys(losses, math.nan)
    cards = make_cards(results)
    assert "dense-2e13-flops" not in cards and "recipe-2e13-flops" in cards


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (
            2.05,
            "of 4.00 times its active parameters, 4.00 M, by the curve 2.000 + 100 · n^-0.5 of n active parameters.",
        ),
        (2.03, "of more than 9.00 times its active parameters, beyond the largest of these."),
        (2.0, "of more than 9.00 times its active parameters, beyond the largest of these."),
    ],
)
def test_a_size_beyond_the_dense_models_is_said_to_be_one(loss, said):
    dense, recipe = [Run("dense", size, 1, 0.01) for size in (2, 9)], Run("recipe", 1, 1, 0.01)
    results = SimpleNamespace(
        dense_sizes=lambda: (recipe, dense),
        dense_curve=lambda: SizeCurve(2.0, 100.0, 0.5),
        active_parameters=lambda run: run.hidden_size * 1_000_000,
        losses=lambda runs: [loss if run == recipe else 2.1 for run in runs],
    )
    assert f"The recipe reads like a dense model {said}" in table_of_dense_sizes(results)
