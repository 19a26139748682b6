# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""How a model is trained to store something, and the runs that store facts and people."""

import copy
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from modeling_peer import make_optimizer, quantize_experts
from modeling_peer.experts import expert_tables
from studies.capacity.facts import make_composed_facts, make_facts, measure
from studies.capacity.plan import Run
from studies.capacity.variants import make_model
from studies.common.people import ASKED_BITS, BLOCK, VOCABULARY, biographies, draw_people, measure_people


BATCH_SIZE, BATCH_TOKENS = 256, 4096


def store(
    model: nn.Module,
    examples: Any,
    run: Run,
    folder: Path,
    exposures: int = 1,
    batch_size: int = BATCH_SIZE,
    callbacks: list[TrainerCallback] | None = None,
    progress: bool = False,
) -> None:
    """Train a model on each example as often as `exposures` says, with a progress bar if asked."""
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=exposures,
        per_device_train_batch_size=batch_size,
        learning_rate=run.learning_rate,
        adam_beta2=0.99,
        weight_decay=0.0,
        warmup_steps=run.warmup,
        lr_scheduler_type="cosine",
        seed=run.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=not progress,
        log_level="error",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=examples,
        data_collator=default_data_collator,
        optimizers=(make_optimizer(model, arguments, 0.25, run.multiplier), None),
        callbacks=callbacks,
    )
    trainer.train()


def store_facts(run: Run, folder: Path) -> dict[str, Any]:
    """A new model stores random facts. Returns what it stored of them and of the controls, and with narrow tables."""
    facts, controls = make_facts(run.load.number, run.load.token_bits, run.seed)
    model = make_model(run.subject, run.seed)
    store(model, facts.examples, run, folder, run.load.exposures)
    narrow = (8, 4) if expert_tables(model) else ()
    return {
        "offered": facts.bits,
        "stored": measure(model, facts),
        "controls": {name: measure(model, each) for name, each in controls.items()},
        "in_bits": {bits: measure(quantize_experts(copy.deepcopy(model), bits), facts) for bits in narrow},
    }


def store_composed(run: Run, folder: Path) -> dict[str, Any]:
    """A new model stores facts that follow from two others, and is asked those that it was never told."""
    told, untold = make_composed_facts(run.load.number, run.seed)
    model = make_model(run.subject, run.seed)
    store(model, told.examples, run, folder, run.load.exposures)
    return {"stored": measure(model, told), "untold": measure(model, untold)}


def store_people(run: Run, folder: Path) -> dict[str, Any]:
    """A new model reads biographies, and is asked in a wording that was not among them."""
    drawn = draw_people(2 * run.load.number, run.seed)
    people, unknown = drawn[: run.load.number], drawn[run.load.number :]
    model = make_model(run.subject, run.seed, vocab_size=len(VOCABULARY), max_position_embeddings=BLOCK)
    examples = [{"input_ids": own, "labels": own} for own in biographies(people, run.load.exposures, run.seed).long()]
    store(model, examples, run, folder, batch_size=BATCH_TOKENS // BLOCK)
    return {
        "offered": len(people) * ASKED_BITS,
        "parameters": model.num_parameters(),
        "stored": measure_people(model, people),
        "controls": {"unknown people": measure_people(model, unknown)},
    }
