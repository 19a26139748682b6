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


def test_what_other_pages_say_of_forgetting_is_what_was_found():
    """Of the front page, nats per token of both models; of the page of the recipe, shares."""
    own, recipe = (json.loads((folder / "results.json").read_text())["arms"] for folder in (STREAM, STREAM / "recipe"))
    said = [
        {
            arm: f"{result['mean']['forgetting']:.3f} ± {result['deviation']['forgetting']:.3f}"
            for arm, result in each.items()
        }
        for each in (own, recipe)
    ]
    front = (ROOT / "README.md").read_text()
    protected = "experts added in protected mode {} nats per token,"
    assert f"{protected.format(said[0]['protected'])} full finetuning {said[0]['full']} |" in front
    generated = f"without a look at old text {said[1]['protected-generated']}"
    assert f"{protected.format(said[1]['protected'])} {generated}, full finetuning {said[1]['full']} |" in front
    shares = [
        [recipe[arm]["mean"]["forgetting"] / recipe[other]["mean"]["forgetting"] for other in ("full", "lora")]
        for arm in ("protected", "protected-generated")
    ]
    page = " ".join((STREAM.parent / "recipe" / "README.md").read_text().split())
    protected, generated = ([f"{100 * share:.0f}" for share in of_arm] for of_arm in shares)
    said = "protected mode forgets {} % of what full finetuning forgets and {} % of what LoRA forgets,"
    assert said.format(*protected) in page and "that the model generates, {} and {} %.".format(*generated) in page
