# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""How a model is trained to store facts, and the runs that store them."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from modeling_peer import make_optimizer, quantize_experts
from modeling_peer.experts import expert_tables
from studies.capacity.facts import make_facts, measure
from studies.capacity.plan import Run
from studies.capacity.variants import make_model


def store(
    model: nn.Module,
    examples: Any,
    run: Run,
    folder: Path,
    exposures: int = 1,
    callbacks: list[TrainerCallback] | None = None,
    progress: bool = False,
) -> None:
    """Train a model on each example as often as `exposures` says, with a progress bar if asked."""
    arguments = training_arguments(run, folder, num_train_epochs=exposures, disable_tqdm=not progress)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=examples,
        data_collator=default_data_collator,
        optimizers=(optimizer_of(model, arguments, run), None),
        callbacks=callbacks,
    )
    trainer.train()


def training_arguments(run: Run, folder: Path, **others: Any) -> TrainingArguments:
    """The training arguments of a run."""
    return TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=run.batch_size,
        learning_rate=run.learning_rate,
        adam_beta2=0.99,
        weight_decay=0.0,
        warmup_steps=run.warmup,
        lr_scheduler_type="cosine",
        seed=run.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        log_level="error",
        dataloader_pin_memory=False,
        use_cpu=True,
        **others,
    )


def optimizer_of(model: nn.Module, arguments: TrainingArguments, run: Run) -> torch.optim.Optimizer:
    """The optimizer of a run. The feed-forwards of a model without tables may have a rate of their own too."""
    up = 0.25 if run.up_multiplier is None else run.up_multiplier
    optimizer = make_optimizer(model, arguments, up, run.multiplier)
    if run.up_multiplier is not None and not expert_tables(model):
        own = {id(parameter): parameter for name, parameter in model.named_parameters() if ".mlp." in name}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        rate = arguments.learning_rate * run.up_multiplier
        optimizer.add_param_group({"params": [*own.values()], "lr": rate, "weight_decay": 0.0, "rows": False})
    return optimizer


def store_facts(run: Run, folder: Path) -> dict[str, Any]:
    """Train a new model on random facts. Returns what it stored of them and of the controls, and in narrow tables."""
    facts, controls = make_facts(run.load.number, run.load.token_bits, run.seed)
    changes = {} if run.initializer_range is None else {"initializer_range": run.initializer_range}
    model = make_model(run.subject, run.seed, **changes)
    store(model, facts.examples, run, folder, run.load.exposures)
    narrow = (8, 4) if expert_tables(model) else ()
    return {
        "offered": facts.bits,
        "stored": measure(model, facts),
        "controls": {name: measure(model, each) for name, each in controls.items()},
        "in_bits": {bits: measure(quantize_experts(copy.deepcopy(model), bits), facts) for bits in narrow},
    }
