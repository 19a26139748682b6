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
"""How long a training step takes of each model of the scaling study, measured side by side."""

import time
from collections.abc import Callable
from itertools import cycle
from statistics import median

import torch
from scaling_plan import Plan, Run, configuration_of
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from modeling_peer import RowAdamW, expert_parameter_groups


REPETITIONS = 15


def step_seconds(runs: list[Run], plan: Plan, text: torch.Tensor) -> dict[str, list[float]]:
    """
    Seconds of training steps of each model, in turns: forward, backward, and the optimizer that trains it in the study.

    Args:
        runs (`list[Run]`): Models of one size, so that they fit the memory together.
        plan (`Plan`)
        text (`torch.Tensor` of shape `(num_sequences, block_size)`): What to train on: real text repeats experts.

    Returns:
        `dict[str, list[float]]`: of each run's name all repetitions but the first two, which warm up.
    """
    steps = {run.name: _training_step(run, plan, text) for run in runs}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(REPETITIONS + 2), desc=f"Steps at hidden_size {runs[0].hidden_size}"):
        for name, step in steps.items():
            seconds[name].append(_time(step))
    return {name: times[2:] for name, times in seconds.items()}


def median_seconds(seconds: dict[str, list[float]], run: Run) -> float:
    """The median step of a run's model, however long and with whichever seed and rate it is trained."""
    (times,) = (times for name, times in seconds.items() if name.split("-steps=")[0] == run.name.split("-steps=")[0])
    return median(times)


def _training_step(run: Run, plan: Plan, text: torch.Tensor) -> Callable[[], None]:
    config = configuration_of(run, plan)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_config(config).to(device).train()
    if config.sparse_expert_gradients:
        optimizer: torch.optim.Optimizer = RowAdamW(
            expert_parameter_groups(model, run.learning_rate), weight_decay=0.0
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, weight_decay=0.0, fused=True)
    batches = cycle(text.to(device).split(plan.batch_size))

    def step():
        tokens = next(batches)
        model(input_ids=tokens, labels=tokens).loss.backward()
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
