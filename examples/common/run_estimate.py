# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""How long a training will take and how much memory it needs, told after a few steps of it."""

import logging
import sys
import time
from datetime import datetime, timedelta

import torch
from transformers import TrainerCallback


logger = logging.getLogger(__name__)

STEPS = 10


class RunEstimateCallback(TrainerCallback):
    """
    Logs, ten steps after the first, what these took, when the training will end at this speed, and the most memory
    that it has used. The first step is not counted: it compiles kernels and makes the state of the optimizer.
    """

    def __init__(self):
        self._first_step, self._start = 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._first_step = state.global_step + 1
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self._first_step:
            self._start = time.perf_counter()
        elif state.global_step == self._first_step + STEPS and state.is_world_process_zero:
            seconds = (time.perf_counter() - self._start) / STEPS
            logger.info(estimate(seconds, state.max_steps - state.global_step, peak_memory()))


def estimate(seconds_per_step: float, remaining_steps: int, memory: dict[str, int]) -> str:
    """A sentence about a training. `memory` has bytes by the name of what they are in."""
    remaining = timedelta(seconds=round(seconds_per_step * remaining_steps))
    end = datetime.now() + remaining
    used = ", ".join(f"{number / 1e9:.1f} GB of {name}" for name, number in memory.items())
    return (
        f"{seconds_per_step:.2g} seconds per step: the remaining {remaining_steps:,} steps take {remaining} without "
        f"evaluations and saves, until {end:%Y-%m-%d %H:%M}. " + (f"At most {used} were in use." if used else "")
    ).rstrip()


def peak_memory() -> dict[str, int]:
    """The most bytes that this process has used: of the machine, where the system tells it, and of its GPU."""
    used = {}
    if sys.platform != "win32":
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        used["memory"] = peak if sys.platform == "darwin" else peak * 1024
    if torch.cuda.is_available():
        used["GPU memory"] = torch.cuda.max_memory_allocated()
    return used
