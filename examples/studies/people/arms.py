# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The arms: which model is trained, with which rates and initializations, by run_clm.py, and for how long."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.subprocesses import EXAMPLES, module_environment


@dataclass(frozen=True)
class Arm:
    """
    A model and the learning rates of its trials.

    Args:
        configuration (`str`): Its named configuration.
        rates (`tuple[float]`): Learning rates to try.
        overrides (`dict`): Fields in which it differs from the configuration.
    """

    configuration: str
    rates: tuple[float, ...]
    overrides: dict[str, Any]


# A memory has as many parameters as the experts with twice as many values, and reads as many with twice k.
MEMORY = {"feed_forward_types": ["pkm"] * 8, "num_experts": 362**2, "num_experts_per_head": 64}
# Standard deviations of weights at the beginning: that of the named configurations, and the root of 1 / hidden_size.
USUAL, LARGER = 0.02, 0.0625
ARMS = {
    "dense": Arm("dense-laptop", (5e-4, 1e-3, 2e-3), {}),
    "peer": Arm("peer-laptop", (5e-4, 1e-3, 2e-3), {}),
    "pkm": Arm("peer-laptop", (5e-4, 1e-3, 2e-3), MEMORY),
}
TOKENS_PER_STEP = 2048


@dataclass(frozen=True)
class Run:
    """A training of an arm. A trial of a rate is short, and saves no checkpoints, which would take a part of its time."""

    arm: str
    steps: int
    learning_rate: float
    initializer_range: float = USUAL
    seed: int = 0
    is_trial: bool = False

    @property
    def name(self) -> str:
        """The name of its folder."""
        numbers = f"{self.arm}-{self.steps}-{self.learning_rate:g}-{self.initializer_range:g}-{self.seed}"
        return f"trial-{numbers}" if self.is_trial else numbers


def train(run: Run, folder: Path, block: int) -> Path:
    """Trains a model by run_clm.py, which resumes where it was killed. Returns its folder."""
    arm, output = ARMS[run.arm], folder / "models" / run.name
    if (output / "all_results.json").exists():
        return output
    arguments = {
        "config_name": arm.configuration,
        "config_overrides": json.dumps({**arm.overrides, "initializer_range": run.initializer_range}),
        "tokenizer_name": folder / "tokenizer",
        "train_file": folder / "train.parquet",
        "output_dir": output,
        "block_size": block,
        "per_device_train_batch_size": TOKENS_PER_STEP // block,
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
    command = [sys.executable, str(EXAMPLES / "run_clm.py"), "--do_train", *flags]
    subprocess.run(command, env=module_environment(), check=True)
    return output


def next_trial(arm: str, steps: int, losses: dict[Run, float]) -> Run | None:
    """
    The next trial of an arm by the losses of those that were made: its rates, then the larger initialization at the best
    of them, then one rate beyond, if the best is the lowest or the highest. `None` if there are all.
    """
    rates = ARMS[arm].rates
    runs = [Run(arm, steps, rate, is_trial=True) for rate in rates]
    for run in runs:
        if run not in losses:
            return run
    larger = replace(min(runs, key=losses.get), initializer_range=LARGER)
    if larger not in losses:
        return larger
    best = min([*runs, larger], key=losses.get)
    factor = {min(rates): 0.5, max(rates): 2}.get(best.learning_rate, 1)
    beyond = replace(best, learning_rate=factor * best.learning_rate)
    return None if beyond in losses else beyond
