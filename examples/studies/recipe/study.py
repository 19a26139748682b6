# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The folder of the recipe study: what distinguishes its runs from those of other studies."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from transformers import AutoTokenizer

from studies.common.corpora import blocks_in_documents
from studies.common.study_folder import read_json
from studies.common.training_plan import DENSE, Run
from studies.common.training_study import TrainingStudy
from studies.recipe.plan import RecipePlan, run_of_size, timed_trials
from studies.recipe.results import Results
from studies.recipe.variants import register_variants


class Study(TrainingStudy):
    """See [`TrainingStudy`]; its plan is a [`RecipePlan`]."""

    single_run = "studies.recipe.single_run"

    def __init__(
        self, plan: RecipePlan, folder: Path, processes: int, made_elsewhere: Results | None = None, **options
    ):
        register_variants()  # so that their costs can be counted
        self.made_elsewhere = made_elsewhere
        super().__init__(plan, folder, processes, made_elsewhere, **options)

    def timed_runs(self) -> dict[str, list[Run]]:
        """Dense, and the recipe with all trials for equal seconds, at all sizes at which these may be compared."""
        results = self.all_results()
        if not (sizes := results.timed_sizes()):
            return {}
        plan, runs = self.plan, (results.best[DENSE], *timed_trials(self.plan))
        return {
            str(size): [replace(run_of_size(run, size, plan.budgets[0], plan), steps=1) for run in runs]
            for size in sizes
        }

    def documents(self) -> dict[str, list[int]]:
        """For each evaluation text, the index of the document in which each sequence lies."""
        if not (self.folder / "held_out" / "texts.json").exists():
            return {} if self.made_elsewhere is None else self.made_elsewhere.documents
        return {
            text: load_from_disk(self.folder / "held_out" / text)["document"][:] for text in self.plan.evaluation_texts
        }

    def all_results(self) -> Results:
        """All results in the folder, also those of steps that this call had no time to reach again."""
        parts = [
            {file.stem: read_json(file) for file in sorted((self.folder / name).glob("*.json"))}
            for name in ("results", "seconds")
        ]
        return Results(self.plan, *parts, self.documents())

    def beside_arguments(self, run: Run) -> dict[str, Any]:
        return {"trial": self.plan.trial_of(run)}

    def arguments(self, run: Run) -> dict[str, Any]:
        """The arguments of run_clm.py for a run. Runs with the same seed see the sequences in the same order."""
        return super().arguments(run) | {"data_seed": run.seed}

    def held_out_blocks(self, texts: Dataset) -> Dataset:
        """Sequences that each lie in one document, with its index as `document`: intervals resample documents."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder / "tokenizer")
        return blocks_in_documents(texts["text"], tokenizer, self.plan.block_size, self.plan.eval_sequences)
