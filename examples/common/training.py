# Copyright 2026 The PEER for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Training for the examples: optimizers and logs as in the examples of Transformers, resuming, training, evaluation."""

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import datasets
import transformers
from datasets import DatasetDict, IterableDatasetDict
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from modeling_peer import ExpertUsageCallback, RowAdamW, last_complete_checkpoint, make_optimizer


logger = logging.getLogger(__name__)


@dataclass
class OptimizerArguments:
    """How to train expert tables: with [`RowAdamW`], unless --no_row_adamw leaves all to the optimizer of --optim."""

    row_adamw: bool = field(
        default=True,
        metadata={
            "help": "Update only the rows of expert tables that a step retrieved, with learning rates of their own. "
            "Not under FSDP, where `Trainer` makes its own optimizer."
        },
    )
    second_moment: Literal["full", "row"] = field(
        default="full",
        metadata={"help": "Second moment of RowAdamW: one value per element, or one per row."},
    )
    expert_lr_multiplier: float | None = field(
        default=None,
        metadata={
            "help": "Multiplier of RowAdamW on the learning rate of expert tables. By default that of the scaling "
            "study for a new model, and 1 for one that is trained further."
        },
    )
    down_proj_lr_multiplier: float | None = field(
        default=None,
        metadata={
            "help": "Further multiplier on the learning rate of the down-projection vectors of experts. By default "
            "that of the scaling study for a new model, and 1 for one that is trained further."
        },
    )

    def __post_init__(self):
        options = (self.second_moment, self.expert_lr_multiplier, self.down_proj_lr_multiplier)
        if not self.row_adamw and options != ("full", None, None):
            raise ValueError(
                "--second_moment, --expert_lr_multiplier and --down_proj_lr_multiplier need RowAdamW: leave out "
                "--no_row_adamw."
            )


def make_optimizers(
    args: OptimizerArguments, training_args: TrainingArguments, model: PreTrainedModel, is_new: bool
) -> tuple[RowAdamW | None, None]:
    """
    The `optimizers` of `Trainer`: RowAdamW, unless it is not wanted. `Trainer` makes the scheduler itself.

    Args:
        args (`OptimizerArguments`)
        training_args (`TrainingArguments`)
        model (`PreTrainedModel`)
        is_new (`bool`): Whether the model is trained from scratch, for which the scaling study found learning rates.
    """
    if not args.row_adamw or training_args.fsdp:
        return None, None
    multipliers = {
        name: value
        for name, value in (
            ("expert_lr_multiplier", args.expert_lr_multiplier),
            ("down_proj_lr_multiplier", args.down_proj_lr_multiplier),
        )
        if value is not None
    }
    if not is_new:
        multipliers = {"expert_lr_multiplier": 1.0, "down_proj_lr_multiplier": 1.0} | multipliers
    return make_optimizer(model, training_args, second_moment=args.second_moment, **multipliers), None


def setup_logging(training_args: TrainingArguments) -> None:
    """
    Sets the log level of this process to `--log_level` or `--log_level_replica`; `info` on the main process by
    default.
    """
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
    )
    if training_args.should_log:
        transformers.utils.logging.set_verbosity_info()
    log_level = training_args.get_process_log_level()
    logging.getLogger().setLevel(log_level)
    datasets.utils.logging.set_verbosity(log_level)
    transformers.utils.logging.set_verbosity(log_level)
    transformers.utils.logging.enable_default_handler()
    transformers.utils.logging.enable_explicit_format()
    logger.info(f"Training/evaluation parameters {training_args}")


def needed_splits(datasets: DatasetDict | IterableDatasetDict, training_args: TrainingArguments) -> list[str]:
    """The splits that a run needs, `"train"` and `"validation"`. Raises `ValueError` if one is missing."""
    needed = {"train": training_args.do_train, "validation": training_args.do_eval}
    splits = [split for split, is_needed in needed.items() if is_needed]
    if not splits:
        raise ValueError("There is nothing to do: add --do_train, --do_eval or both.")
    for split in splits:
        if split not in datasets:
            raise ValueError(
                f"There is no {split!r} set, only {sorted(datasets)}: choose other data, or leave out "
                f"{'--do_train' if split == 'train' else '--do_eval'}."
            )
    return splits


