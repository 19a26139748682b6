# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The arms: which model is trained, with which rates and initializations, by run_clm.py, and for how long."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from filelock import FileLock

from common.subprocesses import EXAMPLES, module_environment
from studies.common.parallel_runs import Results
from studies.common.training_plan import CORPUS
from studies.people.texts import BLOCK


@dataclass(frozen=True)
class Arm:
    """
    A model and how it is trained.

    Args:
        configuration (`str`): Its named configuration.
        rates (`tuple[float]`):
            The best rate of earlier trials, see README.md, and others that are tried with the first initialization.
        overrides (`dict`): Fields in which it differs from the configuration.
    """

    configuration: str
    rates: tuple[float, ...]
    overrides: dict[str, Any]


# A memory has as many parameters as the experts with twice as many values, and reads as many with twice k.
MEMORY = {"feed_forward_types": ["pkm"] * 8, "num_experts": 362**2, "num_experts_per_head": 64}
ARMS = {
    "peer": Arm("peer-laptop", (1e-3,), {}),
    "dense": Arm("dense-laptop", (1e-3,), {}),
    "pkm": Arm("peer-laptop", (5e-4,), MEMORY),
}
# Standard deviations of weights at the beginning: that of the named configurations, and the root of 1 / hidden_size.
INITIALIZER_RANGES = (0.02, 0.0625)
TRIAL_STEPS = 400
SECONDS = 6600  # of each training
TOKENS_PER_STEP = 2 * BLOCK
# Arms and seeds that are trained, side by side. Of the memory there are trials alone, see README.md.
TRAININGS = (("peer", 0), ("dense", 0))


@dataclass(frozen=True)
class Run:
    """A training of an arm. A trial is short, and saves no checkpoints, which would take a part of its time."""

    arm: str
    steps: int
    learning_rate: float
    initializer_range: float
    seed: int = 0
    is_trial: bool = False

    @property
    def name(self) -> str:
        """The name of its results and its folder."""
        numbers = f"{self.arm}-{self.steps}-{self.learning_rate:g}-{self.initializer_range:g}-{self.seed}"
        return f"trial-{numbers}" if self.is_trial else numbers


def train(run: Run, folder: Path) -> Path:
    """Trains a model by run_clm.py, which resumes where it was killed. Returns its folder."""
    output = folder / "models" / run.name
    output.parent.mkdir(exist_ok=True)
    # A run may outlive a study that was killed.
    with FileLock(output.parent / f"{run.name}.lock"):
        if not (output / "all_results.json").exists():
            subprocess.run(_command(run, folder, output), env=module_environment(), check=True)
    return output


def _command(run, folder, output):
    arm = ARMS[run.arm]
    arguments = {
        "config_name": arm.configuration,
        "config_overrides": json.dumps({**arm.overrides, "initializer_range": run.initializer_range}),
        "tokenizer_name": folder / "tokenizer",
        "train_file": folder / "train.parquet",
        "output_dir": output,
        "block_size": BLOCK,
        "per_device_train_batch_size": TOKENS_PER_STEP // BLOCK,
        "max_steps": run.steps,
        "learning_rate": run.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "seed": run.seed,
        "save_total_limit": 1,
        "save_strategy": "no" if run.is_trial else "steps",
        "validation_split_percentage": 0,
        "report_to": "none",
    }
    flags = [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
    return [sys.executable, str(EXAMPLES / "run_clm.py"), "--do_train", *flags]


def loss_of(result: dict[str, Any]) -> float:
    """Nats per token of the held-out text of the training's sources, by which runs are chosen. Infinite if not a number."""
    loss = result["losses"][CORPUS]["all"]
    return math.inf if math.isnan(loss) else loss


def trials_of(arm: str) -> list[Run]:
    """The trials of an arm: each initialization at its best rate, and then other rates."""
    first, *others = ARMS[arm].rates
    tried = [(first, weights) for weights in INITIALIZER_RANGES] + [(rate, INITIALIZER_RANGES[0]) for rate in others]
    return [Run(arm, TRIAL_STEPS, rate, weights, is_trial=True) for rate, weights in tried]


def next_runs(results: Results) -> list[Run]:
    """The runs that are missing, as far as they follow from those that there are: trials, and then trainings."""
    trials = {arm: trials_of(arm) for arm in ARMS}
    needed = [run for runs in zip_longest(*trials.values()) for run in runs if run is not None]
    for arm, seed in TRAININGS:
        if any(run.name not in results for run in trials[arm]):
            continue
        best = min(trials[arm], key=lambda run: loss_of(results[run.name]))
        # Of the trial that was disturbed least by what else the machine did, of the two that all arms have.
        seconds = min(results[run.name]["training"]["train_runtime"] for run in trials[arm][:2]) / TRIAL_STEPS
        run = replace(best, steps=round(SECONDS / seconds), seed=seed, is_trial=False)
        needed.append(run)
        # What does not end below the loss of its trial has failed, and is made again with half the rate.
        if run.name in results and not loss_of(results[run.name]) < loss_of(results[best.name]):
            needed.append(replace(run, learning_rate=run.learning_rate / 2))
    return [run for run in needed if run.name not in results]
