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
"""The committed results of the recipe study are those of its plan."""

from contextlib import suppress
from types import SimpleNamespace

from recipe_plans import PLANS

from studies.common.single_run import comparable
from studies.common.training_plan import CORPUS, merge_changes
from studies.common.training_study import TimeIsUp
from studies.recipe.__main__ import run_study
from studies.recipe.plan import RECIPE, read_plan, screening_runs, with_factors
from studies.recipe.report import describe, is_adopted
from studies.recipe.results import read_results
from studies.recipe.study import Study


def runs_asked_for(results, plan):
    """The runs of the study by their names, up to the step that lacks results."""
    asked = {}

    def make(runs, _):
        asked.update({run.name: run for run in runs})
        if not results.are_made(runs):
            raise TimeIsUp
        return results.runs

    study = SimpleNamespace(plan=plan, make=make, seconds=lambda: results.seconds, all_results=lambda: results)
    with suppress(TimeIsUp):
        run_study(study)
    return asked


def test_every_run_was_made_as_planned(tmp_path):
    results = read_results(PLANS.parent / "results.json")
    plan = read_plan(PLANS / "two-cores.json")
    study = Study(plan, tmp_path, 1)
    planned = runs_asked_for(results, plan)
    made = {name: run for name, run in planned.items() if name in results.runs}
    assert made.keys() == results.runs.keys() >= {run.name for run in screening_runs(plan).values()}
    for name, run in made.items():
        result = results.runs[name]
        assert comparable(result["run_clm"]) == comparable(study.arguments(run)), name
        assert result["trial"] == plan.trial_of(run)
        assert result["losses"].keys() == {CORPUS, *plan.evaluation_texts}
        for text, documents in results.documents.items():
            assert len(documents) == len(result["sequence_losses"][text]) == plan.eval_sequences
    page = (PLANS.parent / "README.md").read_text()
    assert describe(results).replace("## ", "### ").strip() in page


def test_the_recipe_is_what_the_last_design_adopted():
    results = read_results(PLANS.parent / "results.json")
    plan, design = results.plan, results.plan.designs[-1]
    adopted = [name for name in design["factors"] if is_adopted(results.effects(design)[name], design["bar"])]
    changes = [
        with_factors(merge_changes(*plan.lineage(variant)), [plan.factors[name] for name in factors])
        for variant, factors in ((design["variant"], adopted), (RECIPE, []))
    ]
    expected, found = ({name: each[name] for name in each if name != "parent"} for each in changes)
    assert found == expected and adopted
