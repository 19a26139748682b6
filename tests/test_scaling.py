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
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import pytest
import scaling
import scaling_study
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from filelock import FileLock
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from scaling_cards import make_cards, write_cards
from scaling_plan import (
    CORPUS,
    PEER,
    Plan,
    Run,
    ablation_runs,
    budget_name,
    changed_fields,
    choose_rates,
    choose_sizes,
    configuration_of,
    costs_of,
    rate_runs,
    read_plan,
    reference_run,
    repeated_ablation_runs,
    run_of_budget,
    run_of_seconds,
    size_runs,
    training_flops,
    with_seeds,
)
from scaling_plots import PLOTS
from scaling_report import (
    Results,
    describe,
    edges,
    mean_perplexities,
    paper_margins,
    read_results,
    table_after_training,
    table_of_active_experts,
    table_of_expert_choice,
    table_of_experts,
    table_of_perplexities,
    table_of_seconds,
    table_of_variations,
    write_results,
)
from scaling_run import changes_to_measure, comparable
from transformers import AutoModelForCausalLM

from modeling_peer import PeerConfig, configuration_path


ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PLANS = ROOT / "configuration" / "scaling"
PLAN = replace(
    read_plan(PLANS / "two-cores.json"),
    budgets=[6e12, 2e13],
    hidden_sizes=[[32, 64, 96, 128]] * 2,
    learning_rates=[0.002, 0.004, 0.008],
)

TEXTS = {
    name: DatasetDict({split: Dataset.from_list([{"text": words * 300}] * 4) for split in ("train", "validation")})
    for name, words in {"old": "one two three ", "new": "four five six "}.items()
}

