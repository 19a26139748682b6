# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Training a model on text, and measuring how well it predicts text and copies from its context."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from studies.common.small_models import Step, groups_with_rates, make_step, median_seconds, token_losses
from studies.onset.models import PLACEMENTS, make_model
from studies.onset.plan import SMALL, Run
from studies.onset.texts import ASKED, BLOCK, copying_questions, probe


SEQUENCES, PROBED_EVERY, WARMUP = 16, 50, 0.1  # sequences a step, steps between probes, share of the steps


def nats_copied(model: nn.Module) -> float:
    """Nats per token by which a model predicts the second half of random sequences better than the equal first half."""
    losses = token_losses(model, probe())
    return (losses[:, : BLOCK // 2 - 1].mean() - losses[:, BLOCK // 2 :].mean()).item()


def batches_of(folder: Path, run: Run) -> torch.Tensor:
    """The sequences of all steps, `[steps, SEQUENCES, BLOCK]`: passes over the text, each in an order of its own."""
    blocks, generator = np.load(folder / "train.npy"), np.random.default_rng(run.seed)
    number = run.steps * SEQUENCES
    orders = [generator.permutation(len(blocks)) for _ in range(-(-number // len(blocks)))]
    return torch.from_numpy(blocks[np.concatenate(orders)[:number]].astype(np.int64)).view(-1, SEQUENCES, BLOCK)


def step_of(model: nn.Module, run: Run) -> Step:
    """The training step of a run."""
    groups = groups_with_rates(model, run.learning_rate, run.up, run.down)
    return make_step(model, groups, run.steps, WARMUP)


def make(run: Run, folder: Path) -> dict[str, Any]:
    """
    Train a model. Returns its losses of held-out text and of passages that a sequence repeats, how much better it
    predicts these than without the first passage (`copied`), and the probe in the course of training.
    """
    model = make_model(run.placement, run.initializer_range, run.attention, run.seed)
    step, probes, start = step_of(model, run), [], time.perf_counter()
    for number, batch in enumerate(batches_of(folder, run), 1):
        step(batch)
        if number % PROBED_EVERY == 0 or number == run.steps:
            probes.append([number, round(nats_copied(model), 4)])
    seconds = time.perf_counter() - start
    held_out = torch.from_numpy(np.load(folder / "held_out.npy").astype(np.int64))
    by_text = [token_losses(model, text).mean().item() for text in held_out]
    repeated, alone = (token_losses(model, each)[:, -ASKED:].mean().item() for each in copying_questions(held_out))
    return {
        "text": sum(by_text) / len(by_text),
        "by_text": by_text,
        "repeated": repeated,
        "copied": alone - repeated,
        "probes": probes,
        "seconds": seconds,
        "parameters": model.num_parameters(),
    }


def measure_times(folder: Path, steps: int = 60) -> dict[str, float]:
    """Median seconds of a training step of each placement."""
    runs = [Run(name, up=0.25, down=12.0) if name != "dense" else Run(name) for name in PLACEMENTS]
    own = {run.placement: step_of(make_model(run.placement, SMALL, SMALL, 0), run) for run in runs}
    return median_seconds(own, batches_of(folder, runs[0])[:steps])
