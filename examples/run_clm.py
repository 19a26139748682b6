# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
r"""
Trains a language model from a named configuration or from a checkpoint, with `Trainer` of Transformers.

    python examples/run_clm.py --config_name peer-toy --do_train --do_eval --output_dir runs/peer-toy \
        --block_size 256 --per_device_train_batch_size 16 --max_steps 1000 --learning_rate 2e-3 \
        --lr_scheduler_type cosine --warmup_steps 0.1

    configuration/launch/memory_group.sh examples/run_clm.py --config_name peer-toy --do_train \
        --output_dir runs/memory-group

The text is the Python standard library unless --dataset_name or --train_file gives another. A tokenizer for a new
model is trained on its text and saved with it. An interrupted run resumes from the last checkpoint in --output_dir.
The results, including the held-out perplexity, are in `all_results.json` there, and a plot of the losses in
`losses.png`. With --ep_size, which the launch file gives, expert tables are split over groups of processes.
"""

import logging
import math
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset, IterableDataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from common.command_line import UsageError, ends_on_usage_error, parse_arguments
from common.model_arguments import (
    DistributedArguments,
    ModelArguments,
    load_config,
    load_model,
    load_tokenizer,
    num_held_parameters,
)
from common.text_data import DataTrainingArguments, load_datasets, take_samples, tokenize_into_blocks
from common.text_files import errors_name_the_file
from common.training import (
    OptimizerArguments,
    PretrainingArguments,
    check_has_model,
    evaluate,
    last_checkpoint,
    make_optimizers,
    needed_splits,
    run,
    setup_logging,
)
from modeling_peer import ExpertUsageCallback, PeerConfig, PeerForCausalLM, SplitCheckpointCallback
from modeling_peer.parallel.split_checkpoint_callback import PARTS


logger = logging.getLogger(__name__)

# Blocks of a stream that are shuffled at a time.
SHUFFLED_BLOCKS = 1000

# What --help shows.
MAIN_FLAGS = (
    *("config_name", "config_overrides", "model_name_or_path", "tokenizer_name"),
    *("train_file", "validation_file", "dataset_name", "text_column_name", "streaming", "block_size"),
    *("do_train", "do_eval", "output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size"),
    *("learning_rate", "logging_steps", "eval_strategy", "eval_steps", "save_steps", "bf16", "report_to"),
)


def load_text(
    model_args: ModelArguments,
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    config: PreTrainedConfig,
    checkpoint: str | None = None,
) -> tuple[PreTrainedTokenizerBase, dict[str, Dataset]]:
    """
    Loads or trains the tokenizer, and cuts the text into blocks of tokens to train and to evaluate on.
    """
    with training_args.main_process_first(desc="loading the text"):
        datasets = load_datasets(data_args, data_args.streaming)
    splits = needed_splits(datasets, training_args)
    tokenizer = load_tokenizer(model_args, data_args, config, datasets.get("train"), checkpoint)
    block_size = choose_block_size(data_args, config)
    numbers = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    with training_args.main_process_first(desc="tokenizing the text"):
        blocks = {
            split: take_samples(
                tokenize_into_blocks(datasets[split], tokenizer, block_size, data_args), numbers[split]
            )
            for split in splits
        }
    if isinstance(blocks.get("train"), IterableDataset):
        if training_args.max_steps <= 0:
            raise UsageError("The length of a stream is not known: say how long to train, --max_steps.")
        # A `Trainer` shuffles only what has a length.
        blocks["train"] = blocks["train"].shuffle(seed=training_args.seed, buffer_size=SHUFFLED_BLOCKS)
    return tokenizer, blocks


