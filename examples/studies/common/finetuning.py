# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""How a model of a study is finetuned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from modeling_peer import RowAdamW, expert_parameter_groups


def train(
    model: nn.Module,
    dataset: Any,
    folder: Path,
    learning_rate: float,
    steps: int,
    batch_size: int,
    data_collator: Callable = default_data_collator,
    callbacks: list[TrainerCallback] | None = None,
    **options: Any,
) -> None:
    """
    Trains the parameters of a model that require a gradient, with `Trainer` and [`RowAdamW`], and leaves the model in
    evaluation mode.

    Args:
        model (`nn.Module`): Model to train in place.
        dataset (`Dataset` or list): Training examples.
        folder (`Path`): Output folder of the `Trainer`.
        learning_rate (`float`): Learning rate after a warm-up of a tenth of the steps.
        steps (`int`): Number of training steps.
        batch_size (`int`): Number of examples per step.
        data_collator (`Callable`, *optional*): Collator of the examples. Defaults to that of Transformers.
        callbacks (`list[TrainerCallback]`, *optional*): Callbacks of the `Trainer`.
        options: Further `TrainingArguments`.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=steps // 10,
        save_strategy="no",
        logging_steps=steps,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=False,
        lr_scheduler_type="cosine",
        **options,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=dataset,
        data_collator=data_collator,
        optimizers=(RowAdamW(expert_parameter_groups(model, learning_rate), weight_decay=0.0), None),
        callbacks=callbacks,
    )
    trainer.train()
    # Accelerate wraps the forward in autocast for bf16: unwrapped, evaluation does not depend on the training.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