PEER_FIELDS = {"num_experts": 64, "num_retrieval_heads": 2, "num_experts_per_head": 4, "query_size": 64}
SMALL = {
    "training_texts": ["old"],
    "evaluation_texts": ["new"],
    "block_size": 32,
    "batch_size": 4,
    "hidden_sizes": [[32]],
    "budgets": [6e8],
    "learning_rates": [0.01],
    "seeds": 2,
    "eval_sequences": 8,
    "training": {"lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2},
    "fields": {"initializer_range": 0.08},
    "variants": {
        "dense": {"configuration": "dense-tiny"},
        "moe-expert-choice": {"configuration": "moe-tiny", "moe_num_experts": 4, "moe_routing": "expert_choice"},
        "peer": {
            "configuration": "peer-tiny",
            "training": {"down_proj_lr_multiplier": 4},
            "sparse_expert_gradients": True,
            **PEER_FIELDS,
        },
    },
    "reference_hidden_size": 32,
    "ablations": {
        "num_experts": {"16": {"num_experts": 16}},
        "active": {},
        "query_norm": {},
        "variation": {
            "no activation": {"expert_act": None},
            "one learning rate": {"training": {"down_proj_lr_multiplier": 1}},
        },
    },
    "repeated_ablations": ["num_experts"],
    "after_training": {"k = 2": {"num_experts_per_head": 2}, "h = 1": {"num_retrieval_heads": 1}},
}


@pytest.mark.parametrize("file", sorted(PLANS.glob("*.json")), ids=lambda file: file.stem)
class TestPlans:
    def test_every_model_can_be_made_and_takes_its_budget(self, file):
        plan = read_plan(file)
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

    def test_names_of_runs_differ_and_are_those_of_files(self, file):
        plan = read_plan(file)
        rates = dict.fromkeys(plan.variants, plan.learning_rates[0])
        runs = {*rate_runs(plan), *ablation_runs(plan, rates)}
        sizes = [run for budget in plan.budgets for run in size_runs(plan, rates, budget)]
        runs |= {*sizes, *(each for run in sizes for each in with_seeds(run, plan))}
        assert len({run.name for run in runs}) == len(runs)
        assert not any(set(run.name) & set('/\\ :*?"<>|') for run in runs)

    def test_only_the_middle_block_differs(self, file):
        """As in the paper: everything outside it is the same, so that the feed-forward is what is compared."""
        plan = read_plan(file)
        for size in plan.all_sizes:
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


REFUSED = [
    ({"variants": {"dense": {"configuration": "dense-tiny"}}}, "`variants` must have 'peer'"),
    ({"ablations": {"depth": {}}}, r"`ablations` are of the groups \['num_experts', .*got 'depth'"),
    ({"repeated_ablations": ["depth"]}, r"`repeated_ablations` are of the groups \['num_experts', .*got 'depth'"),
    ({"evaluation_texts": []}, "`evaluation_texts` must name at least one"),
    ({"hidden_sizes": [[32], [64]]}, "as many lists as `budgets`, 1, got 2"),
    ({"seeds": 0}, "`seeds` must be at least 1, got 0"),
    ({"hidden_sizes": [[]]}, r"`hidden_sizes` must rise, with one at least, got \[\]"),
    ({"hidden_sizes": [[64, 32]]}, r"`hidden_sizes` must rise, .*got \[64, 32\]"),
    ({"budgets": [2e13, 6e12]}, "`budgets` must rise"),
    ({"batch_size": 3}, "multiple of `gradient_accumulation_steps` = 2, got 3"),
]


class TestPlan:
    @pytest.mark.parametrize(("fields", "message"), REFUSED)
    def test_refuses_at_once(self, fields, message):
        with pytest.raises(ValueError, match=message):
            Plan(**(SMALL | fields))

    def test_refuses_a_budget_without_a_step(self):
        with pytest.raises(ValueError, match="dense of hidden_size 64 must be trained for a step at least, got 0.00"):
            run_of_budget("dense", 64, 1e6, 1.0, PLAN)

    def test_widths_grow_with_the_hidden_size(self):
        base = PeerConfig.from_pretrained(configuration_path("peer-tiny"))
        assert base.hidden_size == 128
        half = configuration_of(Run(PEER, 64, 1, 1.0), PLAN)
        assert half.intermediate_size == base.intermediate_size // 2
        assert (half.head_dim, half.num_attention_heads, half.num_key_value_heads) == (16, 4, 4)  # 16 is the plan's
        assert half.query_size == PLAN.variants[PEER]["query_size"] // 2
        assert half.num_experts == PLAN.variants[PEER]["num_experts"]
        assert (
            changed_fields(Run(PEER, 64, 1, 1.0, 0, ("variation", "dense branch beside")), PLAN)[
                "shared_expert_intermediate_size"
            ]
            == half.intermediate_size
        )

    def test_refuses_a_size_that_heads_do_not_divide(self):
        with pytest.raises(ValueError, match="multiples of the head size 16 of peer, got 100"):
            changed_fields(Run(PEER, 100, 1, 1.0), PLAN)

    def test_equal_seconds_are_those_of_the_steps(self):
        dense, peer = Run("dense", 128, 300, 1.0), Run(PEER, 64, 999, 2.0, seed=0)
        seconds = {"dense": 0.2, PEER: 0.3}
        assert run_of_seconds(peer, dense, lambda run: seconds[run.variant]) == replace(peer, steps=200)


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

    def test_margins_of_the_paper(self, results):
        """As it says: on C4 at the smaller budget PEER is 13.5 % below dense."""
        margins = paper_margins()
        assert f"{1 - 20.63 / 23.84:.3f}" == "0.135"
        assert margins["6e18"] == pytest.approx({"moe-expert-choice": 0.098, "pkm": 0.100, "peer": 0.160}, abs=5e-4)
        assert "| PEER               |    20.68 |   17.65 |" in describe(results)

    def test_ablations_are_held_against_the_mean_of_seeds(self, results):
        """Nothing makes a seed as lucky with one model as with another."""
        rows = table_of_variations(results).split("\n")[3:]
        assert len(rows) == len(PLAN.ablations["variation"])
        share = 1 - math.exp(-0.05) / (sum(math.exp(0.1 * seed) for seed in (1, 2, 3)) / 3)
        assert all(row.endswith(f"| {share:>10.1%} |") for row in rows)
        assert [line.count("±") for line in table_of_active_experts(results).split("\n")[2:]] == [0, 0, 2, 0, 0]

    def test_the_number_of_experts_is_compared_with_all_seeds(self, results):
        names = {run.name for run in repeated_ablation_runs(PLAN, results.rates)}
        repeated = len(PLAN.ablations["num_experts"]) + len(PLAN.ablations["query_norm"])
        assert len(names) == sum(map(len, PLAN.ablations.values())) + 2 * repeated
        lines = table_of_experts(results).split("\n")[2:]
        assert [line.count("±") for line in lines] == [2] * 7
        # Losses of the reference are 5.8 and a tenth more with each seed, those of ablations lower.
        values = [math.exp(losses_with_optimum(results.reference()) - 0.05 + 0.1 * seed) for seed in range(3)]
        assert lines[2].count(f"{sum(values) / 3:.2f} ± {stdev(values):.2f}") == 2

    def test_number_of_experts_and_norms(self, results):
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table_of_experts(results).split("\n")[2:]]
        assert [row[:2] for row in rows] == [
            *(["none", number] for number in ("16,384", "65,536")),
            *(["batch", number] for number in ("1,024", "4,096", "16,384", "65,536")),
            ["rms", "65,536"],
        ]
        assert {tuple(row[-3:]) for row in rows} == {("90.0", "40.0", "1.50")}

    def test_active_experts(self, results):
        rows = [
            [cell.strip() for cell in line.split("|")[1:-1]]
            for line in table_of_active_experts(results).split("\n")[2:]
        ]
        assert [int(row[0]) for row in rows] == [16, 32, 64, 128, 256]
        assert all(int(row[0]) == int(row[1]) * int(row[2]) for row in rows)

    def test_after_training_says_by_how_much_perplexity_rises(self, results):
        rows = table_after_training(results).split("\n")[3:]
        assert len(rows) == len(PLAN.after_training)
        assert all(f"+{math.exp(0.3) - 1:.1%}" in row for row in rows)

    def test_what_differs_beside_the_layer_is_said(self, results):
        tables = describe(results)
        own = "`row_adamw` True, `down_proj_lr_multiplier` 48, `expert_initializer_range` 0.1; PEER with `row_adamw` True"
        assert f"Trained alike, but PKM with {own}, `expert_lr_multiplier` 0.25" in tables
        assert tables.count("PEER itself is a mean over 3 seeds") == 2
        assert "counted on 65,536 tokens" in tables
        assert "medians of 3, of dense and PEER in turns" in tables and "cores 2" in tables

    def test_experts_that_choose_have_their_routing_in_the_table(self, results):
        cells = table_of_expert_choice(results).split("\n")[2].split("|")
        by_token, as_trained = (float(cell.split("±")[0]) for cell in cells[2:4])
        assert as_trained == pytest.approx(by_token * math.exp(-0.5), rel=1e-3)

    def test_what_is_best_at_an_end_is_said(self, results):
        assert edges(results) == [
            f"{label} at {field} {end} with {budget} FLOPs"
            for budget in ("6e12", "2e13")
            for label, field, end in (("PKM", "hidden_size", 128), ("PEER", "hidden_size", 32))
        ]

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
        of_budgets = len(PLAN.budgets) * (len(PLAN.variants) + 1)  # and PEER for the seconds of dense
        assert len(cards) == of_budgets + 1 + sum(map(len, PLAN.ablations.values()))
        card = ModelCard(str(cards["peer-6e12-flops"]))  # as the Hub reads it
        assert (card.data.library_name, card.data.model_name) == ("transformers", "peer-6e12-flops")
        values = {each.dataset_name: each.metric_value for each in card.data.eval_results}
        mean = sum(math.exp(4.8 + 0.1 * seed) for seed in (1, 2, 3)) / 3
        assert values == pytest.approx(dict.fromkeys([CORPUS, *PLAN.evaluation_texts], mean))
        assert "# peer-6e12-flops\n" in card.text
        assert f"MFLOPs per token at {PLAN.block_size} tokens" in card.text
        assert "`learning_rate` 0.004" in card.text and "`down_proj_lr_multiplier` 192" in card.text
        for name, start in (("peer-6e12-flops", "0.1"), ("peer-variation-larger-v-at-first", "None")):
            assert f"`expert_initializer_range` {start}" in cards[name].text

    def test_what_has_no_peer_layer_says_so(self, results):
        cards = make_cards(results)
        for name, has_experts in (("peer-6e12-flops", True), ("dense-6e12-flops", False)):
            assert ("peer" in (cards[name].data.tags or [])) == has_experts
            assert ("to compare PEER layers with" in cards[name].text) != has_experts

    def test_written(self, results, tmp_path):
        write_cards(results, tmp_path)
        assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
            f"{name}.md": str(card) for name, card in make_cards(results).items()
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
        for run in results.equal_seconds(plan.budgets[0]):
            assert len(results.with_seeds(run)) == 2
        assert not list(folder.glob("models/*/checkpoint-*"))

    def test_every_run_was_trained_as_it_says(self, small_study):
        folder, _ = small_study
        for name, result in read_results(folder / "scaling.json").runs.items():
            arguments = result["run_clm"]
            for field, argument in (("steps", "max_steps"), ("learning_rate",) * 2, ("seed",) * 2):
                assert arguments[argument] == result[field], name
            assert json.loads(arguments["config_overrides"]) == result["fields"]
            own_rate = None if result["variant"] != PEER else 1 if "one_learning_rate" in name else 4
            assert arguments.get("down_proj_lr_multiplier") == own_rate, name
            trained = result["all_results"]
            sequences = trained["epoch"] * trained["train_samples"]
            assert sequences == pytest.approx(result["steps"] * 4, abs=0.1)
            # 32 tokens a sequence, three times the forward's FLOPs.
            assert result["training_flops"] == round(3 * result["flops_per_token"] * sequences * 32)
            saved = PeerConfig.from_pretrained(folder / "models" / name)
            model_fields = {field: getattr(saved, field) for field in result["fields"]}
            assert model_fields == result["fields"], name
            assert result["train_history"][-1][0] <= result["steps"]

    def test_seeds_are_other_runs(self, small_study):
        folder, _ = small_study
        results = read_results(folder / "scaling.json")
        for run in results.optimal(results.plan.budgets[0]).values():
            one, other = results.with_seeds(run)
            assert one[CORPUS] != other[CORPUS]

    def test_losses_are_those_of_the_saved_model(self, small_study):
        """By the model's own loss, on each text, without what balances the experts of a MoE; also with h or k changed."""
        folder, _ = small_study
        results = read_results(folder / "scaling.json")
        texts = {
            name: torch.tensor(load_from_disk(folder / "held_out" / name)["input_ids"]) for name in (CORPUS, "new")
        }

        def losses(name, **fields):
            model = AutoModelForCausalLM.from_pretrained(
                folder / "models" / name, router_aux_loss_coef=0.0, **fields
            ).eval()
            with torch.no_grad():
                return {text: model(input_ids=tokens, labels=tokens).loss.item() for text, tokens in texts.items()}

        for name, result in results.runs.items():
            assert result["losses"] == pytest.approx(losses(name), rel=1e-5), name
        assert results.losses(results.reference())[CORPUS] != results.losses(results.reference())["new"]
        run = with_seeds(results.reference(), results.plan)[0]
        changed = {name: each["losses"] for name, each in results.runs[run.name]["after_training"].items()}
        assert changed["k = 2"] == pytest.approx(losses(run.name, num_experts_per_head=2), rel=1e-5)
        assert changed["h = 1"] == pytest.approx(losses(run.name, num_retrieval_heads=1), rel=1e-5)

    def test_what_is_saved_beside_the_model(self, small_study):
        """For its card; nothing of what made it, with paths of this machine."""
        folder, _ = small_study
        run = read_results(folder / "scaling.json").reference()
        result = read_results(folder / "scaling.json").runs[run.name]
        saved = json.loads((folder / "models" / run.name / "all_results.json").read_text())
        assert saved["perplexity/new"] == pytest.approx(math.exp(result["losses"]["new"]))
        assert not saved.keys() & {"perplexity", "eval_loss"}  # of another sample of the corpus
        assert json.loads((folder / "work" / f"{run.name}.run_clm.json").read_text()) == result["run_clm"]
        assert not list((folder / "models" / run.name).glob("*run*")) + list(folder.glob("models/*/*.log"))

    def test_usage_counts_every_expert(self, small_study):
        folder, _ = small_study
        results = read_results(folder / "scaling.json")
        (usage,) = results.runs[results.reference().name]["usage"].values()
        assert sum(usage["histogram"]) + usage["unused"] == 64 == PEER_FIELDS["num_experts"]
        assert usage["usage"] == pytest.approx(1 - usage["unused"] / 64)

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
        main()
        assert {file: file.stat().st_mtime_ns for file in (folder / "results").iterdir()} == before

    def test_a_run_that_is_not_whole_keeps_its_checkpoints(self, small_study):
        """Of whatever stage it is: the study begins each time with the first."""
        folder, main = small_study
        run = read_results(folder / "scaling.json").reference()
        unfinished, whole = (folder / "models" / name / "checkpoint-1" for name in ("unfinished", run.name))
        for checkpoint in (unfinished, whole):
            checkpoint.mkdir(parents=True)
        try:
            main()
            assert unfinished.exists() and not whole.exists()
        finally:
            shutil.rmtree(unfinished.parent)

    def test_where_files_are_does_not_matter_to_what_goes_on(self):
        one = {"output_dir": "a", "max_steps": 1, "config_overrides": '{"num_experts": 16}'}
        assert comparable(one) == comparable(one | {"output_dir": "b"})
        assert comparable(one) == comparable(one | {"dataloader_pin_memory": True})  # as on a GPU
        for other in ({"max_steps": 2}, {"config_overrides": '{"num_experts": 64}'}):
            assert comparable(one) != comparable(one | other)

    def test_a_change_after_training_that_was_redefined_is_measured_again(self):
        result = {"after_training": {"h = 1": {"fields": {"num_retrieval_heads": 1}}}}
        for fields, is_missing in (({"num_retrieval_heads": 1}, False), ({"num_retrieval_heads": 2}, True)):
            assert bool(changes_to_measure(result, {"h = 1": fields})) == is_missing

    def test_a_run_goes_on_where_it_was_killed(self, small_study, tmp_path):
        """After a checkpoint, and after the last one: it ends as one that was not killed, with the same arguments only."""
        folder, _ = small_study
        run = read_results(folder / "scaling.json").reference()
        expected = read_results(folder / "scaling.json").runs[run.name]
        work = json.loads((folder / "work" / f"{run.name}.json").read_text())
        work["run_clm"] |= {"output_dir": str(tmp_path / "model"), "save_steps": 2, "save_total_limit": 10}
        file, result_file = tmp_path / "work.json", tmp_path / "result.json"
        file.write_text(json.dumps(work | {"result_file": str(result_file)}))

        def make():
            result_file.unlink(missing_ok=True)
            subprocess.run(
                [sys.executable, EXAMPLES / "scaling_run.py", file], check=True, capture_output=True, timeout=300
            )
            return json.loads(result_file.read_text())

        first = make()
        assert first["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        last = max(tmp_path.glob("model/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        assert last.name == f"checkpoint-{run.steps}"
        for name in ("trainer_state.json", "all_results.json"):
            (tmp_path / "model" / name).unlink()  # killed while the model was saved
        killed = make()
        assert killed["losses"] == pytest.approx(first["losses"], rel=1e-5)
        assert killed["all_results"]["train_samples"] == first["all_results"]["train_samples"]
        shutil.rmtree(last)
        again = make()
        assert again["losses"] == pytest.approx(first["losses"], rel=1e-5)
        assert again["all_results"]["train_runtime"] != first["all_results"]["train_runtime"]
        file.write_text(
            json.dumps(work | {"run_clm": work["run_clm"] | {"learning_rate": 0.5}, "result_file": str(result_file)})
        )
        with pytest.raises(subprocess.CalledProcessError) as error:
            make()
        assert b"was begun with other arguments" in error.value.stderr

    def test_a_run_that_fails_is_named_and_its_log(self, small_study, monkeypatch):
        folder, main = small_study
        run = rate_runs(read_plan(folder / "plan.json"))[0]
        lost = folder / "results" / f"{run.name}.json"
        kept = lost.read_bytes()
        lost.unlink()
        monkeypatch.setattr(scaling_study, "EXAMPLES", folder / "missing")
        try:
            with pytest.raises(RuntimeError, match=re.escape(run.name) + r" failed with 2: see .*\.log"):
                main()
        finally:
            lost.write_bytes(kept)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"block_size": 16}, "block_size was 32, got 16"),
            # A variant that was redefined has results that are not its own: also by what was not there, and by its base.
            (
                {"variants": SMALL["variants"] | {"peer": SMALL["variants"]["peer"] | {"expert_act": None}}},
                "expert_act was absent, got None",
            ),
            (
                {"variants": SMALL["variants"] | {"dense": {"configuration": "moe-tiny"}}},
                "config_name was dense-tiny, got moe-tiny",
            ),
        ],
    )
    def test_refuses_results_of_another_study(self, small_study, monkeypatch, changed, message):
        folder, main = small_study
        monkeypatch.setattr(scaling_study.subprocess, "run", lambda *_, **__: pytest.fail("trains before it refuses"))
        (folder / "plan.json").write_text(json.dumps(SMALL | changed))
        try:
            with pytest.raises(ValueError, match=message):
                main()
        finally:
            (folder / "plan.json").write_text(json.dumps(SMALL))

    def test_what_is_added_to_the_plan_is_measured(self, small_study):
        """A change after training needs no training."""
        folder, main = small_study
        before = read_results(folder / "scaling.json")
        plan = SMALL | {"after_training": SMALL["after_training"] | {"k = 3": {"num_experts_per_head": 3}}}
        (folder / "plan.json").write_text(json.dumps(plan))
        try:
            main()
            after = read_results(folder / "scaling.json")
        finally:
            (folder / "plan.json").write_text(json.dumps(SMALL))
        run = with_seeds(before.reference(), before.plan)[0]
        assert set(after.runs[run.name]["after_training"]) == {"k = 2", "h = 1", "k = 3"}
        assert after.losses(run) == before.losses(run) and after.runs.keys() == before.runs.keys()

    def test_goes_on_from_results_made_elsewhere(self, small_study, tmp_path, monkeypatch):
        """Without texts and models, to the same tables and cards."""
        folder, main = small_study
        for module, name in ((scaling_study.subprocess, "run"), (scaling_study, "train_tokenizer")):
            monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("makes what is there"))
        flags = ("--output_dir", str(tmp_path), "--results", str(folder / "scaling.json"))
        main(*flags)
        before, after = read_results(folder / "scaling.json"), read_results(tmp_path / "scaling.json")
        assert (after.runs, after.seconds) == (before.runs, before.seconds)
        assert (tmp_path / "tables.md").read_text() == describe(Results(after.plan, before.runs, before.seconds))
        assert {file.name: file.read_text() for file in (tmp_path / "model_cards").iterdir()} == {
            file.name: file.read_text() for file in (folder / "model_cards").iterdir()
        }
        assert not (tmp_path / "held_out").exists()

    def test_what_is_here_or_begun_is_not_taken_from_elsewhere(self, small_study, tmp_path):
        folder, _ = small_study
        results = read_results(folder / "scaling.json")
        here, begun, *others = results.runs
        (tmp_path / "models" / begun).mkdir(parents=True)
        (tmp_path / "results").mkdir()
        (tmp_path / "results" / f"{here}.json").write_text("{}")
        times = Results(results.plan, results.runs, {})  # of no size
        scaling_study.Study(results.plan, tmp_path, 1, times)
        assert (tmp_path / "results" / f"{here}.json").read_text() == "{}"
        assert {file.stem for file in (tmp_path / "results").iterdir()} == {here, *others}
        assert not (tmp_path / "seconds").exists()

    def test_only_what_is_asked_for_is_told_of(self, small_study, tmp_path):
        """A seed that the plan no longer asks for may be of a model that it no longer describes."""
        folder, _ = small_study
        results = read_results(folder / "scaling.json")
        study = scaling_study.Study(results.plan, tmp_path, 1, results)
        runs = rate_runs(results.plan)
        assert study.make(runs, "").keys() == {run.name for run in runs}

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda made: made["all_results"].update(train_samples=7), "the training text"),
            (lambda made: made["texts"].update(new="another"), "new"),
        ],
    )
    def test_runs_on_other_texts_do_not_stand_beside_each_other(
        self, small_study, tmp_path, monkeypatch, change, text
    ):
        folder, _ = small_study
        results = read_results(folder / "scaling.json")
        run, *others = rate_runs(results.plan)
        made = results.runs.pop(run.name)
        study = scaling_study.Study(results.plan, tmp_path, 1, results)
        (tmp_path / "held_out").symlink_to(folder / "held_out")
        change(made)
        monkeypatch.setattr(study, "prepare", lambda: None)
        monkeypatch.setattr(study, "_make", lambda run, _: study.result_file(run).write_text(json.dumps(made)))
        with pytest.raises(ValueError, match=f"no longer the same: of {text}"):
            study.make([run, *others], "")

    def test_refuses_results_on_other_texts_before_it_trains(self, small_study, tmp_path):
        folder, _ = small_study
        results = read_results(folder / "scaling.json")
        run, *_ = rate_runs(results.plan)
        del results.runs[run.name]
        study = scaling_study.Study(results.plan, tmp_path, 1, results)
        shutil.copytree(folder / "held_out", tmp_path / "held_out")
        shutil.rmtree(tmp_path / "held_out" / "new")
        shutil.copytree(folder / "held_out" / CORPUS, tmp_path / "held_out" / "new")  # a package in another version
        with pytest.raises(ValueError, match=f"no longer the same: of new, {tmp_path} has"):
            study.make([run], "")
        assert not (tmp_path / "work").exists()

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"block_size": 16}, "a study whose `block_size` was 32, got 16"),
            (
                {"after_training": {"never measured": {"num_experts_per_head": 1}}},  # by no test of the same study
                "has not all that `after_training` asks for, and its model is not in",
            ),
        ],
    )
    def test_refuses_results_made_elsewhere_in_another_way(self, small_study, tmp_path, changed, message):
        folder, main = small_study
        plan = tmp_path / "plan.json"
        plan.write_text(json.dumps(SMALL | changed))
        flags = ("--output_dir", str(tmp_path), "--plan", str(plan), "--results", str(folder / "scaling.json"))
        with pytest.raises(ValueError, match=message):
            main(*flags)
        if "block_size" in changed:  # nothing is claimed that was refused
            assert {file.name for file in tmp_path.iterdir()} <= {"plan.json", ".lock"}

    def test_one_at_a_time(self, small_study):
        folder, main = small_study
        with FileLock(folder / ".lock"), pytest.raises(SystemExit, match="Another process is at work"):
            main()


