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
"""The scaling study: what it plans, what it makes of results, and that it goes on where it was killed."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import scaling
import scaling_study
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from scaling_cards import make_cards, write_cards
from scaling_plan import (
    CORPUS,
    PEER,
    Run,
    ablation_runs,
    changed_fields,
    choose_rates,
    choose_sizes,
    configuration_of,
    costs_of,
    rate_runs,
    read_plan,
    reference_run,
    run_of_budget,
    run_of_seconds,
    size_runs,
    training_flops,
    with_seeds,
)
from scaling_plots import PLOTS
from scaling_report import Results, describe, read_results, table_of_perplexities, write_results

from modeling_peer import PeerConfig, configuration_path


ROOT = Path(__file__).parent.parent
PLANS = ROOT / "configuration" / "scaling"
PLAN = read_plan(PLANS / "two-cores.json")


@pytest.mark.parametrize("file", sorted(PLANS.glob("*.json")), ids=lambda file: file.stem)
class TestPlans:
    def test_every_model_can_be_made_and_takes_its_budget(self, file):
        plan = read_plan(file)
        rates = dict.fromkeys(plan.variants, plan.learning_rates[0])
        for budget in plan.budgets:
            for run in size_runs(plan, rates, budget):
                # The budget to half a step.
                assert training_flops(run, plan) == pytest.approx(
                    budget, abs=training_flops(replace(run, steps=1), plan)
                )
        for run in ablation_runs(plan, rates):
            assert costs_of(run, plan).flops > 0
        reference = configuration_of(reference_run(plan, rates), plan)
        for fields in plan.after_training.values():
            assert PeerConfig.from_dict(reference.to_dict(), **fields).num_experts == reference.num_experts

    def test_names_of_runs_differ_and_are_those_of_files(self, file):
        plan = read_plan(file)
        rates = dict.fromkeys(plan.variants, plan.learning_rates[0])
        runs = {*rate_runs(plan), *ablation_runs(plan, rates)}
        runs |= {
            each for budget in plan.budgets for run in size_runs(plan, rates, budget) for each in with_seeds(run, plan)
        }
        assert len({run.name for run in runs}) == len(runs)
        assert not any(set(run.name) & set('/\\ :*?"<>|') for run in runs)

    def test_only_the_middle_block_differs(self, file):
        """As in the paper: everything outside it is the same, so that the feed-forward is what is compared."""
        plan = read_plan(file)
        for size in plan.hidden_sizes:
            models = [configuration_of(Run(variant, size, 1, 1.0), plan) for variant in plan.variants]
            for name in (
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "intermediate_size",
                "vocab_size",
            ):
                assert len({getattr(config, name) for config in models}) == 1, name
            middle = (models[0].num_hidden_layers - 1) // 2
            for config, (variant, fields) in zip(models, plan.variants.items(), strict=True):
                expected = ["dense"] * config.num_hidden_layers
                expected[middle] = fields["configuration"].split("-")[0]
                assert config.feed_forward_types == expected, variant


class TestPlan:
    def test_widths_grow_with_the_hidden_size(self):
        base = PeerConfig.from_pretrained(configuration_path("peer-tiny"))
        assert base.hidden_size == 128
        half = configuration_of(Run(PEER, 64, 1, 1.0), PLAN)
        assert (half.intermediate_size, half.head_dim) == (base.intermediate_size // 2, base.head_dim)
        assert half.query_size == PLAN.variants[PEER]["query_size"] // 2
        assert half.num_experts == base.num_experts
        assert (
            changed_fields(Run(PEER, 64, 1, 1.0, 0, ("variation", "dense branch beside")), PLAN)[
                "shared_expert_intermediate_size"
            ]
            == half.intermediate_size
        )

    def test_refuses_a_size_that_heads_do_not_divide(self):
        with pytest.raises(ValueError, match="multiples of the head size 32, got 100"):
            changed_fields(Run(PEER, 100, 1, 1.0), PLAN)

    def test_equal_seconds_are_those_of_the_steps(self):
        dense, peer = Run("dense", 128, 300, 1.0), Run(PEER, 64, 999, 2.0, seed=0)
        seconds = {"dense": 0.2, PEER: 0.3}
        assert run_of_seconds(peer, dense, lambda run: seconds[run.variant]) == replace(peer, steps=200)


def made_of(losses, run, plan=PLAN):
    """A result with the same loss on every text, from `losses(run)`."""
    loss = losses(run)
    texts = dict.fromkeys([CORPUS, *plan.evaluation_texts], loss)
    result = {"losses": texts, "train_history": [[10 * i, 9 - i] for i in range(1, 5)], "after_training": {}}
    if run.variant in ("peer", "pkm"):
        usage = {"usage": 0.9, "unevenness": 1.5, "top1_usage": 0.4, "unused": 7, "histogram": [10] * 28}
        result["usage"] = {"layers.1.mlp": usage}
    if run.variant == "moe-expert-choice":
        result["losses_as_trained"] = dict.fromkeys(texts, loss - 0.5)
    if run.ablation is None and run.hidden_size == plan.reference_hidden_size:
        result["after_training"] = dict.fromkeys(plan.after_training, texts)
    return result


def study_of(losses, plan=PLAN):
    """Results of a whole study in which runs have the losses that the function gives them."""
    runs = {run.name: made_of(losses, run) for run in rate_runs(plan)}
    rates = choose_rates(plan, runs)
    sizes = [run for budget in plan.budgets for run in size_runs(plan, rates, budget)]
    sizes += [*ablation_runs(plan, rates), reference_run(plan, rates)]
    runs |= {each.name: made_of(losses, each) for run in sizes for each in with_seeds(run, plan)}
    seconds = {
        Run(variant, size, 1, rates[variant]).name: [0.5, 0.1 if variant == "dense" else 0.2, 0.01]
        for variant in plan.variants
        for size in plan.hidden_sizes
    }
    seconds = {name: [times[1]] * 3 for name, times in seconds.items()}
    results = Results(plan, runs, seconds)
    for budget in plan.budgets:
        for run in with_seeds(results.equal_seconds(budget)[1], plan):
            runs.setdefault(run.name, made_of(losses, run))
    return results


BEST = {"dense": 96, "moe-expert-choice": 64, "moe-token-choice": 64, "pkm": 128, "peer": 32}


def losses_with_optimum(run):
    """The lowest loss is that of `BEST`, and of a rate of 0.002; PEER's is lower by 0.2, each seed's higher by 0.1."""
    away = abs(math.log2(run.hidden_size / BEST[run.variant])) + abs(math.log2(run.learning_rate / 0.002))
    ablation = 0.05 if run.ablation else 0.0
    return 5.0 + away - 0.2 * (run.variant == PEER) + 0.1 * run.seed + ablation


@pytest.fixture(scope="module")
def results():
    return study_of(losses_with_optimum)


class TestReport:
    def test_rates_and_sizes_are_those_with_the_lowest_loss(self, results):
        assert results.rates == dict.fromkeys(PLAN.variants, 0.002)
        for budget in PLAN.budgets:
            assert {variant: run.hidden_size for variant, run in results.optimal(budget).items()} == BEST

    def test_sizes_are_chosen_by_the_corpus_alone(self, results):
        budget = PLAN.budgets[0]
        runs = json.loads(json.dumps(results.runs))
        other = run_of_budget("dense", 64, budget, 0.002, PLAN)
        runs[other.name]["losses"].update(dict.fromkeys(PLAN.evaluation_texts, 0.0))
        assert choose_sizes(PLAN, results.rates, budget, runs)["dense"].hidden_size == BEST["dense"]

    def test_perplexities_are_means_over_seeds(self, results):
        table = table_of_perplexities(results, PLAN.budgets[0])
        row = next(line for line in table.split("\n") if line.startswith("| PEER"))
        values = [math.exp(4.8 + 0.1 * seed) for seed in range(3)]
        mean = sum(values) / 3
        deviation = (sum((value - mean) ** 2 for value in values) / 2) ** 0.5
        assert row.count(f"{mean:.2f} ± {deviation:.2f}") == 7  # six texts, and the mean over five of them
        assert f"{1 - math.exp(-0.2):.1%}" in row

    def test_the_mean_is_geometric_and_leaves_the_corpus_out(self, results):
        run = results.optimal(PLAN.budgets[0])["dense"]
        runs = json.loads(json.dumps(results.runs))
        losses = runs[run.name]["losses"]
        losses.update(zip(PLAN.evaluation_texts, (1.0, 2.0, 3.0, 4.0, 5.0), strict=True))
        found = Results(PLAN, runs, results.seconds).mean_perplexities(run)
        assert found[0] == pytest.approx(math.exp(3.0))

    def test_equal_wall_clock(self, results):
        dense, peer = results.equal_seconds(PLAN.budgets[0])
        assert (dense.variant, peer.variant, peer.hidden_size) == ("dense", PEER, BEST[PEER])
        assert peer.steps == pytest.approx(dense.steps / 2, abs=0.5)

    def test_margins_of_the_paper_are_the_issue_of_its_table(self, results):
        text = describe(results)
        for row in ("| PEER               |    20.68 |   17.65 |", "16.0%", "12.3%"):
            assert row in text

    def test_written_and_read_again(self, results, tmp_path):
        write_results(tmp_path / "scaling.json", results)
        assert describe(read_results(tmp_path / "scaling.json")) == describe(results)
        for line in (tmp_path / "scaling.json").read_text().split('"runs": {\n')[1].split("\n")[:-3]:
            assert line.startswith('  "') and "learning_rate" in line  # a run in each

    @pytest.mark.parametrize("name", PLOTS)
    def test_pictures(self, name, results, tmp_path):
        PLOTS[name](results, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


class TestCards:
    def test_names_are_those_of_repositories(self, results):
        for name in make_cards(results):
            validate_repo_id(f"USER/{name}")

    def test_figures_and_metadata_are_those_of_the_runs(self, results):
        cards = make_cards(results)
        assert len(cards) == len(PLAN.budgets) * len(PLAN.variants) + sum(map(len, PLAN.ablations.values()))
        card = ModelCard(str(cards["peer-6e12-flops"]))  # as the Hub reads it
        assert (card.data.library_name, card.data.model_name) == ("transformers", "peer-6e12-flops")
        values = {each.dataset_name: each.metric_value for each in card.data.eval_results}
        mean = sum(math.exp(4.8 + 0.1 * seed) for seed in range(3)) / 3
        assert values == pytest.approx(dict.fromkeys([CORPUS, *PLAN.evaluation_texts], mean))
        assert "# peer-6e12-flops\n" in card.text

    def test_cards_of_another_study_are_taken_away(self, results, tmp_path):
        (tmp_path / "old.md").write_text("old")
        write_cards(results, tmp_path)
        assert {file.stem for file in tmp_path.glob("*")} == set(make_cards(results))


TEXTS = {
    name: DatasetDict({split: Dataset.from_list([{"text": words * 300}] * 4) for split in ("train", "validation")})
    for name, words in {"old": "one two three ", "new": "four five six "}.items()
}

PEER_FIELDS = {"num_experts": 64, "num_retrieval_heads": 2, "num_experts_per_head": 4, "query_size": 64}
SMALL = {
    "training_texts": ["old"],
    "evaluation_texts": ["new"],
    "block_size": 32,
    "batch_size": 2,
    "hidden_sizes": [32],
    "budgets": [2e8],
    "learning_rates": [0.01],
    "seeds": 2,
    "eval_sequences": 4,
    "training": {"lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2},
    "variants": {
        "dense": {"configuration": "dense-tiny"},
        "moe-expert-choice": {"configuration": "moe-tiny", "moe_num_experts": 4, "moe_routing": "expert_choice"},
        "peer": {"configuration": "peer-tiny", "sparse_expert_gradients": True, **PEER_FIELDS},
    },
    "reference_hidden_size": 32,
    "ablations": {
        "num_experts": {"16": {"num_experts": 16}},
        "active": {},
        "query_norm": {},
        "variation": {"no activation": {"expert_act": None}},
    },
    "after_training": {"k = 2": {"num_experts_per_head": 2}},
}


@pytest.fixture(scope="module")
def small_study(tmp_path_factory):
    """The study at its smallest, made once, and as a function that goes on with it."""
    folder = tmp_path_factory.mktemp("scaling")
    (folder / "plan.json").write_text(json.dumps(SMALL))

    def main(*flags):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scaling_study, "load_corpus", TEXTS.get)
            patch.setattr(
                sys, "argv", ["scaling.py", "--plan", str(folder / "plan.json"), "--output_dir", str(folder), *flags]
            )
            scaling.main()

    main()
    return folder, main


class TestStudy:
    def test_comes_to_its_end(self, small_study):
        folder, _ = small_study
        results = read_results(folder / "scaling.json")
        plan = results.plan
        assert plan == read_plan(folder / "plan.json")
        assert (folder / "tables.md").read_text() == describe(results)
        for name in PLOTS:
            assert (folder / f"scaling_{name}.png").stat().st_size > 5000
        assert {file.stem for file in (folder / "model_cards").iterdir()} == set(make_cards(results))
        for name, result in results.runs.items():
            assert set(result["losses"]) == {CORPUS, "new"} and all(map(math.isfinite, result["losses"].values())), (
                name
            )
            assert 3 * result["flops_per_token"] * result["steps"] * 64 == result["training_flops"]
        (dense, peer) = results.equal_seconds(plan.budgets[0])
        assert len(results.seeds_of(dense)) == len(results.seeds_of(peer)) == 2

    def test_what_a_run_is_made_of(self, small_study):
        """The ordinary script made it: its own evaluation finds the same model, and its arguments make it again."""
        folder, _ = small_study
        results = read_results(folder / "scaling.json")
        run = results.optimal(results.plan.budgets[0])[PEER]
        result = results.runs[run.name]
        model = folder / "models" / run.name
        assert json.loads((model / "run_clm.json").read_text()) == result["run_clm"]
        assert not list(model.glob("checkpoint-*"))
        config = PeerConfig.from_pretrained(model)
        assert {name: getattr(config, name) for name in PEER_FIELDS if name != "query_size"} == {
            name: value for name, value in PEER_FIELDS.items() if name != "query_size"
        }
        saved = json.loads((model / "all_results.json").read_text())
        assert saved["perplexity/new"] == pytest.approx(math.exp(result["losses"]["new"]))
        # The script's own held-out blocks are of the same text, in another order and number.
        assert saved["eval_loss"] == pytest.approx(result["losses"][CORPUS], rel=0.02)
        assert set(result["after_training"]) == {"k = 2"}
        assert result["after_training"]["k = 2"][CORPUS] != result["losses"][CORPUS]
        (usage,) = result["usage"].values()
        assert sum(usage["histogram"]) + usage["unused"] == 64 == PEER_FIELDS["num_experts"]

    def test_experts_that_choose_see_what_comes_later(self, small_study):
        folder, _ = small_study
        found = [run for run in read_results(folder / "scaling.json").runs.values() if "losses_as_trained" in run]
        assert found and all(run["variant"] == "moe-expert-choice" for run in found)
        assert all(run["losses_as_trained"] != run["losses"] for run in found)

    def test_what_is_there_is_not_made_again(self, small_study, monkeypatch):
        folder, main = small_study

        def fails(*_, **__):
            raise AssertionError

        before = {file: file.stat().st_mtime_ns for file in (folder / "results").iterdir()}
        monkeypatch.setattr(scaling_study.subprocess, "run", fails)
        monkeypatch.setattr(scaling_study, "step_seconds", fails)
        main()
        assert {file: file.stat().st_mtime_ns for file in (folder / "results").iterdir()} == before

    def test_a_run_that_fails_is_named_and_its_log(self, small_study, monkeypatch):
        folder, main = small_study
        plan = read_plan(folder / "plan.json")
        run = rate_runs(plan)[0]
        lost = folder / "results" / f"{run.name}.json"
        kept = lost.read_bytes()
        lost.unlink()
        monkeypatch.setattr(scaling_study, "RUN_SCRIPT", folder / "missing.py")
        try:
            with pytest.raises(RuntimeError, match=re.escape(run.name) + r".* failed with 2: see .*log\.txt"):
                main()
        finally:
            lost.write_bytes(kept)

    def test_refuses_the_folder_of_another_study(self, small_study, monkeypatch):
        folder, main = small_study
        (folder / "plan.json").write_text(json.dumps(SMALL | {"block_size": 16}))
        try:
            with pytest.raises(ValueError, match="block_size was 32, got 16"):
                main()
        finally:
            (folder / "plan.json").write_text(json.dumps(SMALL))

    def test_refuses_results_of_other_fields(self, small_study):
        """A variant that was redefined has results that are not its own."""
        folder, main = small_study
        variants = SMALL["variants"] | {"peer": SMALL["variants"]["peer"] | {"expert_act": "relu"}}
        (folder / "plan.json").write_text(json.dumps(SMALL | {"variants": variants}))
        try:
            with pytest.raises(ValueError, match="expert_act"):
                main()
        finally:
            (folder / "plan.json").write_text(json.dumps(SMALL))
