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

from recipe_plans import PLANS

from studies.common.single_run import comparable
from studies.common.training_plan import CORPUS
from studies.recipe.plan import read_plan, screening_runs, search_runs
from studies.recipe.report import describe
from studies.recipe.results import read_results
from studies.recipe.study import Study


def test_every_run_was_made_as_planned(tmp_path):
    results = read_results(PLANS.parent / "results.json")
    plan = read_plan(PLANS / "two-cores.json")
    study = Study(plan, tmp_path, 1)
    planned = {run.name: run for run in (*screening_runs(plan).values(), *search_runs(plan))}
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
