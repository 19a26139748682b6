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
"""The folder of a scaling study: its texts, and what came of its runs, several of which are made at once."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from corpora import load_corpus
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
from scaling_plan import (
    CORPUS,
    PEER,
    Plan,
    Run,
    base_configuration,
    changed_fields,
    costs_of,
    reference_run,
    training_flops,
    with_seeds,
)
from scaling_speed import step_seconds
from studies import claim_folder, read_json, write_json
from text_data import DataTrainingArguments, tokenize_into_blocks, train_tokenizer
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from modeling_peer import PeerConfig, configuration_path


RUN_SCRIPT = Path(__file__).parent / "scaling_run.py"

# Of a run: points of its training loss, and how often it is saved.
LOGS, CHECKPOINTS = 40, 4


class Study:
    """
    A folder with the texts, the tokenizer, and what came of each run.

    Args:
        plan (`Plan`)
        folder (`Path`)
        processes (`int`): Runs at once.
    """

    def __init__(self, plan: Plan, folder: Path, processes: int):
        self.plan = plan
        self.folder = folder
        self.processes = processes
        # Of the rest each run keeps its own: lists of sizes, budgets or ablations may grow.
        texts = ("training_texts", "evaluation_texts", "block_size", "batch_size", "eval_sequences", "training")
        claim_folder(folder, {name: getattr(plan, name) for name in texts})

    def prepare(self) -> None:
        """Fetches the texts, trains the tokenizer and cuts the held-out texts into blocks, once."""
        if (self.folder / "held_out" / "texts.json").exists():
            return
        parts = [load_corpus(name) for name in self.plan.training_texts]
        corpus = DatasetDict({split: concatenate_datasets([part[split] for part in parts]) for split in parts[0]})
        for split, texts in corpus.items():
            texts.to_parquet(self.folder / "text" / f"{split}.parquet")
        base = PeerConfig.from_pretrained(configuration_path(next(iter(self.plan.variants.values()))["configuration"]))
        tokenizer = train_tokenizer(
            corpus["train"].shuffle(seed=0), "text", base.vocab_size, base.max_position_embeddings
        )
        tokenizer.save_pretrained(self.folder / "tokenizer")
        held_out = {CORPUS: corpus["validation"]}
        for name in self.plan.evaluation_texts:
            held_out[name] = concatenate_datasets(list(load_corpus(name).values()))
        for name, texts in held_out.items():
            self._blocks(texts).save_to_disk(self.folder / "held_out" / name)
        write_json(self.folder / "held_out" / "texts.json", list(held_out))

    def _blocks(self, texts: Dataset) -> Dataset:
        tokenizer = AutoTokenizer.from_pretrained(self.folder / "tokenizer")
        blocks = tokenize_into_blocks(texts, tokenizer, self.plan.block_size, DataTrainingArguments())
        return blocks.shuffle(seed=0).select(range(min(self.plan.eval_sequences, len(blocks))))

    def result_file(self, run: Run) -> Path:
        return self.folder / "results" / f"{run.name}.json"

    def results(self) -> dict[str, dict[str, Any]]:
        """What came of all runs there are, by their names."""
        return {file.stem: read_json(file) for file in sorted((self.folder / "results").glob("*.json"))}

    def seconds(self, rates: dict[str, float]) -> dict[str, list[float]]:
        """Of each variant and size, seconds of training steps, measured once and with nothing else running."""
        file = self.folder / "seconds.json"
        if not file.exists():
            text = torch.tensor(load_from_disk(self.folder / "held_out" / CORPUS)["input_ids"])
            found: dict[str, list[float]] = {}
            for hidden_size in self.plan.hidden_sizes:
                runs = [Run(variant, hidden_size, 1, rates[variant]) for variant in self.plan.variants]
                found |= step_seconds(runs, self.plan, text)
            write_json(file, found)
        return read_json(file)

    def make(self, runs: list[Run], description: str) -> dict[str, dict[str, Any]]:
        """
        Makes those of the runs that are not there yet, several at once, and returns the results of all there are.

        Raises:
            `RuntimeError`: if one fails, after those under way are done.
            `ValueError`: if one that is there is of a model with other fields.
        """
        missing = [run for run in dict.fromkeys(runs) if not self.result_file(run).exists()]
        devices: SimpleQueue[int] = SimpleQueue()
        for i in range(self.processes):
            devices.put(i)
        with ThreadPoolExecutor(self.processes) as pool:
            futures = [pool.submit(self._make, run, devices) for run in missing]
            try:
                bar = tqdm(as_completed(futures), desc=description, total=len(missing), disable=not missing)
                for future in bar:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return self._checked(runs)

    def _checked(self, runs):
        results = self.results()
        for run in runs:
            found, expected = results[run.name]["fields"], changed_fields(run, self.plan)
            changed = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
            if changed:
                raise ValueError(
                    f"{self.result_file(run)} is of a model with other fields: "
                    + ", ".join(f"{name} was {found.get(name)}, got {expected.get(name)}" for name in sorted(changed))
                    + ". Remove it, and its folder in models, or choose another --output_dir."
                )
        return results

    def _make(self, run, devices):
        device = devices.get()
        environment = dict(os.environ, TOKENIZERS_PARALLELISM="false")
        if torch.cuda.is_available():
            environment["CUDA_VISIBLE_DEVICES"] = str(device % torch.cuda.device_count())
        else:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.processes))
        folder = self.folder / "models" / run.name
        write_json(folder / "run.json", self._work(run, folder))
        try:
            with open(folder / "log.txt", "a") as log:
                command = [sys.executable, str(RUN_SCRIPT), str(folder / "run.json")]
                status = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
        finally:
            devices.put(device)
        if status:
            raise RuntimeError(f"{run.name} failed with {status}: see {folder / 'log.txt'}.")

    def _work(self, run, folder):
        costs = costs_of(run, self.plan)
        description = {
            **asdict(run),
            "fields": changed_fields(run, self.plan),
            "flops_per_token": costs.flops,
            "training_flops": training_flops(run, self.plan),
            "parameters": costs.parameters,
            "active_parameters": costs.active_parameters,
        }
        is_reference = run in with_seeds(reference_run(self.plan, {PEER: run.learning_rate}), self.plan)
        return {
            "run": description,
            "run_clm": self._arguments(run, folder),
            "result_file": str(self.result_file(run)),
            "held_out": str(self.folder / "held_out"),
            "after_training": self.plan.after_training if is_reference else {},
        }

    def _arguments(self, run, folder):
        """What run_clm.py takes."""
        fields = changed_fields(run, self.plan)
        batch_size = self.plan.batch_size // self.plan.training.get("gradient_accumulation_steps", 1)
        return {
            "config_name": base_configuration(run, self.plan),
            "config_overrides": json.dumps(fields),
            "tokenizer_name": str(self.folder / "tokenizer"),
            "train_file": str(self.folder / "text" / "train.parquet"),
            "validation_file": str(self.folder / "text" / "validation.parquet"),
            "do_train": True,
            "do_eval": True,
            "output_dir": str(folder),
            "block_size": self.plan.block_size,
            "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": 4 * batch_size,
            "max_eval_samples": self.plan.eval_sequences,
            "max_steps": run.steps,
            "learning_rate": run.learning_rate,
            "row_adamw": fields.get("sparse_expert_gradients", False),
            "seed": run.seed,
            "logging_steps": max(1, run.steps // LOGS),
            "save_steps": max(1, run.steps // CHECKPOINTS),
            "save_total_limit": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
            **self.plan.training,
        }
