# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Training for the examples: optimizers, logs as in the examples of Transformers, resuming, training, evaluation."""

import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import transformers
from datasets import DatasetDict, IterableDatasetDict
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainerState, TrainingArguments
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SchedulerType

from common.cards import FOLDER, TRAINING_FILE, card_of_folder, id_on_hub, is_written_card
from common.command_line import UsageError
from common.model_arguments import uses_fsdp
from common.pictures import plot_training
from modeling_peer import ExpertUsageCallback, RowAdamW, last_complete_checkpoint, make_optimizer
from modeling_peer.optim.parameter_groups import learning_rate_of_new_model


logger = logging.getLogger(__name__)


@dataclass
class ExampleTrainingArguments(TrainingArguments):
    """`TrainingArguments` that need a folder to save to, with logs from the first step on."""

    logging_first_step: bool = field(default=True, metadata={"help": "Log the loss of the first step."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between logs; below 1, a share of all steps."})
    eval_steps: float | None = field(
        default=0.1, metadata={"help": "Steps between evaluations with --eval_strategy steps; below 1, a share."}
    )
    save_steps: float = field(default=0.1, metadata={"help": "Steps between checkpoints; below 1, a share of all."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Number of checkpoints that are kept."})
    dataloader_pin_memory: bool = field(
        default=torch.accelerator.is_available(), metadata={"help": "Whether batches are in pinned memory."}
    )

    def __post_init__(self):
        if self.output_dir is None:
            raise UsageError("There is no folder to save to: --output_dir runs/NAME.")
        super().__post_init__()


@dataclass
class PretrainingArguments(ExampleTrainingArguments):
    """Training arguments with defaults for a new model, and the learning rate by the size of the model."""

    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Initial learning rate. Defaults to 5e-5 for a checkpoint, and to 0.256 / `hidden_size`, at most "
            "4e-3, for a new model."
        },
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine", metadata={"help": "Name of the learning rate schedule."}
    )
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps of linear warm-up; below 1, a share of all steps."}
    )

    def set_learning_rate(self, config: PreTrainedConfig, is_new: bool) -> None:
        """Sets the learning rate for a model with this configuration, new or a checkpoint, unless it is given."""
        if self.learning_rate is None:
            self.learning_rate = learning_rate_of_new_model(config.hidden_size) if is_new else 5e-5


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
    rates: Literal["text", "facts"] = field(
        default="text",
        metadata={"help": "Which rates of expert tables a new model has: for text, or for facts that are repeated."},
    )
    expert_lr_multiplier: float | None = field(
        default=None,
        metadata={
            "help": "Multiplier of RowAdamW on the learning rate of expert tables. By default that of --rates for a "
            "new model, and 1 for one that is trained further."
        },
    )
    down_proj_lr_multiplier: float | None = field(
        default=None,
        metadata={
            "help": "Further multiplier on the learning rate of the down-projection vectors of experts. By default "
            "that of --rates for a new model, and 1 for one that is trained further."
        },
    )

    def __post_init__(self):
        if not self.row_adamw and replace(self, row_adamw=True) != OptimizerArguments():
            raise ValueError(
                "--second_moment, --rates, --expert_lr_multiplier and --down_proj_lr_multiplier need RowAdamW: leave "
                "out --no_row_adamw."
            )


def make_optimizers(
    args: OptimizerArguments, training_args: TrainingArguments, model: PreTrainedModel, is_new: bool
) -> tuple[RowAdamW | None, None]:
    """
    The `optimizers` of `Trainer`: RowAdamW, or `None` if it is disabled or FSDP splits the model, for which `Trainer`
    makes its own optimizer. `Trainer` makes the scheduler itself.

    Args:
        args (`OptimizerArguments`)
        training_args (`TrainingArguments`)
        model (`PreTrainedModel`)
        is_new (`bool`): Whether the model is trained from scratch, with the rates of `--rates`.
    """
    if not args.row_adamw or uses_fsdp(training_args):
        return None, None
    multipliers = args.expert_lr_multiplier, args.down_proj_lr_multiplier
    if not is_new:
        multipliers = tuple(1.0 if multiplier is None else multiplier for multiplier in multipliers)
    return make_optimizer(model, training_args, *multipliers, second_moment=args.second_moment, rates=args.rates), None


def setup_logging(training_args: TrainingArguments) -> None:
    """
    Set up logging: the main process shows messages of the examples and warnings of libraries, other processes only
    warnings. `--log_level` (in other processes `--log_level_replica`) sets one level for all loggers.
    """
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
    )
    log_level = training_args.get_process_log_level()
    logging.getLogger().setLevel(log_level)
    if training_args.should_log and training_args.log_level == "passive":
        for name in ("common", "run_clm", "run_classification", "__main__"):
            logging.getLogger(name).setLevel(logging.INFO)
    datasets.utils.logging.set_verbosity(log_level)
    transformers.utils.logging.set_verbosity(log_level)
    transformers.utils.logging.enable_default_handler()
    transformers.utils.logging.enable_explicit_format()
    logger.debug(f"Training/evaluation parameters {training_args}")


