# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The time of each variant: that of a training step, and of a token in decoding, one sequence at a time."""

import time
from collections.abc import Callable
from statistics import median

import torch

from modeling_peer import PeerForCausalLM, RowAdamW, expert_parameter_groups
from studies.capacity.facts import KEY_TOKENS, LENGTH, make_facts
from studies.capacity.variants import VARIANTS, make_model


ROUNDS, BATCH_SIZE, ANSWERS = 9, 256, 16


def training_step(model: PeerForCausalLM, facts: torch.Tensor) -> Callable[[], None]:
    """A step of training of a model."""
    optimizer = RowAdamW(expert_parameter_groups(model, learning_rate=1e-3))

    def step() -> None:
        model.train()
        model(facts, labels=facts).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def answers(model: PeerForCausalLM, facts: torch.Tensor) -> Callable[[], None]:
    """Greedy decoding of the values of several keys."""

    def decode() -> None:
        model.eval()
        for fact in facts[:ANSWERS]:
            model.generate(fact[None, :KEY_TOKENS], max_new_tokens=LENGTH - KEY_TOKENS, do_sample=False)

    return decode


def measure_times() -> dict[str, dict[str, float]]:
    """
    Seconds of a training step and tokens a second in decoding, of all variants in turn and with one thread: medians over
    rounds after a first one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    facts = make_facts(BATCH_SIZE, 8, seed=0)[0].tokens
    models = {name: make_model(name, seed=0) for name in VARIANTS}
    work = {(name, make): make(model, facts) for name, model in models.items() for make in (training_step, answers)}
    times: dict[tuple, list[float]] = {key: [] for key in work}
    for _ in range(1 + ROUNDS):
        for key, call in work.items():
            start = time.perf_counter()
            call()
            times[key].append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    seconds = {key: median(each[1:]) for key, each in times.items()}
    return {
        "seconds_per_step": {name: seconds[name, training_step] for name in models},
        "tokens_per_second": {name: ANSWERS * (LENGTH - KEY_TOKENS) / seconds[name, answers] for name in models},
    }
