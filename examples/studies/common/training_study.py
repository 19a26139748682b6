# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The folder of a study that trains models: its texts, its runs, of which several are made at once, and results."""

import dataclasses
import json
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from common.subprocesses import module_command, module_environment
from common.text_data import DataTrainingArguments, text_column, tokenize_into_blocks, train_tokenizer
from studies.common.corpora import load_corpus
from studies.common.single_run import EVAL_BATCH_SIZE, changes_to_measure, comparable, digests, read_texts
from studies.common.study_folder import claim_folder, read_json, write_json
from studies.common.training_plan import (
    CORPUS,
    DENSE,
    Run,
    TrainingPlan,
    base_configuration,
    changed_fields,
    costs_of,
    named_configuration,
    training_arguments,
    training_flops,
    trains_by_rows,
)


# Parts of the plan that all runs share. The rest is checked for each run: lists of sizes, budgets and ablations may
# grow.
COMMON = ("training_texts", "evaluation_texts", "block_size", "batch_size", "eval_sequences", "training")

# Per run: points of its training loss, and checkpoints.
LOGS, CHECKPOINTS = 40, 4


@dataclass
class TrainingStudyArguments:
    """Which plan to run, where to save the results, which results to reuse, and how many runs to make at once."""

    plan: str = field(metadata={"help": "Plan of the study, a JSON file."})
    output_dir: str = field(metadata={"help": "Output folder."})
    results: str | None = field(
        default=None, metadata={"help": "A results.json of the same study, whose runs are reused."}
    )
    processes: int | None = field(
        default=None,
        metadata={
            "help": "Number of runs at once. Defaults to one per accelerator, or to two that share the cores of a CPU."
        },
    )

    @property
    def num_processes(self) -> int:
        """Number of runs at once."""
        return self.processes or torch.cuda.device_count() or 2


class TimeIsUp(Exception):
    """Raised when the time that a study was given is up and runs are left."""


