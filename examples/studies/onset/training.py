# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Training a model on text, and measuring how well it predicts text and copies from its context."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from modeling_peer import RowAdamW, expert_parameter_groups
from modeling_peer.analysis.evaluation import evaluation
from studies.onset.models import PLACEMENTS, make_model
from studies.onset.plan import SMALL, Run
from studies.onset.texts import ASKED, BLOCK, copying_questions, probe


SEQUENCES, PROBED_EVERY, WARMUP = 16, 50, 0.1  # sequences a step, steps between probes, share of the steps


def token_losses(model: nn.Module, sequences: torch.Tensor) -> torch.Tensor:
    """The loss of each token but the first of each sequence, in nats."""
    found = []
    with evaluation(model):
        for tokens in sequences.split(SEQUENCES):
            logits = model(tokens).logits[:, :-1].transpose(1, 2)
            found.append(F.cross_entropy(logits.float(), tokens[:, 1:], reduction="none"))
    return torch.cat(found)


def nats_copied(model: nn.Module) -> float:
    """Nats per token by which a model predicts the second half of random sequences better than the equal first half."""
    losses = token_losses(model, probe())
    return (losses[:, : BLOCK // 2 - 1].mean() - losses[:, BLOCK // 2 :].mean()).item()


def batches_of(folder: Path, run: Run, sequences: int) -> torch.Tensor:
    """The sequences of all steps, `[steps, sequences, BLOCK]`: passes over the text, each in an order of its own."""
    blocks, generator = np.load(folder / "train.npy"), np.random.default_rng(run.seed)
    number = run.steps * sequences
    orders = [generator.permutation(len(blocks)) for _ in range(-(-number // len(blocks)))]
    return torch.from_numpy(blocks[np.concatenate(orders)[:number]].astype(np.int64)).view(-1, sequences, BLOCK)


def make_step(model: nn.Module, run: Run, steps: int):
    """A function that trains a model on a batch."""
    groups = expert_parameter_groups(model, run.learning_rate, 0.0, run.up, run.down / run.up)
    optimizer = RowAdamW(groups, betas=(0.9, 0.99))
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    model.train()

    def step(batch: torch.Tensor) -> None:
        model(batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return step


def make(run: Run, folder: Path) -> dict[str, Any]:
    """
    Train a model. Returns its losses of held-out text and of passages that a sequence repeats, how much better it
    predicts these than without the first passage (`copied`), and the probe in the course of training.
    """
    model = make_model(run.placement, run.initializer_range, run.attention, run.seed)
    step, probes, start = make_step(model, run, run.steps), [], time.perf_counter()
    for number, batch in enumerate(batches_of(folder, run, SEQUENCES), 1):
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


def measure_times(folder: Path, rounds: int = 30, warm_ups: int = 20) -> dict[str, dict[str, float]]:
    """
    Median seconds of a training step of each placement, measured in turn with one thread, by the tokens of a step:
    half of those of the study, as many, and twice as many.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for sequences in (SEQUENCES // 2, SEQUENCES, 2 * SEQUENCES):
        batches = batches_of(folder, Run("dense"), sequences)[: warm_ups + rounds]
        steps = {name: make_step(make_model(name, SMALL, SMALL, 0), Run(name), len(batches)) for name in PLACEMENTS}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for batch in batches:
            for name, step in steps.items():
                start = time.perf_counter()
                step(batch)
                seconds[name].append(time.perf_counter() - start)
        found[str(sequences * BLOCK)] = {name: float(np.median(each[warm_ups:])) for name, each in seconds.items()}
    torch.set_num_threads(threads)
    return found
