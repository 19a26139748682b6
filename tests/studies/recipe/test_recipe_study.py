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
"""The recipe study as a user runs it: pairs, time limits, and what it refuses."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, load_from_disk
from recipe_plans import PLANS, SMALL, WHOLE
from slow_tests import slow
from study_runs import make_study
from transformers import AutoModelForCausalLM, AutoTokenizer

import studies.recipe.__main__ as recipe
from studies.common import training_study
from studies.recipe.plan import RecipePlan, compared_runs, factors_of, screening_runs, search_runs
from studies.recipe.plots import PLOTS
from studies.recipe.report import describe
from studies.recipe.results import read_results
from studies.recipe.study import Study


@pytest.fixture(scope="module")
def small_study(tmp_path_factory):
    """The search at its smallest, made once."""
    yield from make_study(recipe, tmp_path_factory.mktemp("recipe"), SMALL)


@slow
def test_of_a_recipe(tmp_path):
    """All that is made once there is one, also from the results alone."""
    for folder, main in make_study(recipe, tmp_path / "whole", WHOLE):
        results = read_results(folder / "results.json")
        printed = describe(results)
        for heading in ("Search", "Tuning", "Sizes", "Equal compute", "Equal seconds"):
            assert f"## {heading}\n" in printed
        assert {file.stem for file in folder.glob("*.png")} == set(PLOTS)
        cards = {file.stem: file.read_text() for file in (folder / "model_cards").iterdir()}
        names = [f"{variant}-6e08-flops" for variant in ("dense", "peer", "recipe")]
        of_seconds = {f"{variant}-seconds-of-6e08-flops" for variant in ("dense", "recipe")}
        assert set(names) <= set(cards) <= {*names, *of_seconds}
        assert "## Dense-equivalent size\n" in printed and "## Number of experts\n" in printed
        chosen = results.chosen(6e8)
        dense, peer, recipe_runs = (
            compared_runs(results.plan, chosen[name], 6e8) for name in ("dense", "peer", "recipe")
        )
        assert (peer[0].hidden_size, [run.seed for run in peer]) == (64, [3])
        assert replace(peer[0], seed=0).name not in results.runs  # its size was not chosen
        assert [run.seed for run in dense] == [run.seed for run in recipe_runs] == [3, 4]
        runs = search_runs(results.plan)
        assert len(runs) == 8 and results.are_made(runs)  # two factors with two seeds
        (design,) = results.plan.designs
        with_it, without = (
            [results.runs[run.name]["losses"]["corpus"] for run in runs if ("apart" in factors_of(run)) == is_there]
            for is_there in (True, False)
        )
        effect = results.effects(design)["apart"]
        assert effect.share == pytest.approx(1 - math.exp(sum(with_it) / 4 - sum(without) / 4))
        assert f"| apart | {effect} |" in re.sub(" +", " ", printed)
        perplexity = sum(math.exp(results.runs[run.name]["losses"]["new"]) for run in recipe_runs) / 2
        assert f"evaluation texts is {perplexity:.2f} ±" in cards["recipe-6e08-flops"]
        ratio = math.exp(sum(results.losses(recipe_runs)) / 2 - sum(results.losses(dense)) / 2)
        assert f" {1 - ratio:+.1%} |" in printed
        seconds = dense[0].steps * results.step_seconds(dense[0])
        at_widths, at_best = results.compared_at_widths(), results.compared_at_equal_seconds()
        for variant in ("dense", "recipe"):
            assert [run.hidden_size for run in at_widths[variant]] == [32, 64]
            for own in (*at_widths[variant], *at_best[variant]):
                assert own.steps == round(seconds / results.step_seconds(own))
            best = min(at_widths[variant], key=lambda run: results.runs[run.name]["losses"]["corpus"])
            assert at_best[variant] == [replace(best, seed=seed) for seed in (3, 4)]
        for variant, runs in results.compared_rates().items():
            ratios = [run.learning_rate / results.best[variant].learning_rate for run in runs]
            assert ratios[:3] == pytest.approx([0.5, 0.5**0.5, 1], rel=0.01)
        assert "| corpus perplexity, d = 64, 6e08 FLOPs | exponent 1 |" in re.sub(" +", " ", printed)
        of_seconds = re.sub(" +", " ", printed.partition("## Equal seconds\n")[2])
        timed, compared = results.runs_of_timed_trials(), results.dense_of_seconds()
        assert compared == replace(dense[0], seed=0)
        assert {run.model for run in timed} == {"recipe-tuning=0", "recipe"} and results.are_made(timed)
        for run in timed:
            assert run.hidden_size == compared.hidden_size
            assert run.steps == round(compared.steps * results.step_seconds(compared) / results.step_seconds(run))
            below = 1 - math.exp(results.losses([run])[0] - results.losses([compared])[0])
            assert re.search(rf"\| {run.steps:,} \|.* {below:+.1%} .*\|", of_seconds)
        by_seed = of_seconds.partition("| five texts, equal seconds | seed 3 | seed 4 |\n")[2]
        perplexities = [f"{math.exp(loss):.2f}" for loss in results.losses(at_best["recipe"])]
        assert f"| recipe | {' | '.join(perplexities)} |\n" in by_seed
        main("--results", str(folder / "results.json"), "--hours", "0", "--output_dir", str(tmp_path / "again"))
        assert (tmp_path / "again" / "tables.md").read_text() == printed


@slow
def test_of_one_width(tmp_path):
    """The plan for one GPU with its 12 blocks and bf16, made small: three runs and their tables, and no widths."""
    plan = json.loads((PLANS / "one-gpu.json").read_text())
    (width,) = plan["hidden_sizes"]["recipe"][0]
    assert width == plan["hidden_size"]
    plan |= {name: SMALL[name] for name in ("training_texts", "evaluation_texts", "block_size", "eval_sequences")}
    plan |= {"batch_size": 4, "budgets": [6e8], "hidden_size": 32, "fields": plan["fields"] | {"head_dim": 16}}
    plan |= {"hidden_sizes": {name: [[32]] for name in plan["hidden_sizes"]}, "sizes_at_equal_seconds": [32]}
    plan["variants"]["peer"] |= {"num_experts": 1024, "query_size": 32}
    plan["training"]["use_cpu"] = True
    for folder, main in make_study(recipe, tmp_path / "whole", plan):
        results = read_results(folder / "results.json")
        printed = describe(results)
        ((dense,), (own,)) = (results.compared(6e8)[name] for name in ("dense", "recipe"))
        equal_seconds = results.compared_at_equal_seconds()["recipe"][0]
        assert results.runs.keys() == {dense.name, own.name, equal_seconds.name}
        assert equal_seconds.steps == round(dense.steps * results.step_seconds(dense) / results.step_seconds(own))
        for run in (dense, own, equal_seconds):
            assert results.runs[run.name]["run_clm"]["bf16"] is True
            assert math.isfinite(results.runs[run.name]["losses"]["new"])
        assert re.findall("## (.*)", printed) == ["Equal compute", "Equal seconds"]
        parts = [results.runs[own.name]["part_losses"][text] for text in results.plan.evaluation_texts]
        table = printed.partition("| five texts, nats, ")[2].partition("\n\n")[0].splitlines()
        assert re.findall(r"after (\d+) to (\d+) tokens", table[0])[::7] == [("1", "4"), ("29", "31")]
        (row,) = [line for line in table if line.startswith("| recipe ")]
        expected = [f"{sum(part) / len(parts):.3f}" for part in zip(*parts, strict=True)]
        assert [cell.strip() for cell in row.split("|")[2:-1]] == expected
        assert f"{equal_seconds.steps:,} |" in printed.partition("## Equal seconds\n")[2]
        assert len(results.runs_of_widths()["dense"]) == 1
        main("--results", str(folder / "results.json"), "--hours", "0", "--output_dir", str(tmp_path / "again"))
        assert (tmp_path / "again" / "tables.md").read_text() == printed


def test_comes_to_its_end(small_study):
    folder, _ = small_study
    results = read_results(folder / "results.json")
    assert results.plan == RecipePlan(**SMALL)
    runs = screening_runs(results.plan)
    assert results.runs.keys() == {run.name for run in runs.values()}
    assert (folder / "tables.md").read_text() == describe(results)
    assert not list(folder.glob("*.png"))  # there is nothing to draw yet
    losses = {name: results.runs[run.name]["losses"]["corpus"] for name, run in runs.items()}
    (row,) = [line for line in describe(results).splitlines() if line.startswith("| gated")]
    assert f"{math.exp(losses['gated']):.2f}" in row
    assert f"{1 - math.exp(losses['gated'] - losses['peer']):+.1%}" in row
    assert set(results.documents) == {"new"} and len(results.documents["new"]) == 8


def test_runs_are_paired_by_their_seed(small_study):
    """A variant that differs in a trial alone begins with the same loss."""
    folder, _ = small_study
    results = read_results(folder / "results.json")
    for result in results.runs.values():
        assert (result["run_clm"]["seed"], result["run_clm"]["data_seed"]) == (result["seed"], result["seed"])
    first = {name: results.runs[run.name]["train_history"][0][1] for name, run in screening_runs(results.plan).items()}
    assert first["apart"] == first["gated"] != first["peer"]


def test_losses_are_those_of_the_saved_model(small_study):
    folder, _ = small_study
    results = read_results(folder / "results.json")
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
    assert result["trial"] == {"apart": True}


def test_sequences_lie_in_one_document(small_study, tmp_path):
    folder, _ = small_study
    study = Study(RecipePlan(**SMALL | {"eval_sequences": 1000}), tmp_path, 1)
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    texts = ["one two three " * 100, "short", "four five six " * 100]
    blocks = study.held_out_blocks(Dataset.from_dict({"text": texts}))
    assert set(blocks["document"]) == {0, 2}
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for block in blocks:
        assert len(block["input_ids"]) == 32
        assert tokenizer.decode(block["input_ids"]).strip() in texts[block["document"]]


def test_stops_when_the_time_is_up_and_goes_on(small_study, tmp_path, capsys):
    folder, main = small_study
    before = read_results(folder / "results.json")
    run = screening_runs(before.plan)["gated"]
    lost = folder / "results" / f"{run.name}.json"
    kept = lost.read_bytes()
    lost.unlink()
    try:
        main("--hours", "0")
        assert f"The time is up: {run.name}" in capsys.readouterr().out
        part = read_results(folder / "results.json")
        assert part.runs.keys() == before.runs.keys() - {run.name}
        assert not any(line.startswith("| gated") for line in describe(part).splitlines())
    finally:
        lost.write_bytes(kept)
    main("--results", str(folder / "results.json"), "--hours", "0")
    assert read_results(folder / "results.json").runs.keys() == before.runs.keys()


def test_refuses_results_of_another_trial(small_study, monkeypatch):
    folder, main = small_study
    monkeypatch.setattr(training_study.subprocess, "run", lambda *_, **__: pytest.fail("trains before it refuses"))
    variants = SMALL["variants"] | {"apart": SMALL["variants"]["apart"] | {"trial": {"apart": False}}}
    (folder / "plan.json").write_text(json.dumps(SMALL | {"variants": variants}))
    try:
        with pytest.raises(ValueError, match=r"trial was \{'apart': True\}, got \{'apart': False\}"):
            main()
    finally:
        (folder / "plan.json").write_text(json.dumps(SMALL))
