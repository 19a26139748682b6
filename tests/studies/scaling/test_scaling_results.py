# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The plans of the scaling study, the committed runs, and figures against the raw losses of these."""

import math
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, stdev
from types import SimpleNamespace

import pytest

from modeling_peer import PeerConfig
from studies.common.single_run import comparable
from studies.common.training_plan import Run, configuration_of, costs_of, training_flops
from studies.scaling.__main__ import Study, run_study
from studies.scaling.plan import Plan, ablation_runs, reference_run, size_runs
from studies.scaling.report import read_results, table_of_perplexities


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


def trained(variant, budget, **fields):
    """Raw results of a variant for about a budget."""
    own = [each for each in RESULTS.runs.values() if (each["variant"], each["ablation"]) == (variant, None)]
    own = [each for each in own if each["training_flops"] == pytest.approx(budget, rel=0.01)]
    return [each for each in own if all(each[name] == value for name, value in fields.items())]


def loss(result):
    return result["losses"]["corpus"]


def chosen(variant, budget):
    """The learning rate and size of the lowest loss on the corpus, both with the first seed."""
    rates = trained(variant, PLAN.budgets[0], hidden_size=PLAN.reference_hidden_size, seed=0)
    sizes = trained(variant, budget, learning_rate=min(rates, key=loss)["learning_rate"], seed=0)
    assert (len(rates), len(sizes)) == (len(PLAN.learning_rates), len(PLAN.sizes(budget)))
    return {name: min(sizes, key=loss)[name] for name in ("learning_rate", "hidden_size")}


def mean_perplexities(variant, budget):
    """Geometric means over the evaluation texts, with the seeds that nothing was chosen with."""
    runs = [each for each in trained(variant, budget, **chosen(variant, budget)) if each["seed"]]
    assert len(runs) == PLAN.seeds
    return [math.exp(mean(each["losses"][text] for text in PLAN.evaluation_texts)) for each in runs]


@pytest.mark.parametrize("budget", PLAN.budgets)
def test_choices_and_perplexities(budget):
    dense, rows = mean_perplexities("dense", budget), table_of_perplexities(RESULTS, budget).splitlines()[2:]
    for row, (variant, run) in zip(rows, RESULTS.optimal(budget).items(), strict=True):
        assert chosen(variant, budget) == {"learning_rate": run.learning_rate, "hidden_size": run.hidden_size}
        own = mean_perplexities(variant, budget)
        assert f"{mean(own):.2f} ± {stdev(own):.2f}" in row
        if variant != "dense":
            share = mean(own) / mean(dense)
            deviation = share * math.sqrt((stdev(own) / mean(own)) ** 2 + (stdev(dense) / mean(dense)) ** 2)
            assert RESULTS.margins(budget)[variant] == pytest.approx(1 - share)
            assert RESULTS.deviations(budget)[variant] == pytest.approx(deviation)
            assert row.endswith(f" {1 - share:.1%} ± {deviation:.1%} |")


@pytest.mark.parametrize("budget", PLAN.budgets)
def test_equal_wall_clock(budget):
    """By the medians of the times of steps."""
    dense, peer = RESULTS.equal_seconds(budget)
    of_dense, of_peer = (
        median(RESULTS.seconds[str(run.hidden_size)]["seconds"][run.variant]) for run in (dense, peer)
    )
    assert (dense.variant, peer.variant, peer.hidden_size) == ("dense", "peer", chosen("peer", budget)["hidden_size"])
    assert peer.steps * of_peer == pytest.approx(dense.steps * of_dense, abs=of_peer / 2)
