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
"""
Text for the examples: loading it, training a tokenizer on it, and cutting it into blocks of tokens.

Without flags the text is the source code of the standard library of the running Python, so that every example works
without a network. `--dataset_name` takes any dataset of the Hugging Face Hub, `--train_file` and `--validation_file`
take local files.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.library_sources import byte_level_tokenizer, library_files, read_source


# Loader of a file by its suffix. The rows of any other file are its lines.
LOADERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}

# Characters to train a tokenizer on: more text changes the vocabulary little and takes minutes.
TOKENIZER_CHARACTERS = 50_000_000


@dataclass
class DatasetArguments:
    """Which dataset to read. Defaults to the source code of the Python standard library."""

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset of the Hub by its id, or a folder."})
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset, if it has several."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "File to train on: .csv, .json, .jsonl, .parquet or any text file."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "File of the same kind to evaluate on."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Percentage of the training set to hold out if there is no validation set."}
    )
    text_column_name: str | None = field(
        default=None, metadata={"help": "Column that holds the text. Defaults to `text`, or else to the first column."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Number of training samples to use, evenly spaced."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Number of validation samples to use, evenly spaced."}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Number of processes for preprocessing."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Ignore cached results of preprocessing."})

    def __post_init__(self):
        if self.dataset_name is not None and (self.train_file or self.validation_file):
            raise ValueError("Choose one source of data: --dataset_name, or --train_file and --validation_file.")


@dataclass
class DataTrainingArguments(DatasetArguments):
    """Which text to read, and the length of its blocks."""

    block_size: int | None = field(
        default=None,
        metadata={"help": "Tokens per sequence. Defaults to `max_position_embeddings` of the model, at most 1024."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Stream the dataset during training instead of downloading it first."}
    )


def load_datasets(args: DatasetArguments, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """
    Loads the training set (`"train"`) and the held-out set (`"validation"`) that the arguments name.

    If the source has no validation set, `validation_split_percentage` of its training set is held out: evenly spaced
    rows; the first rows of every hundred of a stream; the beginning of a text file; whole files of the standard
    library.
    """
    if args.dataset_name is not None:
        datasets = load_dataset(args.dataset_name, args.dataset_config_name, streaming=streaming)
    elif args.train_file or args.validation_file:
        datasets = _load_files(args, streaming)
    else:
        return standard_library(args.validation_split_percentage)
    if "train" in datasets and "validation" not in datasets:
        datasets["train"], datasets["validation"] = _hold_out(datasets["train"], args)
    return datasets


def standard_library(validation_split_percentage: int = 5) -> DatasetDict:
    """
    Loads the source code of the standard library of the running Python, with one row (`file`, `text`) per file.

    The order of files and the choice of held-out files depend only on their names.
    """
    root, splits = library_files(validation_split_percentage)
    # The version is part of the key of the cache, because an upgrade of Python does not change the paths.
    return DatasetDict(
        {
            split: Dataset.from_generator(
                _read_sources, gen_kwargs={"root": str(root), "names": tuple(names), "version": sys.version}
            )
            for split, names in splits.items()
        }
    )


def _read_sources(root: str, names: tuple[str, ...], version: str) -> Iterator[dict[str, str]]:
    for name in names:
        yield {"file": name, "text": read_source(Path(root, name))}


def _load_files(args, streaming):
    files = {"train": args.train_file, "validation": args.validation_file}
    files = {split: file for split, file in files.items() if file is not None}
    loaders = {LOADERS.get(Path(file).suffix, "text") for file in files.values()}
    if len(loaders) > 1:
        raise ValueError(
            f"--train_file and --validation_file must be of the same kind, but got {' and '.join(sorted(loaders))}."
        )
    (loader,) = loaders
    options = {"keep_linebreaks": True} if loader == "text" else {}
    return load_dataset(loader, data_files=files, streaming=streaming, **options)


def _hold_out(dataset, args):
    """Splits a dataset into a training set and a validation set."""
    percentage = args.validation_split_percentage
    if isinstance(dataset, IterableDataset):
        return (
            dataset.filter(lambda row, index: index % 100 >= percentage, with_indices=True),
            dataset.filter(lambda row, index: index % 100 < percentage, with_indices=True),
        )
    size = len(dataset) * percentage // 100
    held_out = list(range(size)) if rows_are_lines(args) else _evenly_spaced(len(dataset), size)
    kept = sorted(set(range(len(dataset))).difference(held_out))
    return dataset.select(kept), dataset.select(held_out)


def _evenly_spaced(length, number):
    return [i * length // number for i in range(number)]


def rows_are_lines(args: DatasetArguments) -> bool:
    """Whether rows are the lines of one text file, instead of separate texts."""
    file = args.train_file or args.validation_file
    return file is not None and Path(file).suffix not in LOADERS


def text_column(dataset: Dataset | IterableDataset, args: DatasetArguments) -> str:
    """The name of the column that holds the text."""
    columns = dataset.column_names or list(next(iter(dataset)))
    name = args.text_column_name or ("text" if "text" in columns else columns[0])
    if name not in columns:
        raise ValueError(f"There is no column {name!r}: choose another --text_column_name of {columns}.")
    return name


def take_samples(dataset: Dataset | IterableDataset, number: int | None) -> Dataset | IterableDataset:
    """Selects `number` evenly spaced samples, or the first ones of a stream; all samples if `number` is `None`."""
    if number is None:
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.take(number)
    return dataset.select(_evenly_spaced(len(dataset), min(number, len(dataset))))


def train_tokenizer(
    dataset: Dataset | IterableDataset, column: str, vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """
    Trains a byte-level BPE tokenizer, which can encode any text. Training is deterministic.

    Args:
        dataset (`Dataset` or `IterableDataset`): Text to train on, of which the first 50 million characters are read.
        column (`str`): Column that holds the text.
        vocab_size (`int`): Maximum number of tokens; a short text gives fewer.
        max_length (`int`): Number of tokens to truncate to (`model_max_length`).
    """
    return byte_level_tokenizer(_texts(dataset, column), vocab_size, max_length)


def _texts(dataset, column):
    """Yields texts in batches until there are enough for a tokenizer."""
    characters = 0
    for batch in dataset.select_columns(column).iter(batch_size=1000):
        yield batch[column]
        characters += sum(map(len, batch[column]))
        if characters > TOKENIZER_CHARACTERS:
            return


def tokenize_into_blocks(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    args: DataTrainingArguments,
) -> Dataset | IterableDataset:
    """
    Tokenizes texts and cuts them into blocks of `block_size` tokens, `input_ids` and `labels`. An end-of-text token
    follows each text; the remainder of every thousand texts is dropped.
    """
    column = text_column(dataset, args)
    options = {
        "batched": True,
        "remove_columns": dataset.column_names or list(next(iter(dataset))),
        "fn_kwargs": {
            "column": column,
            "tokenizer": tokenizer,
            "block_size": block_size,
            "is_whole_text": not rows_are_lines(args),
        },
    }
    if isinstance(dataset, Dataset):
        options |= {
            "num_proc": args.preprocessing_num_workers,
            "load_from_cache_file": not args.overwrite_cache,
            "desc": f"Tokenizing into blocks of {block_size}",
        }
    blocks = dataset.map(_blocks_of, **options)
    if isinstance(blocks, Dataset) and not len(blocks):
        raise ValueError(
            f"The text does not fill a block of {block_size} tokens: choose a smaller --block_size, a longer text or, "
            "if the held-out text is too short, a larger --validation_split_percentage."
        )
    return blocks


def _blocks_of(
    rows: dict[str, list[Any]], column: str, tokenizer: PreTrainedTokenizerBase, block_size: int, is_whole_text: bool
) -> dict[str, list[list[int]]]:
    texts = tokenizer(
        rows[column], add_special_tokens=is_whole_text, return_attention_mask=False, verbose=False
    ).input_ids
    end = [tokenizer.eos_token_id] if is_whole_text and tokenizer.eos_token_id is not None else []
    tokens = list(chain.from_iterable(text + end for text in texts))
    starts = range(0, len(tokens) - block_size + 1, block_size)
    blocks = [tokens[start : start + block_size] for start in starts]
    return {"input_ids": blocks, "labels": blocks}
