# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""How fast each variant reads what it has stored: tokens a second in decoding, one sequence at a time."""

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from studies.capacity.facts import KEY_TOKENS, LENGTH, make_facts
from studies.capacity.plan import Run
from studies.capacity.variants import VARIANTS, make_model


ROUNDS, ANSWERS = 9, 16


def seconds_per_token(model, keys: torch.Tensor) -> float:
    """Seconds to generate a token of a value, the mean over the answers to several keys."""
    start = time.perf_counter()
    for key in keys:
        model.generate(key[None], max_new_tokens=LENGTH - KEY_TOKENS, do_sample=False)
    return (time.perf_counter() - start) / len(keys) / (LENGTH - KEY_TOKENS)


def read(run: Run, folder: Path) -> dict[str, Any]:
    """Tokens a second of all variants, in turn, with one thread: the median over rounds after a first one."""
    keys = make_facts(ANSWERS, 8, run.seed)[0].tokens[:, :KEY_TOKENS]
    models = {name: make_model(name, run.seed).eval() for name in VARIANTS}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(1 + ROUNDS):
        for name, model in models.items():
            times[name].append(seconds_per_token(model, keys))
    return {"tokens_per_second": {name: 1 / median(each[1:]) for name, each in times.items()}}