class TrainingStudy:
    """
    A folder with the texts, the tokenizer and the result of each run.

    Args:
        plan (`TrainingPlan`): Plan of the study.
        folder (`Path`): Folder of the study.
        processes (`int`): Number of runs at once.
        made_elsewhere (`Results`, *optional*):
            Results of the same study: `runs` and step times (`seconds`) are reused unless they were started here.
        until (`float`, *optional*): Time, as `time.time()` gives it, from which on no run is begun.

    Raises:
        `ValueError`: if the folder or the reused results belong to a study that differs in `COMMON`.
    """

    # The module that makes a run in a process of its own.
    single_run = "studies.common.single_run"

    def __init__(
        self,
        plan: TrainingPlan,
        folder: Path,
        processes: int,
        made_elsewhere: Any = None,
        until: float | None = None,
    ):
        self.plan = plan
        self.folder = folder
        self.processes = processes
        self.until = until
        self.asked: set[str] = set()  # names of all runs that were asked for
        common = {name: getattr(plan, name) for name in COMMON}
        for name, expected in common.items() if made_elsewhere is not None else ():
            if (found := getattr(made_elsewhere.plan, name)) != expected:
                raise ValueError(f"The results belong to a study whose `{name}` was {found}, but got {expected}.")
        claim_folder(folder, common)
        if made_elsewhere is not None:
            self._adopt(made_elsewhere)

    def _adopt(self, results):
        for name, result in results.runs.items():
            file = self.folder / "results" / f"{name}.json"
            if not file.exists() and not (self.folder / "models" / name).exists():
                write_json(file, result)
        # Step times are compared with each other, so all of them must come from one machine.
        if not (self.folder / "seconds").exists() and results.seconds.keys() >= self.timed_runs().keys():
            for size, measured in results.seconds.items():
                write_json(self._seconds_file(size), measured)

    def prepare(self) -> None:
        """Downloads the texts, trains the tokenizer and cuts the held-out texts into blocks, once."""
        if (self.folder / "held_out" / "texts.json").exists():
            return
        print("Reading the texts ...")
        parts = [self._read(name) for name in self.plan.training_texts]
        corpus = {split: concatenate_datasets([part[split] for part in parts]) for split in ("train", "validation")}
        for split, texts in corpus.items():
            texts.to_parquet(self.folder / "text" / f"{split}.parquet")
        base = named_configuration(self.plan.variants[DENSE]["configuration"])
        tokenizer = train_tokenizer(
            corpus["train"].shuffle(seed=0), "text", base.vocab_size, base.max_position_embeddings
        )
        tokenizer.save_pretrained(self.folder / "tokenizer")
        held_out = {CORPUS: corpus["validation"]}
        for name in self.plan.evaluation_texts:
            held_out[name] = concatenate_datasets(list(self._read(name).values()))
        for name, texts in held_out.items():
            self.held_out_blocks(texts).save_to_disk(self.folder / "held_out" / name)
        write_json(self.folder / "held_out" / "texts.json", list(held_out))

    def _read(self, name: str) -> DatasetDict:
        datasets = load_corpus(name)
        column = text_column(next(iter(datasets.values())), DataTrainingArguments())
        return datasets.select_columns(column).rename_columns({} if column == "text" else {column: "text"})

    def held_out_blocks(self, texts: Dataset) -> Dataset:
        """The sequences on which models are evaluated, of a text with one row per document."""
        tokenizer = AutoTokenizer.from_pretrained(self.folder / "tokenizer")
        blocks = tokenize_into_blocks(texts, tokenizer, self.plan.block_size, DataTrainingArguments())
        return blocks.shuffle(seed=0).select(range(min(self.plan.eval_sequences, len(blocks))))

    def result_file(self, run: Run) -> Path:
        """The file with the result of a run."""
        return self.folder / "results" / f"{run.name}.json"

    def _work_file(self, run):
        return self.folder / "work" / f"{run.name}.json"

    def results(self) -> dict[str, dict[str, Any]]:
        """The results of all runs that were asked for, by their names."""
        files = sorted((self.folder / "results").glob("*.json"))
        return {file.stem: read_json(file) for file in files if file.stem in self.asked}

    def timed_runs(self) -> dict[str, list[Run]]:
        """Runs of different variants whose steps are timed in turns, by names for their sets."""
        return {}

    def changes_after_training(self, run: Run) -> dict[str, dict[str, Any]]:
        """Changes of configuration fields whose effect on the trained model of a run is measured, by their names."""
        return {}

    def beside_arguments(self, run: Run) -> dict[str, Any]:
        """Settings of a run besides its arguments of run_clm.py. With other settings it is another run."""
        return {}

    def seconds(self) -> dict[str, Any]:
        """
        Seconds of training steps of the models of `timed_runs`, see `step_seconds`. All are measured once and
        together, as they are compared with each other.

        Raises:
            [`TimeIsUp`]: if they have to be measured when the time is up.
        """
        timed = self.timed_runs()
        fields = {name: {run.model: changed_fields(run, self.plan) for run in runs} for name, runs in timed.items()}
        files = {name: self._seconds_file(name) for name in timed}
        if not all(file.exists() and read_json(file)["fields"] == fields[name] for name, file in files.items()):
            self._check_time("the seconds of training steps")
            if (self.folder / "seconds").exists():
                print(
                    "Step times lack models of the plan: all are timed again, so runs for equal seconds are new ones."
                )
            for file in files.values():
                file.unlink(missing_ok=True)
            for name, runs in timed.items():
                self._measure_seconds(runs, fields[name], files[name])
        return {name: read_json(file) for name, file in files.items()}

    def _seconds_file(self, name):
        return self.folder / "seconds" / f"{name}.json"

    def _measure_seconds(self, runs, fields, result_file):
        self.prepare()
        file = self.folder / "work" / f"seconds-{result_file.name}"
        shared = {each.name: getattr(self.plan, each.name) for each in dataclasses.fields(TrainingPlan)}
        own = {run.model: self.plan.own_changes(run) for run in runs}
        work = {
            "plan": shared | {"variants": self.plan.variants | own},
            "runs": [asdict(replace(run, variant=run.model, ablation=None)) for run in runs],
            "fields": fields,
            "text": str(self.folder / "held_out" / CORPUS),
            "result_file": str(result_file),
        }
        write_json(file, work)
        command = module_command("studies.common.step_seconds", str(file))
        subprocess.run(command, env=module_environment(), check=True)

    def make(self, runs: list[Run], description: str) -> dict[str, dict[str, Any]]:
        """
        Makes the runs that have no result yet, several at once, and returns the results of all runs asked for so far.

        Raises:
            `RuntimeError`: if a run fails, after the runs in progress have ended.
            [`TimeIsUp`]: if the time is up and runs are left, after the runs in progress have ended.
            `ValueError`:
                if an existing result belongs to a model with other fields, has to be measured again without its model,
                or was trained on other texts.
        """
        runs = list(dict.fromkeys(runs))
        self.asked |= {run.name for run in runs}
        for run in runs:
            self._check(run)
        missing = [run for run in runs if not self._is_whole(run)]
        for run in set(runs).difference(missing):
            self._remove_checkpoints(run)  # a killed study leaves them behind
        if missing:
            self.prepare()
            self._check_texts()
        devices: SimpleQueue[int] = SimpleQueue()
        for i in range(self.processes):
            devices.put(i)
        with ThreadPoolExecutor(self.processes) as pool:
            futures = [pool.submit(self._make, run, devices) for run in missing]
            try:
                bar = tqdm(as_completed(futures), desc=description, total=len(missing), disable=not missing)
                for future in bar:
                    future.result()
                    self._check_texts()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return self.results()

    def _check(self, run):
        """Raises `ValueError` if the existing result of a run belongs to another model or another training."""
        file = self.result_file(run)
        if not file.exists():
            return
        result, more = read_json(file), self.beside_arguments(run)
        found = comparable(result["run_clm"]) | {name: result[name] for name in more if name in result}
        expected = comparable(self.arguments(run)) | more
        if found != expected:
            pairs = {name: (found.get(name, "absent"), expected.get(name, "absent")) for name in found | expected}
            raise ValueError(
                f"{file} was made with other arguments: "
                + ", ".join(f"{name} was {was}, got {got}" for name, (was, got) in sorted(pairs.items()) if was != got)
                + f". Remove it, {self.folder / 'models' / run.name} and {self._work_file(run)} and resume without "
                "--results, or choose another --output_dir."
            )

        if not self._is_whole(run) and not (self.folder / "models" / run.name).exists():
            raise ValueError(
                f"{file} lacks some of the changes after training, and its model is not in "
                f"{self.folder / 'models'}: remove the file and resume without --results to train the model again."
            )

    def _check_texts(self):
        """
        Raises `ValueError` if results come from different texts: a package may have been released in another version.
        """
        here = digests(read_texts(self.folder / "held_out", "cpu"))  # accelerators are left to the runs
        first = {
            text: (str(self.folder), digest) for text, digest in here.items()
        }  # where a text was seen first, and its digest
        for file in sorted((self.folder / "results").glob("*.json")):
            result = read_json(file)
            found = {"the number of training sequences": result["all_results"]["train_samples"]}
            for text, value in (found | result.get("texts", {})).items():
                other, expected = first.setdefault(text, (file.stem, value))
                if value != expected:
                    raise ValueError(
                        f"The texts are no longer the same: for {text}, {other} has {expected}, but {file.stem} has "
                        f"{value}. Choose another --output_dir and make all runs again."
                    )

    def _check_time(self, what):
        if self.until is not None and time.time() >= self.until:
            raise TimeIsUp(f"The time is up: {what} and what follows are left. The same command goes on.")

    def _is_whole(self, run):
        file = self.result_file(run)
        return file.exists() and not changes_to_measure(read_json(file), self.changes_after_training(run))

    def _make(self, run, devices):
        self._check_time(run.name)
        file = self._work_file(run)
        write_json(file, self.work(run))
        device = devices.get()
        try:
            with open(file.with_suffix(".log"), "a") as log:
                command, environment = module_command(self.single_run, str(file)), self._environment(device)
                status = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
        finally:
            devices.put(device)
        if status:
            raise RuntimeError(f"{run.name} failed with exit code {status}: see {file.with_suffix('.log')}.")
        self._remove_checkpoints(run)

    def _remove_checkpoints(self, run):
        """Removes the checkpoints of a finished run. The trained model is kept."""
        for checkpoint in (self.folder / "models" / run.name).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    def _environment(self, device):
        """The environment of a run, which gets one accelerator or its share of the cores to itself."""
        environment = module_environment() | {"TOKENIZERS_PARALLELISM": "false"}
        if torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
            names = visible.split(",")
            environment["CUDA_VISIBLE_DEVICES"] = names[device % len(names)]
        else:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.processes))
        return environment

    def work(self, run: Run) -> dict[str, Any]:
        """The content of the file with which the process that makes a run is called."""
        costs = costs_of(run, self.plan)
        description = {
            **asdict(run),
            **self.beside_arguments(run),
            "fields": changed_fields(run, self.plan),
            "flops_per_token": costs.flops,
            "training_flops": training_flops(run, self.plan),
            "parameters": costs.parameters,
            "active_parameters": costs.active_parameters,
        }
        return {
            "run": description,
            "run_clm": self.arguments(run),
            "result_file": str(self.result_file(run)),
            "held_out": str(self.folder / "held_out"),
            "after_training": self.changes_after_training(run),
        }

    def arguments(self, run: Run) -> dict[str, Any]:
        """The arguments of run_clm.py for a run."""
        fields = changed_fields(run, self.plan)
        return {
            "config_name": base_configuration(run, self.plan),
            "config_overrides": json.dumps(fields),
            "tokenizer_name": str(self.folder / "tokenizer"),
            "train_file": str(self.folder / "text" / "train.parquet"),
            "validation_file": str(self.folder / "text" / "validation.parquet"),
            "do_train": True,
            "do_eval": True,
            "output_dir": str(self.folder / "models" / run.name),
            "block_size": self.plan.block_size,
            "per_device_train_batch_size": self.plan.batch_size,
            "per_device_eval_batch_size": EVAL_BATCH_SIZE,
            "max_eval_samples": self.plan.eval_sequences,
            "max_steps": run.steps,
            "learning_rate": run.learning_rate,
            "row_adamw": trains_by_rows(run, self.plan),
            "seed": run.seed,
            "logging_steps": max(1, run.steps // LOGS),
            "save_steps": max(1, run.steps // CHECKPOINTS),
            "save_total_limit": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
            **training_arguments(run, self.plan),
        }
