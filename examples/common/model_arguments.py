# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The model that an example trains: a new one from a named configuration, or a checkpoint."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from datasets import Dataset, IterableDataset
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig

from common.command_line import UsageError
from common.text_data import DatasetArguments, text_column, train_tokenizer
from modeling_peer import PeerConfig, configuration_path, keep_heads, list_configurations
from modeling_peer.parallel.split_initialization import make_split_model


logger = logging.getLogger(__name__)


def uses_fsdp(training_args: TrainingArguments) -> bool:
    """
    Whether FSDP splits the model: by `--fsdp`, or by the configuration file of `accelerate launch`, which only sets
    environment variables.
    """
    return bool(training_args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


@dataclass
class ModelArguments:
    """Which model to train. A checkpoint comes with its tokenizer; for a new model, one is trained on the text."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Checkpoint to continue training from: a folder, or the id of a model of the Hub."},
    )
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "Configuration of a new model: a named configuration of this package "
            f"({', '.join(list_configurations())}), a folder, or the id of a model of the Hub. Defaults to "
            "`peer-toy` without --model_name_or_path."
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": 'Fields of the configuration to change: "num_experts=4096,query_norm=rms", or a JSON object '
            "if a value is a list."
        },
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer to use without training: a folder, or the id of a model of the Hub."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model of the Hub."})
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32",
        metadata={"help": "Data type of the weights; `auto` is that of the checkpoint. See also --bf16."},
    )

    def __post_init__(self):
        if self.model_name_or_path is not None and self.config_name is not None:
            raise UsageError("Choose either a new model, --config_name, or a checkpoint, --model_name_or_path.")
        if self.model_name_or_path is None and self.config_name is None:
            self.config_name = "peer-toy"

    @property
    def is_new(self) -> bool:
        """Whether a new model is trained, not a checkpoint."""
        return self.model_name_or_path is None


@dataclass
class DistributedArguments:
    """How the processes that a launcher starts split a model: a field of `DistributedConfig` of Transformers."""

    ep_size: int = field(
        default=1,
        metadata={
            "help": "Number of processes of a memory group. Each of them holds a part of the columns of all expert "
            "tables, and they exchange tokens; FSDP2 splits all other parameters over all processes. It divides the "
            "number of all processes. With 1 there are no groups, and DDP or FSDP as the launcher says."
        },
    )

    def make_config(self, training_args: TrainingArguments, config: PreTrainedConfig) -> DistributedConfig | None:
        """
        Make the configuration that splits a model over memory groups; `None` without groups. Raises `UsageError` if
        the model or the launch does not allow memory groups.
        """
        if self.ep_size == 1:
            return None
        if not isinstance(config, PeerConfig):
            raise UsageError(f"--ep_size {self.ep_size} needs a PEER model, not one of {type(config).__name__}.")
        if uses_fsdp(training_args):
            raise UsageError(
                f"--ep_size {self.ep_size} applies FSDP2 itself: leave out --fsdp, and start the script by "
                "configuration/launch/memory_group.sh, not by a launch file for FSDP."
            )
        num_processes = training_args.world_size
        if self.ep_size < 1 or num_processes % self.ep_size:
            raise UsageError(
                f"--ep_size must divide the number of processes, {num_processes}, got {self.ep_size}: start the "
                "script by a launcher, as configuration/launch/memory_group.sh does."
            )
        return DistributedConfig(fsdp_size=num_processes, ep_size=self.ep_size)


# Configuration fields of earlier releases. Plans and commands of finished studies still give them; they are ignored.
RETIRED_FIELDS = {"sparse_expert_gradients"}


@contextmanager
def loads_checkpoint(name: str) -> Iterator[None]:
    """Raise `UsageError` if a checkpoint cannot be loaded, with its name and what it must be."""
    try:
        yield
    except OSError as error:
        raise UsageError(_no_checkpoint(name, error)) from error
    except ValueError as error:
        if "backend tokenizer" not in str(error):
            raise
        raise UsageError(f"{name} has no tokenizer: save one there by its `save_pretrained`.") from error


@contextmanager
def checks_fields() -> Iterator[None]:
    """Raise `UsageError` in place of the errors that a configuration raises for invalid fields."""
    try:
        yield
    except StrictDataclassError as error:
        raise UsageError(str(error.__cause__ or error)) from error
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_output_dir(output_dir: str, model_name_or_path: str | None) -> None:
    """Raises `UsageError` if a changed model would be saved over the one that it was made from."""
    if model_name_or_path is None or not os.path.isdir(model_name_or_path) or not os.path.isdir(output_dir):
        return
    if os.path.samefile(model_name_or_path, output_dir):
        raise UsageError(
            f"--output_dir {output_dir} is the folder of --model_name_or_path, whose model would be overwritten: choose "
            "another."
        )


def _no_checkpoint(name, error):
    if name in list_configurations():
        return f"There is no checkpoint {name!r}, but a named configuration: a new model takes it by --config_name."
    said = str(error).strip().partition("\n")[0]
    return (
        f"No checkpoint can be loaded from {name!r}, which must be a folder that `save_pretrained` wrote, or a reachable "
        f"model of the Hub: {said}"
    )


def _no_configuration(name):
    return (
        f"There is no configuration {name!r}: it is neither one of {list_configurations()}, nor a folder with a "
        "config.json, nor a reachable model of the Hub."
    )


def load_config(args: ModelArguments, **fields: Any) -> PreTrainedConfig:
    """
    Load the configuration that the arguments name, with their overrides and with `fields`. Raises `UsageError` if it
    does not exist or does not accept an override.
    """
    name = args.model_name_or_path or args.config_name
    if name in list_configurations() and args.model_name_or_path is None:
        name = configuration_path(name)
    try:
        values, _ = PreTrainedConfig.get_config_dict(name, revision=args.model_revision)
    except OSError as error:
        raise UsageError(_no_configuration(name) if args.is_new else _no_checkpoint(name, error)) from error
    model_type = values.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UsageError(
            f"The configuration {name} has the `model_type` {model_type!r}, which Transformers does not know."
        )
    config_class = CONFIG_MAPPING[model_type]
    overrides = _parse_overrides(args.config_overrides)
    fields = {name: value for name, value in (fields | overrides).items() if name not in RETIRED_FIELDS}
    for field_name in fields:
        if not hasattr(config_class, field_name):
            flag = "--config_overrides: " if field_name in overrides else ""
            raise UsageError(f"{flag}{config_class.__name__} has no field {field_name!r}.")
    with checks_fields():
        if args.model_name_or_path is not None:
            return AutoConfig.from_pretrained(name, revision=args.model_revision, **fields)
        # A new configuration derives its fields from the changed ones; changing an existing one would not.
        return config_class.from_dict(values | fields)


def _parse_overrides(text):
    if text is None:
        return {}
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(
                f"--config_overrides begins like a JSON object, but is none: {error} in {text!r}."
            ) from error
    overrides = {}
    for assignment in text.split(","):
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f'--config_overrides must have the form "name=value,name=value", but got {text!r}.')
        overrides[name.strip()] = _parse_value(value.strip())
    return overrides


def _parse_value(text):
    """Parses a value in the notation of JSON or Python. Anything else is a string."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def load_tokenizer(
    args: ModelArguments,
    data_args: DatasetArguments,
    config: PreTrainedConfig,
    train_dataset: Dataset | IterableDataset | None,
    checkpoint: str | None = None,
) -> PreTrainedTokenizerBase:
    """
    Loads the named tokenizer or that of the checkpoint to continue from, or trains a new one on the training set.
    """
    name = args.tokenizer_name or args.model_name_or_path or checkpoint
    if name is not None:
        with loads_checkpoint(name):
            return AutoTokenizer.from_pretrained(name, revision=args.model_revision)
    if train_dataset is None:
        raise UsageError("There is no training set to train a tokenizer on: give a tokenizer, --tokenizer_name.")
    logger.info(f"Training a tokenizer of {config.vocab_size} tokens on the training set")
    column = text_column(train_dataset, data_args)
    return train_tokenizer(train_dataset, column, config.vocab_size, config.max_position_embeddings)


