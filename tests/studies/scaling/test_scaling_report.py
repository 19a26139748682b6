# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables, plots and model cards that the scaling study makes of results."""

import json
import math

import pytest
from huggingface_hub import ModelCard
from scaling_plans import PLAN

from studies.common.trained_models import mean_perplexities
from studies.common.training_plan import CORPUS, PEER, run_of_budget
from studies.scaling.cards import make_cards
from studies.scaling.plan import (
    choose_rates,
    choose_sizes,
    rate_runs,
    reference_run,
    repeated_ablation_runs,
    size_runs,
    with_seeds,
)
from studies.scaling.report import (
    Results,
    table_of_perplexities,
    table_of_seconds,
)


def made_of(losses, run, plan=PLAN):
    """A result with the same loss on every text, from `losses(run)`; after training a change costs 0.3."""
    texts = dict.fromkeys([CORPUS, *plan.evaluation_texts], losses(run))
    result = {"losses": texts, "train_history": [[10 * i, 9 - i] for i in range(1, 5)], "after_training": {}}
    if run.variant in ("peer", "pkm"):
        usage = {"usage": 0.9, "unevenness": 1.5, "top1_usage": 0.4, "unused": 7, "histogram": [10] * 28}
        result["usage"] = {"layers.1.mlp": usage}
    if run.variant == "moe-expert-choice":
        result["losses_as_trained"] = {name: loss - 0.5 for name, loss in texts.items()}
    if run.variant == PEER and run.ablation is None and run.hidden_size == plan.reference_hidden_size:
        changed = {name: loss + 0.3 for name, loss in texts.items()}
        changes = plan.after_training.items()
        result["after_training"] = {name: {"fields": fields, "losses": changed} for name, fields in changes}
    return result


def study_of(losses, plan=PLAN):
    """Results of a whole study in which runs have the losses that the function gives them."""
    runs = {run.name: made_of(losses, run) for run in rate_runs(plan)}
    rates = choose_rates(plan, runs)
    sizes = [run for budget in plan.budgets for run in size_runs(plan, rates, budget)]
    repeated = [each for run in [*sizes, reference_run(plan, rates)] for each in with_seeds(run, plan)]
    runs |= {run.name: made_of(losses, run) for run in [*sizes, *repeated, *repeated_ablation_runs(plan, rates)]}
    # A step of PEER takes twice as long: medians, with one repetition far off.
    times = {"machine": {"cores": 2}, "seconds": {"dense": [0.1, 0.1, 9.0], PEER: [0.2, 0.2, 9.0]}}
    seconds = {str(size): times for size in plan.all_sizes}
    results = Results(plan, runs, seconds)
    for budget in plan.budgets:
        for run in with_seeds(results.equal_seconds(budget)[1], plan):
            runs.setdefault(run.name, made_of(losses, run))
    return results


BEST = {"dense": 96, "moe-expert-choice": 64, "moe-token-choice": 64, "pkm": 128, "peer": 32}


def losses_with_optimum(run):
    """The lowest loss is that of `BEST`, and of a rate of 0.004; PEER's is lower by 0.2, each seed's higher by 0.1."""
    away = abs(math.log2(run.hidden_size / BEST[run.variant])) + abs(math.log2(run.learning_rate / 0.004))
    return 5.0 + away - 0.2 * (run.variant == PEER) + 0.1 * run.seed - 0.05 * (run.ablation is not None)


@pytest.fixture(scope="module")
def results():
    return study_of(losses_with_optimum)


class TestReport:
    def test_rates_and_sizes_are_those_with_the_lowest_loss(self, results):
        assert results.rates == dict.fromkeys(PLAN.variants, 0.004)
        for budget in PLAN.budgets:
            assert {variant: run.hidden_size for variant, run in results.optimal(budget).items()} == BEST

    def test_sizes_are_chosen_by_the_corpus_alone(self, results):
        budget = PLAN.budgets[0]
        runs = json.loads(json.dumps(results.runs))
        other = run_of_budget("dense", 64, budget, 0.004, PLAN)
        runs[other.name]["losses"].update(dict.fromkeys(PLAN.evaluation_texts, 0.0))
        assert choose_sizes(PLAN, results.rates, budget, runs)["dense"].hidden_size == BEST["dense"]

    def test_perplexities_are_means_over_seeds(self, results):
        table = table_of_perplexities(results, PLAN.budgets[0])
        row = next(line for line in table.split("\n") if line.startswith("| PEER"))
        values = [math.exp(4.8 + 0.1 * seed) for seed in (1, 2, 3)]  # the size was chosen with seed 0
        mean = sum(values) / 3
        deviation = (sum((value - mean) ** 2 for value in values) / 2) ** 0.5
        assert row.count(f"{mean:.2f} ± {deviation:.2f}") == 7  # six texts, and the mean over five of them
        # Of both the perplexity varies over seeds by the same share.
        share = math.exp(-0.2) * 2**0.5 * deviation / mean
        assert row.endswith(f"| {1 - math.exp(-0.2):.1%} ± {share:.1%} |")
        assert results.deviations(PLAN.budgets[0])[PEER] == pytest.approx(share)

    def test_the_mean_is_geometric_and_leaves_the_corpus_out(self, results):
        run = results.optimal(PLAN.budgets[0])["dense"]
        runs = json.loads(json.dumps(results.runs))
        losses = runs[with_seeds(run, PLAN)[0].name]["losses"]
        losses.update(zip(PLAN.evaluation_texts, (1.0, 2.0, 3.0, 4.0, 5.0), strict=True))
        found = mean_perplexities(Results(PLAN, runs, results.seconds).with_seeds(run), PLAN)
        assert found[0] == pytest.approx(math.exp(3.0)) and found[1] == pytest.approx(math.exp(5.2))

    def test_equal_wall_clock(self, results):
        dense, peer = results.equal_seconds(PLAN.budgets[0])
        assert (dense.variant, peer.variant, peer.hidden_size) == ("dense", PEER, BEST[PEER])
        assert peer.steps == pytest.approx(dense.steps / 2, abs=0.5)

        row = next(line for line in table_of_seconds(results).split("\n") if line.startswith("| PEER"))
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        assert cells[1:4] == [str(BEST[PEER]), f"{peer.steps:,}", "200.0"]
        assert float(cells[4]) == pytest.approx(0.1 * dense.steps, abs=0.6)
        assert cells[-1].startswith(f"{1 - math.exp(-0.2):.1%} ±")


class TestCards:
    def test_figures_and_metadata_are_those_of_the_runs(self, results):
        cards = make_cards(results)
        of_budgets = len(PLAN.budgets) * (len(PLAN.variants) + 1)  # and PEER for the seconds of dense
        assert len(cards) == of_budgets + 1 + sum(map(len, PLAN.ablations.values()))
        card = ModelCard(str(cards["peer-6e12-flops"]))  # as the Hub reads it
        assert (card.data.library_name, card.data.model_name) == ("transformers", "peer-6e12-flops")
        values = {each.dataset_name: each.metric_value for each in card.data.eval_results}
        mean = sum(math.exp(4.8 + 0.1 * seed) for seed in (1, 2, 3)) / 3
        assert values == pytest.approx(dict.fromkeys([CORPUS, *PLAN.evaluation_texts], mean))
