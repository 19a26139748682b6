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
"""Tables of the recipe study from its raw results."""

import math
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from studies.common.study_folder import read_json, write_runs
from studies.common.tables import markdown_table
from studies.common.training_plan import CORPUS, Run, costs_of
from studies.recipe.plan import RecipePlan, search_runs


class Results:
    """
    Results of the runs that were made, with lookups.

    Args:
        plan (`RecipePlan`): Plan of the study.
        runs (`dict[str, dict]`): Results of single_run.py by the names of runs.
        seconds (`dict`): Step times from `Study.seconds`.
    """

    def __init__(self, plan: RecipePlan, runs: dict[str, dict[str, Any]], seconds: dict[str, Any]):
        self.plan = plan
        self.runs = runs
        self.seconds = seconds

    def are_made(self, runs: list[Run]) -> bool:
        """Whether all of these runs have a result."""
        return all(run.name in self.runs for run in runs)

    def corpus_losses(self, runs: list[Run]) -> list[float]:
        """Loss of each run on the held-out part of the training texts, in nats per token."""
        return [self.runs[run.name]["losses"][CORPUS] for run in runs]

    def text_losses(self, runs: list[Run]) -> list[float]:
        """Mean loss of each run over the evaluation texts, in nats per token."""
        return [mean(self.runs[run.name]["losses"][text] for text in self.plan.evaluation_texts) for run in runs]


def below(losses: list[float], others: list[float]) -> tuple[float, float]:
    """
    By which share the perplexity of runs is below that of others with the same seeds, and the standard error of that:
    both of the mean difference of the losses of each pair.
    """
    differences = [loss - other for loss, other in zip(losses, others, strict=True)]
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return 1 - math.exp(mean(differences)), error


def below_cell(losses: list[float], others: list[float]) -> str:
    """The same as a cell of a table."""
    share, error = below(losses, others)
    return f"{share:+.1%}" + ("" if math.isnan(error) else f" ± {error:.1%}")


def table_of_the_search(results: Results) -> str:
    """Table of variants that were searched, each against its parent with the same seeds."""
    plan, search = results.plan, search_runs(results.plan)
    rows = [["", "parent", "MFLOPs per token", "steps", CORPUS, "below parent", "five texts", "below parent"]]
    for name, runs in search.items():
        if not results.are_made(runs):
            continue
        parent = plan.variants[name].get("parent", "") if name in plan.searched else ""
        cells = []
        for losses in (results.corpus_losses, results.text_losses):
            is_compared = parent and results.are_made(search[parent])
            own = losses(runs)
            cells += [f"{math.exp(mean(own)):.2f}", below_cell(own, losses(search[parent])) if is_compared else ""]
        rows.append([name, parent, f"{costs_of(runs[0], plan).flops / 1e6:.2f}", f"{runs[0].steps:,}", *cells])
    return markdown_table(rows)


def describe(results: Results) -> str:
    """All tables, under headings."""
    return f"## Search\n\n{table_of_the_search(results)}\n"


def write_results(file: Path, results: Results) -> None:
    """Writes the results to a JSON file, with one line per run."""
    write_runs(file, {"plan": asdict(results.plan), "seconds": results.seconds}, results.runs)


def read_results(file: Path) -> Results:
    """Reads a file of [`write_results`]."""
    parts = read_json(file)
    return Results(RecipePlan(**parts["plan"]), parts["runs"], parts["seconds"])