def needed_splits(datasets: DatasetDict | IterableDatasetDict, training_args: TrainingArguments) -> list[str]:
    """The splits that a run needs, `"train"` and `"validation"`. Raises `UsageError` if it needs none or lacks one."""
    needed = {"train": training_args.do_train, "validation": training_args.do_eval}
    splits = [split for split, is_needed in needed.items() if is_needed]
    if not splits:
        raise UsageError("There is nothing to do: add --do_train, --do_eval or both.")
    for split in splits:
        if split not in datasets:
            raise UsageError(
                f"There is no {split!r} set, only {sorted(datasets)}: choose other data, or leave out "
                f"{'--do_train' if split == 'train' else '--do_eval'}."
            )
    return splits


def check_has_model(training_args: TrainingArguments, is_new: bool) -> None:
    """
    Raise `UsageError` if a new model, whose weights are random, would be evaluated without being trained: its figures
    would be saved as those of the model in the output folder.
    """
    if is_new and training_args.do_eval and not training_args.do_train:
        raise UsageError("There is no trained model to evaluate: name it by --model_name_or_path, or add --do_train.")


def last_checkpoint(training_args: TrainingArguments) -> str | None:
    """
    The checkpoint to resume from: the given one, or else the latest complete one in the output folder, if any. Raises
    `UsageError` if the given folder is not a complete checkpoint.
    """
    given = training_args.resume_from_checkpoint
    if given is not None:
        if not Path(given, TRAINER_STATE_NAME).is_file():
            found = f"has no {TRAINER_STATE_NAME}" if os.path.isdir(given) else "is no folder"
            raise UsageError(
                f"--resume_from_checkpoint must be a folder such as {training_args.output_dir}/checkpoint-500 that "
                f"`Trainer` has saved to its end, but {given} {found}."
            )
        return given
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
    data: str | None = None,
    next_command: str | None = None,
    **card: str | None,
) -> dict[str, float]:
    """
    Train, evaluate and push a model as far as the arguments of its trainer request it, plot its losses, write its card,
    and log a summary.

    Args:
        trainer (`Trainer`): Trainer of the model.
        checkpoint (`str`, *optional*): Checkpoint to resume from.
        evaluation (`Callable`, *optional*):
            Function that takes the trainer and a callback that measures expert usage, and returns metrics. Defaults to
            [`evaluate`].
        data (`str`, *optional*): Description of the training data, for the card.
        next_command (`str`, *optional*): Command to suggest next, in which `{folder}` stands for the model's folder.
        card: Contents of the card of a pushed model, see `Trainer.push_to_hub`.

    Returns:
        `dict[str, float]`: the metrics of the evaluation; empty without one.
    """
    usage = ExpertUsageCallback()
    # Before the reporting integrations, so that they receive what it adds to the logs.
    trainer.callback_handler.callbacks.insert(0, usage)
    metrics = {}
    if trainer.args.do_train:
        train(trainer, checkpoint, data)
    if trainer.args.do_eval:
        metrics = (evaluation or evaluate)(trainer, usage)
        trainer.save_metrics("eval", metrics)  # adds them to the training metrics in all_results.json
    if trainer.args.do_train and trainer.is_world_process_zero():
        plot_training(trainer.state.log_history, Path(trainer.args.output_dir, "losses.png"))
    save_card(trainer, **card)
    logger.info(describe_run(trainer, metrics, next_command))
    return metrics


def describe_run(trainer: Trainer, metrics: dict[str, float], next_command: str | None = None) -> str:
    """A summary of a run, in up to three lines, and a command to run next."""
    figures = {
        name.removeprefix("eval_").replace("_", " "): f"{value:.4g}"
        for name, value in metrics.items()
        if name in ("eval_loss", "perplexity", "eval_accuracy")
    }
    lines = ["On held-out text: " + ", ".join(f"{name} {value}" for name, value in figures.items())] if figures else []
    usage = [value for name, value in metrics.items() if name.startswith("eval_expert_usage/")]
    lines += [f"Of the experts of a layer, this text used {usage_range(usage)}"] if usage else []
    folder = trainer.args.output_dir
    lines += [
        f"In {folder}: "
        + ("the model, losses.png, and " if trainer.args.do_train else "")
        + "all figures in all_results.json"
    ]
    if next_command and trainer.args.do_train:
        lines.append(f"Next: {next_command.format(folder=shlex.quote(folder))}")
    return "\n".join(["", *lines])


