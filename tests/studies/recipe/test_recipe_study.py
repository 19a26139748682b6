# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The recipe study as a user runs it: pairs, time limits, and what it refuses."""

import math
from dataclasses import replace

import pytest
import torch
from datasets import load_from_disk
from recipe_plans import SMALL, WHOLE
from slow_tests import slow
from study_runs import make_study
from transformers import AutoModelForCausalLM

import studies.recipe.__main__ as recipe
from studies.common.training_plan import Run
from studies.recipe.plan import RecipePlan, compared_runs, screening_runs, search_runs
from studies.recipe.plots import PLOTS
from studies.recipe.report import describe
from studies.recipe.results import read_results


@pytest.fixture(scope="module")
def small_study(tmp_path_factory):
    """The search at its smallest, made once."""
    return make_study(recipe, tmp_path_factory.mktemp("recipe"), SMALL)


@pytest.fixture(scope="module")
def results(small_study):
    return read_results(small_study[0] / "results.json")


@slow
def test_of_a_recipe(tmp_path):
    """All that is made once there is one, also from the results alone."""
    folder, main = make_study(recipe, tmp_path / "whole", WHOLE)
    results = read_results(folder / "results.json")
    assert {file.stem for file in folder.glob("*.png")} == set(PLOTS)
    chosen = results.chosen(6e8)
    dense, peer, recipe_runs = (compared_runs(results.plan, chosen[name], 6e8) for name in ("dense", "peer", "recipe"))
    assert (peer[0].hidden_size, [run.seed for run in peer]) == (64, [3])
    assert replace(peer[0], seed=0).name not in results.runs  # its size was not chosen
    assert [run.seed for run in dense] == [run.seed for run in recipe_runs] == [3, 4]
    runs = search_runs(results.plan)
    assert len(runs) == 8 and results.are_made(runs)  # two factors with two seeds
    seconds = dense[0].steps * results.step_seconds(dense[0])
    at_widths, at_best = results.compared_at_widths(), results.compared_at_equal_seconds()
    for variant in ("dense", "recipe"):
        assert [run.hidden_size for run in at_widths[variant]] == [32, 64]
        for own in (*at_widths[variant], *at_best[variant]):
            assert own.steps == round(seconds / results.step_seconds(own))
        best = min(at_widths[variant], key=lambda run: results.runs[run.name]["losses"]["corpus"])
        assert at_best[variant] == [replace(best, seed=seed) for seed in (3, 4)]
    assert results.compared_rates().keys() == {"dense", "recipe"}
    assert results.are_made(Run(**each) for each in results.plan.later_runs)
    timed = results.runs_of_timed_trials()
    assert {run.model for run in timed} == {"recipe-tuning=0", "recipe"} and results.are_made(timed)
    main("--results", str(folder / "results.json"), "--hours", "0", "--output_dir", str(tmp_path / "again"))
    assert (tmp_path / "again" / "tables.md").read_text() == describe(results)


def test_comes_to_its_end(small_study, results):
    assert results.plan == RecipePlan(**SMALL)
    runs = screening_runs(results.plan)
    assert results.runs.keys() == {run.name for run in runs.values()}
    assert (small_study[0] / "tables.md").read_text() == describe(results)
    losses = {name: results.runs[run.name]["losses"]["corpus"] for name, run in runs.items()}
    (row,) = [line for line in describe(results).splitlines() if line.startswith("| gated")]
    assert f"{math.exp(losses['gated']):.2f}" in row
    assert losses["apart"] != losses["gated"]
    assert set(results.documents) == {"new"} and len(results.documents["new"]) == 8
    # Runs are paired by their seed: a variant that differs in a trial alone begins with the same loss.
    for result in results.runs.values():
        assert (result["run_clm"]["seed"], result["run_clm"]["data_seed"]) == (result["seed"], result["seed"])
    first = {name: results.runs[run.name]["train_history"][0][1] for name, run in runs.items()}
    assert first["apart"] == first["gated"] != first["peer"]


def test_losses_are_those_of_the_saved_model(small_study, results):
    folder, _ = small_study
    tokens = torch.tensor(load_from_disk(folder / "held_out" / "new")["input_ids"])
    run = screening_runs(results.plan)["apart"]
    model = AutoModelForCausalLM.from_pretrained(folder / "models" / run.name).eval()
    with torch.no_grad():
        expected = [model(input_ids=each[None], labels=each[None]).loss.item() for each in tokens]
        predictions = model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
    of_tokens = -predictions.gather(-1, tokens[:, 1:, None])[..., 0]
    size = -(-of_tokens.shape[1] // 8)  # the first parts are the longer ones
    result = results.runs[run.name]
    parts = [part.mean().item() for part in of_tokens.split(size, dim=1)]
    assert len(parts) == 8 and result["part_losses"]["new"] == pytest.approx(parts, abs=1e-4)
    assert result["sequence_losses"]["new"] == pytest.approx(expected, abs=1e-4)
    assert result["losses"]["new"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert result["trial"] == SMALL["variants"]["apart"]["trial"]


def test_stops_when_the_time_is_up_and_goes_on(small_study, results, capsys):
    folder, main = small_study
    run = screening_runs(results.plan)["gated"]
    lost = folder / "results" / f"{run.name}.json"
    kept = lost.read_bytes()
    lost.unlink()
    try:
        main("--hours", "0")
        assert run.name in capsys.readouterr().out
        part = read_results(folder / "results.json")
        assert part.runs.keys() == results.runs.keys() - {run.name}
        assert not any(line.startswith("| gated") for line in describe(part).splitlines())
    finally:
        lost.write_bytes(kept)
    main("--results", str(folder / "results.json"), "--hours", "0")
    assert read_results(folder / "results.json").runs.keys() == results.runs.keys()
