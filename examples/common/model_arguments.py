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
"""Which model an example trains: a named configuration from scratch, or a checkpoint that goes on."""

import json
import logging
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from datasets import Dataset, IterableDataset
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common.text_data import DatasetArguments, text_column, train_tokenizer
from modeling_peer import configuration_path, list_configurations


logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """Which model to train. A checkpoint brings its tokenizer; a new model gets one trained on the text."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A checkpoint to go on from: a folder, or a model of the Hub by its id."}
    )
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "The configuration of a new model: one that this package names "
            f"({', '.join(list_configurations())}), a folder, or a model of the Hub by its id. `peer-tiny` if neither "
            "this nor --model_name_or_path is given."
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": 'Fields of the configuration to change: "num_experts=4096,query_norm=rms", or an object in JSON '
            "where a value is a list."
        },
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "A tokenizer, a folder or a model of the Hub by its id, to use as it is."}
    )
    model_revision: str = field(
        default="main", metadata={"help": "The branch, tag or commit of a model of the Hub to use."}
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = field(
        default="float32",
        metadata={"help": "The data type of the weights; `auto` is that of the checkpoint. See also --bf16."},
    )

    def __post_init__(self):
        if self.model_name_or_path is not None and self.config_name is not None:
            raise ValueError("Choose one: a new model of --config_name, or the checkpoint --model_name_or_path.")
        if self.model_name_or_path is None and self.config_name is None:
            self.config_name = "peer-tiny"


def load_config(args: ModelArguments, **fields: Any) -> PreTrainedConfig:
    """The configuration that the arguments name, with their overrides and with `fields`."""
    name = args.model_name_or_path or args.config_name
    if name in list_configurations() and args.model_name_or_path is None:
        name = configuration_path(name)
    try:
        values, _ = PreTrainedConfig.get_config_dict(name, revision=args.model_revision)
    except OSError as error:
        raise OSError(
            f"There is no configuration {name!r}: it is neither one of {list_configurations()}, nor a folder with a "
            "config.json, nor a model of the Hub that can be reached."
        ) from error
    config_class = CONFIG_MAPPING[values["model_type"]]
    fields |= _parse_overrides(args.config_overrides)
    for field_name in fields:
        if not hasattr(config_class, field_name):
            raise ValueError(f"--config_overrides: {config_class.__name__} has no field {field_name!r}.")
    if args.model_name_or_path is not None:
        return AutoConfig.from_pretrained(name, revision=args.model_revision, **fields)
    # Made anew rather than changed: what a configuration derives from other fields follows them.
    return config_class.from_dict(values | fields)


def _parse_overrides(text):
    if text is None:
        return {}
    if text.lstrip().startswith("{"):
        return json.loads(text)
    overrides = {}
    for assignment in text.split(","):
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f'--config_overrides is written "name=value,name=value", not {text!r}.')
        overrides[name.strip()] = _parse_value(value.strip())
    return overrides


def _parse_value(text):
    """As JSON has it, or Python, or the bare word."""
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
    """The tokenizer that is named, or that belongs to what training goes on from, or a new one of the training set."""
    name = args.tokenizer_name or args.model_name_or_path or checkpoint
    if name is not None:
        return AutoTokenizer.from_pretrained(name, revision=args.model_revision)
    if train_dataset is None:
        raise ValueError("There is no training set to train a tokenizer on: name a tokenizer, --tokenizer_name.")
    logger.info(f"Training a tokenizer of {config.vocab_size} tokens on the training set")
    column = text_column(train_dataset, data_args)
    return train_tokenizer(train_dataset, column, config.vocab_size, config.max_position_embeddings)


def load_model(
    auto_class: type, args: ModelArguments, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """
    The model of a configuration, new or with a checkpoint's weights, with room for every token of the tokenizer.

    Args:
        auto_class (`type`): Such as `AutoModelForCausalLM`.
        args (`ModelArguments`): Name the checkpoint, if any, and the data type.
        config (`PreTrainedConfig`): See [`load_config`]; its special tokens become the tokenizer's.
        tokenizer (`PreTrainedTokenizerBase`)
    """
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    if args.model_name_or_path is None:
        config.vocab_size = max(config.vocab_size, len(tokenizer))
        return auto_class.from_config(config, dtype=None if dtype == "auto" else dtype)
    model = auto_class.from_pretrained(
        args.model_name_or_path, config=config, revision=args.model_revision, dtype=dtype
    )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return model
