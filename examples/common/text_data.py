# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Text for the examples: loading it, training a tokenizer on it, and cutting it into blocks of tokens.

Without flags the text is the source code of the standard library of the running Python, so that every example works
without a network. `--dataset_name` takes any dataset of the Hugging Face Hub, `--train_file` and `--validation_file`
take local files.
"""

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from glob import has_magic
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.command_line import UsageError
from common.library_sources import byte_level_tokenizer, library_files, read_source
from common.text_files import ENDS, Part, joined, load_parts, with_ends


logger = logging.getLogger(__name__)

# Characters to train a tokenizer on: more text changes the vocabulary little and takes minutes.
TOKENIZER_CHARACTERS = 50_000_000


@dataclass
class DatasetArguments:
    """Which dataset to read. Defaults to the source code of the Python standard library."""

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset of the Hub by its id, or a folder."})
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset, if it has several."}
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files to train on, folders, or patterns such as 'notes/**/*.md': csv, json, jsonl and parquet with "
            "a row for each text, or files of text, Markdown for example, each of which is one."
        },
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Files of the same kind to evaluate on, folders, or patterns."}
    )
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Percentage of the training set to hold out if there is no validation set."}
    )
    text_column_name: str | None = field(
        default=None,
        metadata={"help": "Column that holds the text. Defaults to `text`, or else to the first column of text."},
    )
    encoding: str = field(default="utf-8", metadata={"help": "Encoding of files of text, csv and json."})
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

    # Whether the beginnings of texts are held out where there are too few texts to hold out whole ones.
    holds_out_beginnings: ClassVar[bool] = False

    def __post_init__(self):
        # A file of arguments in JSON may name a single file by a string.
        for name in ("train_file", "validation_file"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        if self.dataset_name is not None and (self.train_file or self.validation_file):
            raise UsageError("Choose one source of data: --dataset_name, or --train_file and --validation_file.")
        if not 0 <= self.validation_split_percentage < 100:
            raise UsageError(
                f"--validation_split_percentage must be from 0 to 99, got {self.validation_split_percentage}."
            )

    @property
    def files(self) -> list[str]:
        """The files, folders and patterns that are named."""
        return [*(self.train_file or []), *(self.validation_file or [])]

    @property
    def description(self) -> str:
        """A description of the training set, without local paths."""
        if self.dataset_name is not None:
            name = Path(self.dataset_name).name if Path(self.dataset_name).exists() else self.dataset_name
            return " ".join(filter(None, [name, self.dataset_config_name]))
        if self.train_file:
            return "files of " + ", ".join(map(_without_place, self.train_file))
        return f"the source code of the standard library of Python {sys.version_info[0]}.{sys.version_info[1]}"


def _without_place(name):
    """The name of a file or folder. Of a pattern, as code in Markdown, all from the folder before a wildcard on."""
    parts = Path(name).parts
    first = next((index for index, part in enumerate(parts) if has_magic(part)), None)
    if first is None or Path(name).exists():
        return Path(name).name
    return f"`{'/'.join(part for part in parts[max(first - 1, 0) :] if part != '/')}`"


@dataclass
class DataTrainingArguments(DatasetArguments):
    """Which text to read, and the length of its blocks."""

    block_size: int | None = field(
        default=None,
        metadata={"help": "Tokens per sequence. Defaults to `max_position_embeddings` of the model, at most 1024."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the dataset during training, instead of downloading or converting it first."},
    )

    holds_out_beginnings: ClassVar[bool] = True


def load_datasets(args: DatasetArguments, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """
    Loads the training set (`"train"`) and the held-out set (`"validation"`) that the arguments name.

    If the source has no validation set, `validation_split_percentage` of its training set is held out: whole files of
    the standard library; otherwise evenly spaced rows, where a text file is a row. Of a text file above 4 MiB, the
    first lines are held out (of a stream, runs of lines); of too few other texts, the beginning of each.
    """
    if args.dataset_name is not None:
        try:
            datasets = load_dataset(args.dataset_name, args.dataset_config_name, streaming=streaming)
        except (OSError, ValueError) as error:
            raise UsageError(f"--dataset_name {args.dataset_name} cannot be loaded: {error}") from error
        if "train" not in datasets or "validation" in datasets or not args.validation_split_percentage:
            return datasets
        parts = [Part(datasets["train"], None if streaming else len(datasets["train"]))]
        datasets["train"], datasets["validation"] = _hold_out(parts, args)
        return datasets
    if not args.train_file and not args.validation_file:
        return standard_library(args.validation_split_percentage)
    named = {"train": args.train_file, "validation": args.validation_file}
    parts = {split: load_parts(names, args.encoding, streaming) for split, names in named.items() if names}
    datasets = {split: joined([part.dataset for part in found]) for split, found in parts.items()}
    if "validation" not in datasets and args.validation_split_percentage:
        datasets["train"], datasets["validation"] = _hold_out(parts["train"], args)
    return IterableDatasetDict(datasets) if streaming else DatasetDict(datasets)


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
            if names
        }
    )


def _read_sources(root: str, names: tuple[str, ...], version: str) -> Iterator[dict[str, str]]:
    for name in names:
        yield {"file": name, "text": read_source(Path(root, name))}


def _hold_out(parts, args):
    """Splits the parts of a dataset into a training set and a validation set."""
    held_out = [_hold_out_of_part(part, args) for part in parts]
    train, validation = zip(*held_out, strict=True)
    return joined(list(train)), joined(list(validation))


def _hold_out_of_part(part, args):
    percentage, dataset = args.validation_split_percentage, part.dataset
    is_small = part.num_rows is not None and part.num_rows * percentage < 100
    if args.holds_out_beginnings and is_small and not part.are_lines:
        column = text_column(dataset, args)
        desc = {"desc": "Holding out the beginnings of texts"} if isinstance(dataset, Dataset) else {}
        return tuple(
            with_ends(
                dataset.map(_cut, fn_kwargs={"column": column, "percentage": percentage, "begins": begins}, **desc),
                ends,
            )
            for begins, ends in ((False, True), (True, False))
        )
    if isinstance(dataset, Dataset):
        size = len(dataset) * percentage // 100
        held_out = list(range(size)) if part.are_lines else _evenly_spaced(len(dataset), size)
        kept = sorted(set(range(len(dataset))).difference(held_out))
        return dataset.select(kept), dataset.select(held_out)
    rule = _is_held_out_line if part.are_lines else _is_held_out_row
    return tuple(
        dataset.filter(
            _is_in_split,
            with_indices=True,
            fn_kwargs={"rule": rule, "percentage": percentage, "is_held_out": is_held_out},
        )
        for is_held_out in (False, True)
    )


def _cut(row, column, percentage, begins):
    """The beginning of a text if `begins`, or else the rest. The cut is at the end of a line, or else of a word."""
    text = row[column] or ""
    start = len(text) * percentage // 100
    cut = text.find("\n", start) + 1 or text.find(" ", start) + 1
    return {column: text[:cut] if begins else text[cut:]}


def _is_in_split(row, index, rule, percentage, is_held_out):
    return rule(index, percentage) == is_held_out


def _is_held_out_row(index, percentage):
    return index * percentage % 100 < percentage


def _is_held_out_line(index, percentage):
    """Whether a line is held out. Runs of lines are, since a line is predicted from the lines before it."""
    return index % 1000 < 10 * percentage


def _evenly_spaced(length, number):
    return [i * length // number for i in range(number)]


def text_column(dataset: Dataset | IterableDataset, args: DatasetArguments) -> str:
    """
    The name of the column that holds the text: the one that the arguments name, or else `text`, or else the first one
    that holds text.
    """
    are_texts = _are_texts(dataset)
    texts = [name for name, is_text in are_texts.items() if is_text]
    name = args.text_column_name or ("text" if "text" in texts else next(iter(texts), None))
    if name not in texts:
        found = "does not hold text" if name in are_texts else "does not exist"
        problem = "No column holds text" if name is None else f"The column {name!r} {found}"
        raise UsageError(
            f"{problem}, the columns are {list(are_texts)}: choose another --text_column_name of {texts}."
        )
    return name


def _are_texts(dataset):
    """Whether each column of a dataset holds text."""
    if dataset.features is None:
        return {name: isinstance(value, str) for name, value in next(iter(dataset)).items()}
    dtypes = {name: getattr(feature, "dtype", None) for name, feature in dataset.features.items()}
    return {name: dtype in ("string", "large_string") for name, dtype in dtypes.items()}


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
        texts = [text or "" for text in batch[column]]
        yield texts
        characters += sum(map(len, texts))
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
    follows each text; the remainder of every thousand texts, or ten thousand lines, is dropped.
    """
    if tokenizer.eos_token_id is None:
        logger.warning("The tokenizer has no end-of-text token (`eos_token`): the model cannot learn where texts end.")
    columns = dataset.column_names or list(next(iter(dataset)))
    options = {
        "batched": True,
        "batch_size": 10_000 if ENDS in columns else 1000,
        "remove_columns": columns,
        "fn_kwargs": {"column": text_column(dataset, args), "tokenizer": tokenizer, "block_size": block_size},
    }
    if isinstance(dataset, Dataset):
        options |= {
            "num_proc": args.preprocessing_num_workers,
            "load_from_cache_file": not args.overwrite_cache,
            "desc": f"Tokenizing into blocks of {block_size}",
        }
    blocks = dataset.map(_blocks_of, **options)
    if isinstance(blocks, Dataset) and not len(blocks):
        raise UsageError(
            f"{len(dataset)} texts do not fill a block of {block_size} tokens: choose a smaller --block_size, more text "
            "or, if these are the held-out ones, a larger --validation_split_percentage."
        )
    return blocks


def _blocks_of(
    rows: dict[str, list[Any]], column: str, tokenizer: PreTrainedTokenizerBase, block_size: int
) -> dict[str, list[list[int]]]:
    are_whole = ENDS not in rows
    texts = tokenizer(
        [text or "" for text in rows[column]],
        add_special_tokens=are_whole,
        return_attention_mask=False,
        verbose=False,
    ).input_ids
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ends = [True] * len(texts) if are_whole else rows[ENDS]
    tokens = list(
        chain.from_iterable(
            # Some tokenizers append the token themselves, and some texts have it.
            text + end if is_end and text[-1:] != end else text
            for text, is_end in zip(texts, ends, strict=True)
        )
    )
    starts = range(0, len(tokens) - block_size + 1, block_size)
    blocks = [tokens[start : start + block_size] for start in starts]
    return {"input_ids": blocks, "labels": blocks}
