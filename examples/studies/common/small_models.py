# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Training and evaluating a small model of a study within a process, without `Trainer`."""

import time
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from modeling_peer import RowAdamW, expert_parameter_groups
from modeling_peer.analysis.evaluation import evaluation
from modeling_peer.experts import expert_tables


# A function that trains a model on a batch of tokens.
Step: TypeAlias = Callable[[torch.Tensor], None]


def groups_with_rates(model: nn.Module, learning_rate: float, up: float, down: float) -> list[dict[str, Any]]:
    """
    Parameter groups without weight decay. Of a model with tables, u_i has `up` times the learning rate, and v_i or the
    values of a memory have `down` times it. Of other models, the feed-forwards have `up` times it.
    """
    if expert_tables(model):
        return expert_parameter_groups(model, learning_rate, 0.0, up, down / up)
    groups = expert_parameter_groups(model, learning_rate)
    own = {id(parameter): parameter for name, parameter in model.named_parameters() if ".mlp." in name}
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
    return [*groups, {**groups[0], "params": [*own.values()], "lr": learning_rate * up}]


def make_step(model: nn.Module, groups: list[dict[str, Any]], steps: int, warmup: float) -> Step:
    """A function that trains a model on a batch: a warmup for a share of the steps, then a cosine, and clipping to 1."""
    optimizer = RowAdamW(groups, betas=(0.9, 0.99))
    schedule = get_cosine_schedule_with_warmup(optimizer, round(warmup * steps), steps)
    model.train()

    def step(batch: torch.Tensor) -> None:
        model(batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return step


def token_losses(model: nn.Module, sequences: torch.Tensor, batch_size: int = 16) -> torch.Tensor:
    """The loss of each token but the first of each sequence, in nats."""
    found = []
    with evaluation(model):
        for tokens in sequences.split(batch_size):
            logits = model(tokens).logits[:, :-1].transpose(1, 2)
            found.append(F.cross_entropy(logits.float(), tokens[:, 1:], reduction="none"))
    return torch.cat(found)


def median_seconds(steps: dict[str, Step], batches: Iterable[torch.Tensor], warm_ups: int = 20) -> dict[str, float]:
    """Median seconds of steps of several models, measured in turn with one thread, after some steps to warm up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number, batch in enumerate(batches):
        for name, step in steps.items():
            start = time.perf_counter()
            step(batch)
            if number >= warm_ups:
                seconds[name].append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return {name: float(np.median(each)) for name, each in seconds.items()}
