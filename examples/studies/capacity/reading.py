# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The time of each variant: that of a training step, and of a token in decoding, one sequence at a time."""

import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from statistics import median

import torch
from transformers import DynamicCache

from modeling_peer import PeerForCausalLM
from studies.capacity.facts import KEY_TOKENS, VALUE_TOKENS, make_facts
from studies.capacity.plan import LEARNED, Run
from studies.capacity.training import optimizer_of, training_arguments
from studies.capacity.variants import make_model


# Tokens of a new model share hardly any experts, so that its first steps are slower.
WARM_UPS, ROUNDS, ANSWERS = 200, 50, 16


def training_step(model: PeerForCausalLM, facts: torch.Tensor, folder: Path, batch_size: int) -> Callable[[], None]:
    """Make a function that trains a model for one step, as [`store`] does, with other facts in each call."""
    run = Run("facts", "", LEARNED, learning_rate=1e-3, batch_size=batch_size)
    arguments = training_arguments(run, folder)
    optimizer, batches = optimizer_of(model, arguments, run), cycle(facts.split(run.batch_size))

    def step() -> None:
        model.train()
        batch = next(batches)
        labels = batch.clone()
        labels[:, :KEY_TOKENS] = -100
        model(batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def seconds_of_values(model: PeerForCausalLM, facts: torch.Tensor) -> float:
    """Seconds that a model takes to read the tokens of values one at a time, with their keys in the cache."""
    model.eval()
    seconds = 0.0
    for fact in facts:
        cache = DynamicCache(config=model.config)
        model(fact[None, :KEY_TOKENS], past_key_values=cache, output_router_logits=False)
        start = time.perf_counter()
        for token in fact[KEY_TOKENS:]:
            model(token[None, None], past_key_values=cache, output_router_logits=False)
        seconds += time.perf_counter() - start
    return seconds


def measure_times(folder: Path, batch_sizes: dict[str, int]) -> dict[str, dict[str, float]]:
    """
    Measure the seconds of training for each fact and the tokens per second in decoding, as medians over rounds. The
    variants, with their batches, are measured in turn, with one thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    facts = make_facts(2**13, LEARNED.token_bits, seed=0)[0].tokens
    models = {name: make_model(name, seed=0) for name in batch_sizes}
    steps = {name: training_step(model, facts, folder, batch_sizes[name]) for name, model in models.items()}
    for step in steps.values():
        for _ in range(WARM_UPS):
            step()
    training: dict[str, list[float]] = {name: [] for name in models}
    reading: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(ROUNDS):
        for name, model in models.items():
            start = time.perf_counter()
            steps[name]()
            training[name].append(time.perf_counter() - start)
            asked = facts[turn * ANSWERS % len(facts) :][:ANSWERS]
            reading[name].append(seconds_of_values(model, asked))
    torch.set_num_threads(threads)
    return {
        "seconds_per_fact": {name: median(each) / batch_sizes[name] for name, each in training.items()},
        "tokens_per_second": {name: ANSWERS * VALUE_TOKENS / median(each) for name, each in reading.items()},
    }