def usage_range(shares: Collection[float]) -> str:
    """The range of the shares of experts that the layers of a model used, as text."""
    least, most = (f"{share:.0%}" for share in (min(shares), max(shares)))
    return least if least == most else f"{least} to {most}"


def save_card(trainer: Trainer, dataset: str | None = None, **card: str | None) -> None:
    """
    Save the card of a trained language model beside it, and push a model if the arguments of its trainer request it.
    For the contents of its card see `Trainer.push_to_hub`; a local dataset is not named.
    """
    if _is_language_model(trainer):
        write_training_card(trainer)
        trainer.create_model_card = partial(write_training_card, trainer)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset=None if dataset is None else id_on_hub(dataset), **card)


def _is_language_model(trainer):
    return getattr(type(trainer.model), "_auto_class", None) == "AutoModelForCausalLM"


def save_description(trainer: Trainer, data: str | None) -> None:
    """Save the description of a training for the model's card."""
    if trainer.is_world_process_zero():
        description = {
            "data": data,
            "base_model": _base_model(trainer.model),
            "settings": extract_hyperparameters_from_trainer(trainer),
        }
        # Accelerate has wrapped the optimizer, unless the training had finished before.
        if isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), RowAdamW):
            description["settings"]["optimizer"] = "RowAdamW"
        file = Path(trainer.args.output_dir, TRAINING_FILE)
        file.write_text(json.dumps(description, indent=2, default=str), encoding="utf-8")


def _base_model(model):
    """The id of the model that a training began with, or the name of its folder. `None` for a new one."""
    folder = Path(model.name_or_path)
    if "/" in model.name_or_path and id_on_hub(model.name_or_path):
        return model.name_or_path
    return folder.name if any(folder.glob("*.safetensors")) else None


def write_training_card(trainer: Trainer, **card: Any) -> None:
    """
    Write the README.md of a language model, as `push_to_hub.py` does. If the model is not pushed, an existing file is
    replaced only if a training wrote it.

    Args:
        trainer (`Trainer`): Trainer of the model.
        card: Contents of the card of a model that is pushed, see `Trainer.create_model_card`.
    """
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    readme = folder / "README.md"
    if not (folder / "config.json").exists():
        return
    if trainer.hub_model_id is None and readme.exists() and not is_written_card(readme):
        return
    text = card_of_folder(
        folder,
        trainer.hub_model_id or folder.name,
        trainer.model.config,
        license=card.get("license"),
        dataset_name=card.get("dataset"),
        name_or_path=FOLDER if trainer.hub_model_id is None else None,
    )
    readme.write_text(str(text), encoding="utf-8")


def train(trainer: Trainer, checkpoint: str | None = None, data: str | None = None) -> None:
    """
    Train a model, or resume from a checkpoint, and save the model, tokenizer, metrics, state, and description of the
    training. If the checkpoint is the end of the training, its model is saved without a further step, and an existing
    description is kept.

    Args:
        trainer (`Trainer`): Trainer of the model.
        checkpoint (`str`, *optional*): Checkpoint to resume from.
        data (`str`, *optional*): Description of the training data, for the card.
    """
    if checkpoint is not None and has_finished(checkpoint, trainer.args):
        logger.warning(
            f"{checkpoint} is the end of this training: raise --max_steps or --num_train_epochs to continue."
        )
        if isinstance(trainer.model, PreTrainedModel):
            trainer.model.load_state_dict(type(trainer.model).from_pretrained(checkpoint).state_dict())
        else:  # an adapter
            trainer._load_from_checkpoint(checkpoint)
        trainer.save_model()
        if not _has_metrics(trainer.args):  # the process was killed before it saved them
            trainer.save_metrics("train", _samples(trainer))
        if not Path(trainer.args.output_dir, TRAINING_FILE).exists():
            save_description(trainer, data)
        trainer.state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        trainer.save_state()
        return
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model()
    metrics |= _samples(trainer)
    trainer.save_metrics("train", metrics)
    save_description(trainer, data)
    trainer.save_state()


def _samples(trainer):
    """The size of the training set, unless it is a stream."""
    sized = hasattr(trainer.train_dataset, "__len__")
    return {"train_samples": len(trainer.train_dataset)} if sized else {}


def _has_metrics(training_args):
    saved = Path(training_args.output_dir, "all_results.json")
    return saved.exists() and any(name.startswith("train_") for name in json.loads(saved.read_text()))


def has_finished(checkpoint: str, training_args: TrainingArguments) -> bool:
    """Whether a checkpoint is the end of a training with these arguments."""
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