def choose_block_size(data_args: DataTrainingArguments, config: PreTrainedConfig) -> int:
    """
    The requested block size, or a default. Raises `UsageError` if it exceeds `max_position_embeddings` of the model.
    """
    longest = config.max_position_embeddings
    block_size = data_args.block_size or min(longest, 1024)
    if block_size > longest:
        raise UsageError(
            f"--block_size {block_size} exceeds `max_position_embeddings` of the model, {longest}: choose a smaller "
            f"one, or --config_overrides max_position_embeddings={block_size}."
        )
    return block_size


def make_trainer(
    model_args: ModelArguments,
    training_args: TrainingArguments,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    blocks: dict[str, Dataset],
    optimizer_args: OptimizerArguments | None = None,
    distributed_args: DistributedArguments | None = None,
    checkpoint: str | None = None,
) -> Trainer:
    """
    Make the `Trainer` of a new model or of a checkpoint. If `checkpoint`, from which training resumes, has its
    optimizer in parts, the trainer loads these parts and saves its own optimizer in parts too.
    """
    set_seed(training_args.seed)
    distributed_config = (distributed_args or DistributedArguments()).make_config(training_args, config)
    # This class draws the same weights for any number of processes that split the model; Auto classes do not.
    model_class = PeerForCausalLM if isinstance(config, PeerConfig) else AutoModelForCausalLM
    model = load_model(model_class, model_args, config, tokenizer, distributed_config)
    logger.info(
        f"A model of {model.num_parameters():,} parameters, {num_held_parameters(model):,} of them in this process, a "
        f"tokenizer of {len(tokenizer):,} tokens"
    )
    callbacks = []
    if distributed_config is not None or (checkpoint is not None and Path(checkpoint, PARTS).is_dir()):
        # `Trainer` cannot save an optimizer of which it has only a part, and does not find one saved in parts.
        training_args.save_only_model = True
        callbacks.append(SplitCheckpointCallback(checkpoint))
    return Trainer(
        model=model,
        args=training_args,
        train_dataset=blocks.get("train"),
        eval_dataset=blocks.get("validation"),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=callbacks,
        optimizers=make_optimizers(optimizer_args or OptimizerArguments(), training_args, model, model_args.is_new),
    )


def evaluate_perplexity(trainer: Trainer, usage: ExpertUsageCallback) -> dict[str, float]:
    """Returns metrics of the held-out set, with the perplexity computed without the balance loss of a MoE."""
    config = trainer.model.config
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if coefficient is not None:
        config.router_aux_loss_coef = 0.0
    metrics = evaluate(trainer, usage)
    if coefficient is not None:
        config.router_aux_loss_coef = coefficient
    try:
        metrics["perplexity"] = math.exp(metrics["eval_loss"])
    except OverflowError:
        metrics["perplexity"] = math.inf
    return metrics


def main(change: Callable[[Trainer], None] | None = None):
    """Train or evaluate by flags. Before training, calls `change` with the trainer, for changes that no flag makes."""
    model_args, data_args, training_args, optimizer_args, distributed_args = parse_arguments(
        (ModelArguments, DataTrainingArguments, PretrainingArguments, OptimizerArguments, DistributedArguments),
        __doc__,
        MAIN_FLAGS,
    )
    setup_logging(training_args)
    with ends_on_usage_error(), errors_name_the_file(data_args.files, data_args.encoding):
        check_has_model(training_args, model_args.is_new)
        checkpoint = last_checkpoint(training_args)
        config = load_config(model_args)
        training_args.set_learning_rate(config, model_args.is_new)
        tokenizer, blocks = load_text(model_args, data_args, training_args, config, checkpoint)
        trainer = make_trainer(
            model_args, training_args, config, tokenizer, blocks, optimizer_args, distributed_args, checkpoint
        )
        if change is not None:
            change(trainer)
        run(
            trainer,
            checkpoint,
            evaluate_perplexity,
            tasks="text-generation",
            dataset=data_args.dataset_name,
            data=data_args.description,
            next_command="./run python examples/run_generation.py --model_name_or_path {folder} --prompt 'The '",
        )


if __name__ == "__main__":
    main()
