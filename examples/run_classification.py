# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
r"""
Fine-tunes a model for text classification, with `Trainer` of Transformers.

    python examples/run_classification.py --model_name_or_path runs/quickstart/peer-toy --do_train --do_eval \
        --output_dir runs/classification --max_steps 300 --per_device_train_batch_size 16 --learning_rate 5e-4

Texts and labels come from --dataset_name, or from --train_file and --validation_file, csv or json. Without these flags
the task is to predict which package of the Python standard library a few lines of code come from. Without
--model_name_or_path a new model is trained on this task alone. The accuracy is in `all_results.json`.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from common.command_line import UsageError, ends_on_usage_error, parse_arguments
from common.model_arguments import ModelArguments, check_output_dir, load_config, load_model, load_tokenizer
from common.text_data import DatasetArguments, load_datasets, take_samples, text_column
from common.training import (
    ExampleTrainingArguments,
    OptimizerArguments,
    check_has_model,
    last_checkpoint,
    make_optimizers,
    needed_splits,
    run,
    setup_logging,
)


logger = logging.getLogger(__name__)

# The default task: a snippet of `SNIPPET_LINES` lines comes from one of these packages.
PACKAGES = (
    "asyncio",
    "ctypes",
    "email",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "tkinter",
    "unittest",
    "xml",
)
SNIPPET_LINES = 8


@dataclass
class ClassifierArguments(ModelArguments):
    """Which classifier to train, or which model to turn into one."""

    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Replace the output layer of a classifier of another number of labels by a new one."},
    )


@dataclass
class DataTrainingArguments(DatasetArguments):
    """Which texts and labels to read."""

    label_column_name: str = field(default="label", metadata={"help": "Column that holds the label."})
    max_seq_length: int = field(
        default=128, metadata={"help": "Maximum number of tokens per text; longer texts are truncated."}
    )
    validation_split_percentage: int = field(
        default=20, metadata={"help": "Percentage of the training set to hold out if there is no validation set."}
    )


def load_labeled_datasets(args: DataTrainingArguments) -> DatasetDict:
    """Loads the training set and the held-out set, of which each row has a text and a label."""
    datasets = load_datasets(args)
    if args.dataset_name is None and args.train_file is None and args.validation_file is None:
        columns = datasets["train"].column_names
        datasets = datasets.map(_cut_snippets, batched=True, remove_columns=columns, desc="Cutting snippets")
    for split, dataset in datasets.items():
        if args.label_column_name not in dataset.column_names:
            raise UsageError(
                f"The {split} set has no column {args.label_column_name!r}: choose another --label_column_name of "
                f"{dataset.column_names}."
            )
        args.text_column_name = text_column(dataset.remove_columns(args.label_column_name), args)
        columns = [args.text_column_name, args.label_column_name]
        datasets[split] = dataset.filter(_is_complete, input_columns=columns, desc="Looking for labels")
        if left_out := len(dataset) - len(datasets[split]):
            logger.warning(f"Left out: {left_out} rows of the {split} set, which have no text or no label.")
    return datasets


def _is_complete(text: str | None, label: Any) -> bool:
    return text is not None and label not in (None, "", -1)  # in a `ClassLabel`, -1 is none


def _cut_snippets(files: dict[str, list[str]]) -> dict[str, list[str]]:
    snippets, packages = [], []
    for name, text in zip(files["file"], files["text"], strict=True):
        package = name.split("/")[0]
        if package in PACKAGES:
            lines = text.splitlines(keepends=True)
            cut = ["".join(lines[i : i + SNIPPET_LINES]) for i in range(0, len(lines), SNIPPET_LINES)]
            snippets += cut
            packages += [package] * len(cut)
    return {"text": snippets, "label": packages}


def label_names(datasets: Iterable[Dataset], column: str) -> dict[str, str]:
    """The name of each label in the column, both as strings, in the order of the outputs of a new classifier."""
    datasets = list(datasets)
    feature = datasets[0].features[column]
    if isinstance(feature, ClassLabel):
        return {str(i): name for i, name in enumerate(feature.names)}
    labels = sorted({str(label) for dataset in datasets for label in dataset.unique(column)})
    return dict(zip(labels, labels, strict=True))


def load_labeled_config(args: ClassifierArguments, names: Iterable[str], is_trained: bool) -> PreTrainedConfig:
    """
    Loads the configuration of a classifier. A checkpoint that knows all labels keeps its label ids.

    Args:
        args (`ClassifierArguments`): Arguments with the model.
        names (`Iterable[str]`): Names of the labels of the data, in the order of the outputs of a new classifier.
        is_trained (`bool`): Whether the model is trained on these labels.

    Raises:
        `UsageError`: if the model does not know all labels and is not trained, or is a classifier of another number of
            labels whose output layer is not to be replaced.
    """
    config, names = load_config(args), list(names)
    known = list(config.id2label.values())
    if args.is_new or not set(names) <= set(known):
        if not is_trained:
            raise UsageError(
                f"The labels of the data must be some of those of the model, {known}, but they are {names}: choose "
                "other data or another model, or train this one on these labels, --do_train."
            )
        is_classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
        if is_classifier and len(names) != len(known) and not args.ignore_mismatched_sizes:
            raise UsageError(
                f"The model tells {len(known)} labels apart, {known}, but those of the data are {len(names)}, {names}: "
                "replace its output layer by a new one, --ignore_mismatched_sizes, or choose another model."
            )
        config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in config.id2label.items()}
    return config


def encode_datasets(
    datasets: dict[str, Dataset],
    args: DataTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    label_ids: dict[str, int],
    max_length: int,
) -> dict[str, Dataset]:
    """
    Tokenizes texts and converts labels to label ids, for the requested number of samples.

    Args:
        datasets (`dict[str, Dataset]`): Training set, held-out set, or both.
        args (`DataTrainingArguments`): Arguments with the columns and the numbers of samples.
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer of the model.
        label_ids (`dict[str, int]`): Label id of each value of the column of labels.
        max_length (`int`): Maximum number of tokens per text.
    """
    numbers = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    return {
        split: take_samples(dataset, numbers[split]).map(
            _encode,
            batched=True,
            num_proc=args.preprocessing_num_workers,
            load_from_cache_file=not args.overwrite_cache,
            remove_columns=dataset.column_names,
            fn_kwargs={
                "tokenizer": tokenizer,
                "columns": (text_column(dataset, args), args.label_column_name),
                "label_ids": label_ids,
                "max_length": max_length,
            },
            desc="Tokenizing",
        )
        for split, dataset in datasets.items()
    }


def _encode(
    rows: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    columns: tuple[str, str],
    label_ids: dict[str, int],
    max_length: int,
) -> dict[str, list[Any]]:
    text_column_name, label_column_name = columns
    encoded = tokenizer(rows[text_column_name], truncation=True, max_length=max_length)
    return {**encoded, "labels": [label_ids[str(label)] for label in rows[label_column_name]]}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Returns the share of texts whose label has the highest score."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


@ends_on_usage_error()
def main():
    model_args, data_args, training_args, optimizer_args = parse_arguments(
        (ClassifierArguments, DataTrainingArguments, ExampleTrainingArguments, OptimizerArguments), __doc__
    )
    setup_logging(training_args)
    set_seed(training_args.seed)
    check_has_model(training_args, model_args.is_new)
    if training_args.do_train:
        check_output_dir(training_args.output_dir, model_args.model_name_or_path)
    checkpoint = last_checkpoint(training_args)
    with training_args.main_process_first(desc="loading the texts"):
        datasets = load_labeled_datasets(data_args)
    names = label_names(datasets.values(), data_args.label_column_name)
    config = load_labeled_config(model_args, names.values(), training_args.do_train)
    label_ids = {value: config.label2id[name] for value, name in names.items()}
    tokenizer = load_tokenizer(model_args, data_args, config, datasets.get("train"), checkpoint)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    splits = {split: datasets[split] for split in needed_splits(datasets, training_args)}
    max_length = min(data_args.max_seq_length, config.max_position_embeddings)
    with training_args.main_process_first(desc="tokenizing the texts"):
        encoded = encode_datasets(splits, data_args, tokenizer, label_ids, max_length)
    options = {"ignore_mismatched_sizes": model_args.ignore_mismatched_sizes}
    model = load_model(AutoModelForSequenceClassification, model_args, config, tokenizer, checkpoint_options=options)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=encoded.get("train"),
        eval_dataset=encoded.get("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        optimizers=make_optimizers(optimizer_args, training_args, model, model_args.is_new),
    )
    run(trainer, checkpoint, tasks="text-classification", dataset=data_args.dataset_name, data=data_args.description)


if __name__ == "__main__":
    main()