class Recorded:
    """A study whose runs have all been made."""

    def __init__(self, results):
        self.plan, self.results, self.asked = results.plan, results, set()

    def make(self, runs, description):
        self.asked |= {run.name for run in runs}
        return self.results.runs

    def seconds(self):
        return self.results.seconds


@pytest.fixture(scope="module")
def committed():
    return read_results(EXAMPLES / "results" / "scaling.json")


class TestCommittedResults:
    """What is told in the repository is what came of the runs whose raw results are there."""

    def test_are_all_of_the_plan_and_no_others(self, committed):
        assert committed.plan == read_plan(PLANS / "two-cores.json")
        recorded = Recorded(committed)
        scaling.run_study(recorded)
        assert recorded.asked == set(committed.runs)

    def test_every_run_was_made_as_planned(self, committed, tmp_path):
        """The arguments of its training are those that the plan makes today."""
        study = scaling_study.Study(committed.plan, tmp_path, 1)
        for name, result in committed.runs.items():
            ablation = None if result["ablation"] is None else tuple(result["ablation"])
            run = Run(
                *(result[each] for each in ("variant", "hidden_size", "steps", "learning_rate", "seed")), ablation
            )
            assert run.name == name
            assert comparable(result["run_clm"]) == comparable(study._arguments(run))
            assert result["training_flops"] == training_flops(run, committed.plan)
            every = result["run_clm"]["logging_steps"]
            assert [step for step, _ in result["train_history"]] == list(range(every, run.steps + 1, every))

    def test_tables(self, committed):
        page = (EXAMPLES / "results" / "scaling.md").read_text()
        readme = (ROOT / "README.md").read_text()
        assert describe(committed) in page
        for table in (table_of_perplexities(committed, committed.plan.budgets[-1]), table_of_seconds(committed)):
            assert table in readme

    def test_a_row_of_the_tables_by_hand(self, committed):
        """Of PEER at the larger budget, without the report's functions."""
        budget = committed.plan.budgets[-1]
        of_budget = [
            run
            for run in committed.runs.values()
            if run["variant"] == PEER and run["ablation"] is None and abs(run["training_flops"] / budget - 1) < 1e-3
        ]
        swept = [run for run in of_budget if run["seed"] == 0]
        best = min(swept, key=lambda run: run["losses"][CORPUS])["hidden_size"]
        losses = [run["losses"] for run in of_budget if run["hidden_size"] == best and run["seed"] > 0]
        assert len(losses) == committed.plan.seeds
        means = [math.prod(math.exp(each[name]) for name in committed.plan.evaluation_texts) ** 0.2 for each in losses]
        row = re.search(rf"^\| PEER +\| +{best} .*$", (ROOT / "README.md").read_text(), re.M).group()
        assert f"{sum(means) / len(means):.2f} ± {stdev(means):.2f}" in row

    def test_pictures(self):
        readme, page = (file.read_text() for file in (ROOT / "README.md", EXAMPLES / "results" / "scaling.md"))
        for name in PLOTS:
            assert (EXAMPLES / "results" / f"scaling_{name}.png").read_bytes().startswith(b"\x89PNG")
            assert f"(scaling_{name}.png)" in page
        assert "(examples/results/scaling_sizes.png)" in readme and "(examples/results/scaling_seconds.png)" in readme

    def test_cards(self, committed):
        folder = ROOT / "model_cards" / "scaling"
        cards = {f"{name}.md": card for name, card in make_cards(committed).items()}
        assert {file.name: file.read_text() for file in folder.iterdir()} == {
            name: str(card) for name, card in cards.items()
        }
        for variant, run in committed.optimal(committed.plan.budgets[0]).items():
            card = ModelCard.load(folder / f"{variant}-{budget_name(committed.plan.budgets[0])}-flops.md")
            seeds = [committed.runs[each.name]["losses"] for each in with_seeds(run, committed.plan)]
            assert {each.dataset_name: each.metric_value for each in card.data.eval_results} == pytest.approx(
                {name: sum(math.exp(losses[name]) for losses in seeds) / len(seeds) for name in seeds[0]}
            )
