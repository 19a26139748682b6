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
"""The folder of the recipe study: what its runs have beside those of other studies."""

from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer

import studies.recipe.variants  # noqa: F401 registers them, for their costs
from studies.common.training_plan import Run
from studies.common.training_study import TrainingStudy


class Study(TrainingStudy):
    """See [`TrainingStudy`]; its plan is a [`RecipePlan`]."""

    single_run = "studies.recipe.single_run"

    def beside_arguments(self, run: Run) -> dict[str, Any]:
        return {"trial": self.plan.trial_of(run)}

    def arguments(self, run: Run) -> dict[str, Any]:
        """Runs of a seed see the sequences in the same order, whatever else they draw."""
        return super().arguments(run) | {"data_seed": run.seed}

    def held_out_blocks(self, texts: Dataset) -> Dataset:
        """Sequences that each lie in one document, whose number is in the column `document`: these are resampled."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder / "tokenizer")
        size, found = self.plan.block_size, {"input_ids": [], "document": []}
        for number, text in enumerate(texts["text"]):
            tokens = torch.tensor(tokenizer(text)["input_ids"])
            for block in tokens[: len(tokens) // size * size].view(-1, size).tolist():
                found["input_ids"].append(block)
                found["document"].append(number)
        blocks = Dataset.from_dict(found).shuffle(seed=0)
        return blocks.select(range(min(self.plan.eval_sequences, len(blocks))))
