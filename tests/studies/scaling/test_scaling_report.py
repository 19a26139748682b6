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
"""Tables, plots and model cards that the scaling study makes of results."""

import json
import math
from statistics import stdev

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from scaling_plans import PLAN

from studies.common.trained_models import mean_perplexities
from studies.common.training_plan import CORPUS, PEER, run_of_budget
from studies.scaling.cards import make_cards, write_cards
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
    describe,
    edges,
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
        own = (
            "`row_adamw` True, `down_proj_lr_multiplier` 48, `expert_initializer_range` 0.1; PEER with `row_adamw` "
            "True"
        )
        assert f"trained alike, except PKM with {own}, `expert_lr_multiplier` 0.25" in tables
        assert tables.count("PEER itself is given as mean ± standard deviation over 3 seeds") == 2
        assert "counted on 65,536 tokens" in tables
        assert "median of 3 steps, measured for dense and PEER in turns" in tables and "cores 2" in tables

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
        write_results(tmp_path / "results.json", results)
        assert describe(read_results(tmp_path / "results.json")) == describe(results)
        for line in (tmp_path / "results.json").read_text().split('"runs": {\n')[1].split("\n")[:-3]:
            assert line.startswith('  "') and "learning_rate" in line  # a run in each


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
            assert ("as a baseline for PEER layers" in cards[name].text) != has_experts

    def test_written(self, results, tmp_path):
        write_cards(results, tmp_path)
        assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
            f"{name}.md": str(card) for name, card in make_cards(results).items()
        }
