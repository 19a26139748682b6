# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
A PEER model and its dense twin, trained for equal seconds on the source code of Python's standard library. The losses
on held-out files are kept against seconds; evaluations do not count.
"""

import functools
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.library_sources import byte_level_tokenizer, library_files, read_source
from gpu.device import WARM_UP, Device
from gpu.rows import Row, SkippedError
from gpu.settings import Settings
from modeling_peer import PeerConfig, PeerForCausalLM, RowAdamW, expert_parameter_groups
from modeling_peer.optim.parameter_groups import RATES


MODELS = ("peer", "dense")

# Evaluations, beside one at the start; blocks of held-out text that they read, and of one forward.
EVALUATIONS = 16
HELD_OUT_BLOCKS = 128
HELD_OUT_AT_ONCE = 32

# What of the time the rate rises for, and steps between two looks at the clock, for each of which the host waits.
WARM_UP_SHARE = 0.05
STEPS_AT_ONCE = 4


def rows(settings: Settings, device: Device) -> dict[str, Row]:
    """A measurement for each model."""
    return {name: functools.partial(train, settings, device, name) for name in MODELS}


def model_config(settings: Settings, name: str) -> PeerConfig:
    """The configuration of one of the twins, whose other sizes are equal."""
    types = ["dense"] * settings.training_model["num_hidden_layers"]
    if name == "peer":
        for place in settings.peer_layers:
            types[place] = "peer"
    fields = {**settings.training_model, "feed_forward_types": types, "expert_kernels": settings.kernels}
    return PeerConfig(**fields)


def load_blocks(settings: Settings) -> dict[str, torch.Tensor]:
    """Blocks of tokens by split, `(num_blocks, length)`. They are made once and kept in the output folder."""
    file = Path(settings.output_dir, "blocks.pt")
    if file.is_file():
        return torch.load(file)
    try:
        root, names = library_files()
    except FileNotFoundError:
        raise SkippedError("This Python has its standard library without sources.") from None
    texts = {split: list(_first_texts(root, some, settings.text_characters)) for split, some in names.items()}
    length = settings.training_model["max_position_embeddings"]
    tokenizer = byte_level_tokenizer(texts["train"], settings.training_model["vocab_size"], length)
    blocks = {}
    for split, some in texts.items():
        tokens = [
            token for each in tokenizer(some, verbose=False).input_ids for token in [*each, tokenizer.eos_token_id]
        ]
        blocks[split] = torch.tensor(tokens[: len(tokens) // length * length], dtype=torch.int16).view(-1, length)
    temporary = file.with_suffix(".tmp")
    torch.save(blocks, temporary)
    temporary.replace(file)
    return blocks


def _first_texts(root, names, characters):
    """Whole files until there are enough characters."""
    for name in names:
        if characters <= 0:
            return
        text = read_source(root / name)
        characters -= len(text)
        yield text


def make_optimizer(model: nn.Module, lr: float) -> RowAdamW:
    """With the rates of the scaling study. A model without expert tables gets torch's AdamW by it."""
    groups = expert_parameter_groups(model, lr, 0.1, *RATES["text"])
    return RowAdamW(groups, betas=(0.9, 0.95))


def share_of_rate(done: float) -> float:
    """A short warm-up and a cosine, by the share of the time that is over."""
    return min(done / WARM_UP_SHARE, 1.0) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


class Run:
    """The training of one model against the clock."""

    def __init__(self, settings: Settings, device: Device, name: str):
        self.settings, self.device = settings, device
        blocks = load_blocks(settings)
        self.train_blocks = blocks["train"].to(settings.device)
        self.held_out = blocks["validation"][:HELD_OUT_BLOCKS].long().to(settings.device)
        self.model = PeerForCausalLM(model_config(settings, name)).to(settings.device)
        self.optimizer = make_optimizer(self.model, settings.learning_rate)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.steps, self.seconds, self.losses = 0, 0.0, []

    def _loss(self, tokens):
        with torch.autocast(self.device.name, torch.bfloat16, enabled=self.device.is_gpu):
            return self.model(input_ids=tokens, labels=tokens).loss

    def step(self) -> None:
        """A step at the rate of this moment."""
        share = share_of_rate(self.seconds / self.settings.training_seconds)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        places = torch.randint(len(self.train_blocks), (self.settings.batch_size,), device=self.settings.device)
        self.optimizer.zero_grad()
        self._loss(self.train_blocks[places].long()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.steps += 1

    @torch.no_grad()
    def evaluate(self) -> None:
        """The loss on held-out text, in nats per token."""
        self.model.eval()
        batches = self.held_out.split(HELD_OUT_AT_ONCE)
        total = sum(self._loss(batch).item() * len(batch) for batch in batches)
        self.losses.append([self.seconds, total / len(self.held_out)])
        self.model.train()

    def until(self, end: float) -> None:
        """Steps until so many seconds of training are over."""
        while self.seconds < end:
            start = time.perf_counter()
            for _ in range(STEPS_AT_ONCE):
                self.step()
            self.device.synchronize()
            self.seconds += time.perf_counter() - start


def train(settings: Settings, device: Device, name: str) -> dict[str, Any]:
    """Trains a model, and returns its losses with the seconds at which they were taken."""
    run = Run(settings, device, name)
    for _ in range(WARM_UP):  # kernels are compiled, which does not count
        run.step()
    run = Run(settings, device, name)
    run.evaluate()
    for evaluation in range(1, EVALUATIONS + 1):
        run.until(settings.training_seconds * evaluation / EVALUATIONS)
        run.evaluate()
    parameters = sum(each.numel() for each in run.model.parameters())
    return {"losses": run.losses, "steps": run.steps, "training_seconds": run.seconds, "parameters": parameters}
