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
"""The committed results of the study of streams, with its own model and with the recipe."""

import json
from pathlib import Path

import pytest

from studies.stream.report import choose_hyperparameters, describe, describe_shares, order_of, summarize


ROOT = Path(__file__).parents[3]
STREAM = ROOT / "examples" / "studies" / "stream"


@pytest.mark.parametrize("folder", [STREAM, STREAM / "recipe"], ids=["own model", "recipe"])
def test_tables_are_those_of_the_raw_results(folder):
    results = json.loads((folder / "results.json").read_text())
    swept = [run for run in results["runs"] if run["seed"] == 0 and order_of(run) == 1]
    level, chosen = choose_hyperparameters(swept)
    rebuilt = summarize(results["runs"], results["texts"], level, chosen, results["arguments"])
    assert rebuilt["equal_learning"] == results["equal_learning"] and rebuilt["arms"] == results["arms"]
    assert all(result["seeds"] == 3 for result in results["arms"].values())
    page, guide = (file.read_text() for file in (STREAM / "README.md", ROOT / "docs/continual-learning.md"))
    assert describe_shares(results) in guide and describe_shares(results) in page
    assert describe(results) in page


def test_the_recipe_was_run_with_its_base():
    results = json.loads((STREAM / "recipe" / "results.json").read_text())
    assert results["arguments"]["base"] == json.loads((STREAM / "recipe" / "base.json").read_text())
