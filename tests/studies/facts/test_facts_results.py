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
"""The tables of the study of facts in the repository, against its raw results."""

import json
from pathlib import Path

from studies.common.tables import spread_cell
from studies.facts.arms import ARMS
from studies.facts.report import (
    choose_hyperparameters,
    describe,
    level_of_all,
    read_chosen,
    summarize,
    table_at_equal_learning,
)


ROOT = Path(__file__).parents[3]
FACTS = ROOT / "examples" / "studies" / "facts"


def test_tables_are_those_of_the_raw_results():
    results = json.loads((FACTS / "results.json").read_text())
    level, chosen = choose_hyperparameters([run for run in results["runs"] if run["seed"] == 0])
    labels = {arm: result["label"] for arm, result in results["arms"].items()}
    rebuilt = summarize(results["runs"], labels, level, chosen, results["arguments"])
    assert rebuilt["equal_learning"] == results["equal_learning"] and rebuilt["arms"] == results["arms"]
    assert all(result["seeds"] == [0, 1, 2] for result in results["arms"].values())
    assert table_at_equal_learning(results) in (ROOT / "docs/continual-learning.md").read_text()
    assert describe(results) in (FACTS / "README.md").read_text()


def test_tables_of_facts_known_elsewhere_are_those_of_the_raw_results():
    results = json.loads((FACTS / "known_elsewhere" / "results.json").read_text())
    chosen = read_chosen(FACTS / "results.json", {name: ARMS[name] for name in results["arms"]})
    labels = {arm: result["label"] for arm, result in results["arms"].items()}
    rebuilt = summarize(results["runs"], labels, level_of_all(results["runs"]), chosen, results["arguments"])
    assert rebuilt["arms"] == results["arms"] and rebuilt["shares"] == results["shares"]
    assert all(result["seeds"] == [0, 1, 2] for result in results["arms"].values())
    assert describe(results) in (FACTS / "README.md").read_text()
    guide = (ROOT / "docs/continual-learning.md").read_text()
    for result in results["arms"].values():
        forgotten = (
            spread_cell(*(result["at_equal_learning"][name][f"{kind}_drop"] for name in ("mean", "deviation")))
            for kind in ("known", "known_elsewhere")
        )
        assert " | ".join([f"| {result['label']}", *forgotten, ""]).rstrip() in guide
