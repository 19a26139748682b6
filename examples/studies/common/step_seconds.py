# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Measures the seconds of training steps of a study's models. It runs in a process of its own which, like the process of
a run, keeps the memory that it frees.

    python -m studies.common.step_seconds MODELS.json

The study writes the file.
"""

import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from datasets import load_from_disk
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from common.machine import machine
from modeling_peer import RowAdamW, expert_parameter_groups
from studies.common.study_folder import read_json, write_json
from studies.common.training_plan import Run, TrainingPlan, configuration_of, training_arguments, trains_by_rows


# New models spread tokens over experts at random; models that were trained for some steps reuse the same experts more.
WARM_UPS, REPETITIONS = 200, 100


def step_seconds(runs: list[Run], plan: TrainingPlan, text: torch.Tensor) -> dict[str, list[float]]:
    """
    Measures the seconds of training steps of several models in turns, on all cores or on one accelerator. A step
    consists of forward, backward and the optimizer that the study uses for the model.

    Args:
        runs (`list[Run]`): Runs of different variants.
        plan (`TrainingPlan`): Plan of the study.
        text (`torch.Tensor` of shape `(num_sequences, block_size)`): Text to train on. Real text reuses experts.

    Returns:
        `dict[str, list[float]]`: seconds of all repetitions after `WARM_UPS` steps, by variant.
    """
    steps = {run.variant: _training_step(run, plan, text) for run in runs}
    seconds: dict[str, list[float]] = {variant: [] for variant in steps}
    for _ in tqdm(range(WARM_UPS + REPETITIONS), desc=f"Steps at hidden_size {runs[0].hidden_size}"):
        for variant, step in steps.items():
            seconds[variant].append(_time(step))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {variant: times[WARM_UPS:] for variant, times in seconds.items()}


def _training_step(run: Run, plan: TrainingPlan, text: torch.Tensor) -> Callable[[], None]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = configuration_of(run, plan)
    model = AutoModelForCausalLM.from_config(config).to(device).train()
    optimizer: torch.optim.Optimizer
    if trains_by_rows(run, plan):
        own = training_arguments(run, plan)
        multipliers = {name: own[name] for name in ("expert_lr_multiplier", "down_proj_lr_multiplier") if name in own}
        optimizer = RowAdamW(expert_parameter_groups(model, run.learning_rate, 0.0, **multipliers))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, weight_decay=0.0, fused=True)
    batches = cycle(text.to(device).split(plan.batch_size))

    def step():
        batch = next(batches)
        with torch.autocast(device, torch.bfloat16, enabled=plan.training.get("bf16", False)):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _time(step):
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    work = read_json(Path(sys.argv[1]))
    text = torch.tensor(load_from_disk(work["text"])["input_ids"])
    seconds = step_seconds([Run(**run) for run in work["runs"]], TrainingPlan(**work["plan"]), text)
    write_json(Path(work["result_file"]), {"fields": work["fields"], "machine": machine(), "seconds": seconds})


if __name__ == "__main__":
    main()
