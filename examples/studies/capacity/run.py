# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""One run of the study: a new model stores facts, and what it stored is measured."""

import time
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, default_data_collator

from modeling_peer import PeerForCausalLM, make_optimizer
from studies.capacity.facts import BATCH_SIZE, Facts, make_facts, measure
from studies.capacity.variants import make_model


def store(model: PeerForCausalLM, facts: Facts, exposures: int, learning_rate: float, seed: int, folder: str) -> float:
    """Train a model on each fact as often as `exposures` says. Returns the seconds that it took."""
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=exposures,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=learning_rate,
        adam_beta2=0.99,
        weight_decay=0.0,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=facts.examples,
        data_collator=default_data_collator,
        optimizers=(make_optimizer(model, arguments), None),
    )
    start = time.perf_counter()
    trainer.train()
    return time.perf_counter() - start


def make_run(
    variant: str, num_facts: int, token_bits: float, exposures: int, learning_rate: float, seed: int, folder: str
) -> dict[str, Any]:
    """Make a run, and return what was stored of the facts and of the controls."""
    facts, controls = make_facts(num_facts, token_bits, seed)
    model = make_model(variant, seed)
    seconds = store(model, facts, exposures, learning_rate, seed, folder)
    return {
        "offered": facts.bits,
        "stored": measure(model, facts),
        "controls": {name: measure(model, each) for name, each in controls.items()},
        "training_seconds": seconds,
        "threads": torch.get_num_threads(),
    }
