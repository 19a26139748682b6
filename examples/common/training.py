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
"""What the training examples have in common: arguments and logs as the library's own examples have them, and a run."""

import json
import logging
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import datasets
import transformers
from datasets import DatasetDict, IterableDatasetDict
from transformers import (
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_peer import ExpertUsageCallback, RowAdamW, expert_parameter_groups


logger = logging.getLogger(__name__)


@dataclass
class OptimizerArguments:
    """Whether [`RowAdamW`] trains, in place of the optimizer that --optim names."""

    row_adamw: bool = field(
        default=False,
        metadata={
            "help": "Move only those rows of expert tables that a step retrieved. Faster with sparse gradients, "
            "--config_overrides sparse_expert_gradients=true. Not under FSDP, where `Trainer` makes its own optimizer."
        },
    )
    second_moment: Literal["full", "row"] = field(
        default="full",
        metadata={
            "help": "What RowAdamW keeps of squared gradients: a number for each of theirs, or one for each row."
        },
    )
    expert_lr_multiplier: float = field(
        default=1.0, metadata={"help": "What RowAdamW multiplies the learning rate of expert tables with."}
    )
    down_proj_lr_multiplier: float = field(
        default=1.0, metadata={"help": "What it multiplies that of the experts' output rows with, besides."}
    )

    def __post_init__(self):
        options = (self.second_moment, self.expert_lr_multiplier, self.down_proj_lr_multiplier)
        if not self.row_adamw and options != ("full", 1.0, 1.0):
            raise ValueError(
                "--second_moment, --expert_lr_multiplier and --down_proj_lr_multiplier are of RowAdamW: add --row_adamw."
            )

    def check(self, config: PreTrainedConfig, training_args: TrainingArguments) -> None:
        """Raises `ValueError` if a model of this configuration has gradients that the optimizer does not take."""
        if training_args.do_train and getattr(config, "sparse_expert_gradients", False) and not self.row_adamw:
            raise ValueError(
                "`sparse_expert_gradients` is true in the configuration, and AdamW does not take sparse gradients: add "
                "--row_adamw, or --config_overrides sparse_expert_gradients=false."
            )


def make_optimizers(
    args: OptimizerArguments, training_args: TrainingArguments, model: PreTrainedModel
) -> tuple[RowAdamW | None, None]:
    """What `Trainer` takes as `optimizers`: RowAdamW if it is asked for, else nothing; it makes its scheduler itself."""
    if not args.row_adamw:
        return None, None
    groups = expert_parameter_groups(
        model,
        training_args.learning_rate,
        training_args.weight_decay,
        args.expert_lr_multiplier,
        args.down_proj_lr_multiplier,
    )
    betas = (training_args.adam_beta1, training_args.adam_beta2)
    return RowAdamW(groups, betas=betas, eps=training_args.adam_epsilon, second_moment=args.second_moment), None


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Defaults of the flags, and the description as it is written."""


def parse_arguments(dataclass_types: tuple[type, ...], description: str) -> tuple:
    """
    One object of each dataclass, from the command line or from the JSON file that is its only argument.

    Args:
        dataclass_types (`tuple[type]`): Their fields are the flags.
        description (`str`): What `--help` says first.
    """
    parser = HfArgumentParser(
        dataclass_types,
        prog=_program(),
        description=description,
        usage="%(prog)s [--flag value ...]",
        formatter_class=_HelpFormatter,
    )
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    return parser.parse_args_into_dataclasses()


def _program():
    """How this process was started: a script by its name, a package as `python -m` takes it."""
    spec = sys.modules["__main__"].__spec__
    return os.path.basename(sys.argv[0]) if spec is None else f"python -m {spec.parent}"


def setup_logging(training_args: TrainingArguments) -> None:
    """Logs of this process as `--log_level` and `--log_level_replica` say, `info` on the main one by default."""
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
    """Which of the training set and the held-out set this run needs. Raises `ValueError` if one is not there."""
    needed = {"train": training_args.do_train, "validation": training_args.do_eval}
    splits = [split for split, is_needed in needed.items() if is_needed]
    if not splits:
        raise ValueError("There is nothing to do: ask for --do_train, --do_eval or both.")
    for split in splits:
        if split not in datasets:
            raise ValueError(
                f"There is no {split!r} set, only {sorted(datasets)}: choose other data, or leave out "
                f"{'--do_train' if split == 'train' else '--do_eval'}."
            )
    return splits


def last_whole_checkpoint(folder: str) -> str | None:
    """The newest checkpoint in a folder that was written to its end, `None` if there is none."""
    whole = {
        int(path.name.rpartition("-")[2]): path
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (path / TRAINER_STATE_NAME).exists()  # which is written last
    }
    return str(whole[max(whole)]) if whole else None


def last_checkpoint(training_args: TrainingArguments) -> str | None:
    """The checkpoint to resume from: the one named, or the last one in the output folder, if there is one."""
    if training_args.resume_from_checkpoint is not None:
        return training_args.resume_from_checkpoint
    if not training_args.do_train or not os.path.isdir(training_args.output_dir):
        return None
    checkpoint = last_whole_checkpoint(training_args.output_dir)
    if checkpoint is not None:
        logger.warning(
            f"Training goes on from {checkpoint}. To start afresh, choose another --output_dir or remove this one."
        )
    return checkpoint


def run(
    trainer: Trainer,
    checkpoint: str | None = None,
    evaluation: Callable[[Trainer, ExpertUsageCallback], dict[str, float]] | None = None,
    **card: str | None,
) -> dict[str, float]:
    """
    Trains, evaluates and pushes, what of it the trainer's arguments ask for.

    Args:
        trainer (`Trainer`)
        checkpoint (`str`, *optional*): Where training goes on from.
        evaluation (`Callable`, *optional*): Takes the trainer and a callback that measures expert usage and returns
            metrics; [`evaluate`] if not given.
        card: What a pushed model's card says, see `Trainer.push_to_hub`.

    Returns:
        `dict[str, float]`: the metrics of the evaluation, none without one.
    """
    usage = ExpertUsageCallback()
    # Before the reporting integrations, so that they see what it adds to the logs.
    trainer.callback_handler.callbacks.insert(0, usage)
    metrics = {}
    if trainer.args.do_train:
        train(trainer, checkpoint)
    if trainer.args.do_eval:
        metrics = (evaluation or evaluate)(trainer, usage)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)  # with those of training, in all_results.json
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    return metrics


def train(trainer: Trainer, checkpoint: str | None = None) -> None:
    """
    Trains and saves model, tokenizer, metrics and state. From a checkpoint training goes on; if it was the last one,
    its model is saved and no step is made.
    """
    if checkpoint is not None and _has_finished(checkpoint, trainer.args):
        logger.warning(f"{checkpoint} is the end of this training: raise --max_steps or --num_train_epochs to go on.")
        trainer.model.load_state_dict(type(trainer.model).from_pretrained(checkpoint).state_dict())
        trainer.save_model()
        if not _has_metrics(trainer.args):  # killed before they were saved: the rest of them is lost
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
    """How large the training set is, unless it is a stream."""
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
    """Metrics of the held-out set, expert usage among them."""
    # The callback measures from here on, as in training.
    usage.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    metrics = trainer.evaluate()
    usage.on_train_end(trainer.args, trainer.state, trainer.control)
    if hasattr(trainer.eval_dataset, "__len__"):
        metrics["eval_samples"] = len(trainer.eval_dataset)
    return metrics