def load_model(
    model_class: type,
    args: ModelArguments,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    distributed_config: DistributedConfig | None = None,
    checkpoint_options: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """
    Makes a new model or loads a checkpoint, with embeddings for every token of the tokenizer.

    Args:
        model_class (`type`):
            Class of the model, or an Auto class such as `AutoModelForCausalLM`. An Auto class cannot make a new model
            that is split.
        args (`ModelArguments`): Arguments with the checkpoint, if any, and the data type.
        config (`PreTrainedConfig`): Configuration from [`load_config`]. It gets the special tokens of the tokenizer.
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer of the model.
        distributed_config (`DistributedConfig`, *optional*):
            From [`DistributedArguments`], if the model is split over memory groups. No process then makes or loads a
            whole table.
        checkpoint_options (`dict[str, Any]`, *optional*): Further arguments of `from_pretrained`.
    """
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    if args.model_name_or_path is None:
        config.vocab_size = max(config.vocab_size, len(tokenizer))
        dtype = None if dtype == "auto" else dtype
        if issubclass(model_class, PreTrainedModel):
            return make_split_model(model_class, config, distributed_config, dtype=dtype)
        return model_class.from_config(config, dtype=dtype)
    if distributed_config is not None and len(tokenizer) > config.vocab_size:
        raise UsageError(
            f"The tokenizer has {len(tokenizer)} tokens and the model embeddings of {config.vocab_size}: resize them "
            "and save the model in one process before it is split."
        )
    num_heads = getattr(config, "num_retrieval_heads", None)
    with loads_checkpoint(args.model_name_or_path):
        if num_heads is not None:  # load all heads first: fewer may be asked for
            saved = AutoConfig.from_pretrained(args.model_name_or_path, revision=args.model_revision)
            config.num_retrieval_heads = saved.num_retrieval_heads
        model = model_class.from_pretrained(
            args.model_name_or_path,
            config=config,
            revision=args.model_revision,
            dtype=dtype,
            **({} if distributed_config is None else {"distributed_config": distributed_config}),
            **(checkpoint_options or {}),
        )
    if num_heads != getattr(config, "num_retrieval_heads", None):
        with checks_fields():
            keep_heads(model, num_heads)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return model


def num_held_parameters(model: PreTrainedModel) -> int:
    """The number of parameter elements that this process holds; of split parameters it holds a part."""
    parts = [each.to_local() if hasattr(each, "to_local") else each for each in model.parameters()]
    return sum(part.numel() for part in parts)
