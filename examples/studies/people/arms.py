# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The trainings by run_clm.py: models, learning rates, initializations and numbers of steps."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from common.subprocesses import EXAMPLES, module_environment
from studies.common.parallel_runs import Results
from studies.people.texts import BLOCK


TOKENS_PER_STEP = 2 * BLOCK
# With twice as many values and twice the k, a memory has and reads as many parameters as the experts.
MEMORY = {"feed_forward_types": ["pkm"] * 8, "num_experts": 362**2, "num_experts_per_head": 64}
# Named configurations, and fields in which a model differs from them.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "peer": ("peer-laptop", {}),
    "dense": ("dense-laptop", {}),
    "pkm": ("peer-laptop", MEMORY),
}


@dataclass(frozen=True)
class Run:
    """A training of an arm, whose weights begin with a standard deviation of `initializer_range`."""

    arm: str
    steps: int
    learning_rate: float
    initializer_range: float
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of its results and its folder."""
        return f"{self.arm}-{self.steps}-{self.learning_rate:g}-{self.initializer_range:g}-{self.seed}"


# Rates and initializer ranges come from trials. Steps take 110 minutes on a core beside another run, see README.md.
TRAININGS = (
    Run("peer", 4347, 1e-3, 0.02),
    Run("dense", 6012, 1e-3, 0.0625),
    Run("pkm", 4049, 5e-4, 0.02),
    Run("peer", 4347, 1e-3, 0.02, seed=1),
)


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
    configuration, overrides = ARMS[run.arm]
    arguments = {
        "config_name": configuration,
        "config_overrides": json.dumps({**overrides, "initializer_range": run.initializer_range}),
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
        "validation_split_percentage": 0,
        "report_to": "none",
        "use_cpu": True,
    }
    flags = [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
    return [sys.executable, str(EXAMPLES / "run_clm.py"), "--do_train", *flags]


def next_runs(results: Results) -> list[Run]:
    """The trainings that are missing."""
    return [run for run in TRAININGS if run.name not in results]