def last_checkpoint(training_args: TrainingArguments) -> str | None:
    """The checkpoint to resume from: the given one, or else the latest complete one in the output folder, if any."""
    if training_args.resume_from_checkpoint is not None:
        return training_args.resume_from_checkpoint
    if not training_args.do_train or not os.path.isdir(training_args.output_dir):
        return None
    checkpoint = last_complete_checkpoint(training_args.output_dir)
    if checkpoint is not None:
        logger.warning(
            f"Resuming training from {checkpoint}. To start again, choose another --output_dir or remove this one."
        )
    return checkpoint


def run(
    trainer: Trainer,
    checkpoint: str | None = None,
    evaluation: Callable[[Trainer, ExpertUsageCallback], dict[str, float]] | None = None,
    **card: str | None,
) -> dict[str, float]:
    """
    Trains, evaluates and pushes a model, as far as the arguments of its trainer request it.

    Args:
        trainer (`Trainer`): Trainer of the model.
        checkpoint (`str`, *optional*): Checkpoint to resume from.
        evaluation (`Callable`, *optional*):
            Function that takes the trainer and a callback that measures expert usage, and returns metrics. Defaults to
            [`evaluate`].
        card: Contents of the card of a pushed model, see `Trainer.push_to_hub`.

    Returns:
        `dict[str, float]`: the metrics of the evaluation; empty without one.
    """
    usage = ExpertUsageCallback()
    # Before the reporting integrations, so that they receive what it adds to the logs.
    trainer.callback_handler.callbacks.insert(0, usage)
    metrics = {}
    if trainer.args.do_train:
        train(trainer, checkpoint)
    if trainer.args.do_eval:
        metrics = (evaluation or evaluate)(trainer, usage)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)  # adds them to the training metrics in all_results.json
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    return metrics


def train(trainer: Trainer, checkpoint: str | None = None) -> None:
    """
    Trains a model, or resumes from a checkpoint, and saves model, tokenizer, metrics and state. If the checkpoint is
    the end of the training, its model is saved without a further step.
    """
    if checkpoint is not None and _has_finished(checkpoint, trainer.args):
        logger.warning(
            f"{checkpoint} is the end of this training: raise --max_steps or --num_train_epochs to continue."
        )
        trainer.model.load_state_dict(type(trainer.model).from_pretrained(checkpoint).state_dict())
        trainer.save_model()
        if not _has_metrics(trainer.args):  # the process was killed before it saved them
            trainer.save_metrics("train", _samples(trainer))
        trainer.state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        trainer.save_state()
        return
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model()
    metrics |= _samples(trainer)
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def _samples(trainer):
    """The size of the training set, unless it is a stream."""
    sized = hasattr(trainer.train_dataset, "__len__")
    return {"train_samples": len(trainer.train_dataset)} if sized else {}


def _has_metrics(training_args):
    saved = Path(training_args.output_dir, "all_results.json")
    return saved.exists() and any(name.startswith("train_") for name in json.loads(saved.read_text()))


def _has_finished(checkpoint, training_args):
    state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    if training_args.max_steps > 0:
        return state.global_step >= training_args.max_steps
    return state.epoch >= training_args.num_train_epochs


def evaluate(trainer: Trainer, usage: ExpertUsageCallback) -> dict[str, float]:
    """Returns metrics of the held-out set, including expert usage."""
    # Starts measuring expert usage, as at the start of training.
    usage.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    metrics = trainer.evaluate()
    usage.on_train_end(trainer.args, trainer.state, trainer.control)
    if hasattr(trainer.eval_dataset, "__len__"):
        metrics["eval_samples"] = len(trainer.eval_dataset)
    return metrics
