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
"""The committed page, tables, plots and model cards of the scaling study are those of its raw results."""

import math
import re
from statistics import stdev

import pytest
from huggingface_hub import ModelCard
from scaling_plans import ROOT, SCALING

import studies.scaling.__main__ as scaling
from studies.common.single_run import comparable
from studies.common.training_plan import CORPUS, PEER, Run, budget_name, training_flops
from studies.scaling.cards import make_cards
from studies.scaling.plan import read_plan, with_seeds
from studies.scaling.plots import PLOTS
from studies.scaling.report import (
    describe,
    read_results,
    table_of_perplexities,
    table_of_seconds,
)
from studies.scaling.study import Study


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
    return read_results(SCALING / "results.json")


class TestCommittedResults:
    """What is told in the repository is what came of the runs whose raw results are there."""

    def test_are_all_of_the_plan_and_no_others(self, committed):
        assert committed.plan == read_plan(SCALING / "plans" / "two-cores.json")
        recorded = Recorded(committed)
        scaling.run_study(recorded)
        assert recorded.asked == set(committed.runs)

    def test_every_run_was_made_as_planned(self, committed, tmp_path):
        """The arguments of its training are those that the plan makes today."""
        study = Study(committed.plan, tmp_path, 1)
        for name, result in committed.runs.items():
            ablation = None if result["ablation"] is None else tuple(result["ablation"])
            run = Run(
                *(result[each] for each in ("variant", "hidden_size", "steps", "learning_rate", "seed")), ablation
            )
            assert run.name == name
            assert comparable(result["run_clm"]) == comparable(study.arguments(run))
            assert result["training_flops"] == training_flops(run, committed.plan)
            every = result["run_clm"]["logging_steps"]
            assert [step for step, _ in result["train_history"]] == list(range(every, run.steps + 1, every))

    def test_tables(self, committed):
        page = (SCALING / "README.md").read_text()
        quality = (ROOT / "docs/quality.md").read_text()
        assert describe(committed) in page
        for table in (table_of_perplexities(committed, committed.plan.budgets[-1]), table_of_seconds(committed)):
            assert table in quality

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
        row = re.search(rf"^\| PEER +\| +{best} .*$", (ROOT / "docs/quality.md").read_text(), re.M).group()
        assert f"{sum(means) / len(means):.2f} ± {stdev(means):.2f}" in row

    def test_pictures(self):
        quality, page = (file.read_text() for file in (ROOT / "docs/quality.md", SCALING / "README.md"))
        for name in PLOTS:
            assert (SCALING / f"{name}.png").read_bytes().startswith(b"\x89PNG")
            assert f"({name}.png)" in page
        assert all(f"(../examples/studies/scaling/{name}.png)" in quality for name in ("sizes", "seconds"))

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
