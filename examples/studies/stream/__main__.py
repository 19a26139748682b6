# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Measures continual learning of a stream of texts: a small PEER model and its dense twin learn four texts one after the
other, in ten ways, and forgetting is compared at equal learning.

    ./run study stream

Both models are pre-trained first, on technical documentation. Hyperparameters are chosen by the losses of one part of
the held-out text, and the losses of the other part are reported. After an interruption, the same command resumes. Each
run is a file in --output_dir; `results.json` and `results.png` there sum them up.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, default_data_collator, set_seed
from transformers.utils import logging

from common.command_line import parse_arguments
from common.evaluation import held_out_loss
from common.model_arguments import ModelArguments, load_config
from common.text_data import DataTrainingArguments, text_column, tokenize_into_blocks, train_tokenizer
from common.training import OptimizerArguments, has_finished, make_optimizers
from modeling_peer import PeerForCausalLM, last_complete_checkpoint, masked_experts
from studies.common.corpora import load_corpus, split_documents
from studies.common.study_folder import claim_folder, read_json, sole_use, write_json
from studies.stream.arms import ARMS, Arm, Stage
from studies.stream.report import choose_hyperparameters, describe, describe_shares, plot, rates_beyond, summarize


# The models that are pre-trained, by the `base` of arms: a named configuration, changes of its fields, and training
# arguments in addition to those of `PRETRAINING`.
BASES = {
    name: {"configuration": "peer-tiny", "fields": {"feed_forward_types": feed_forward_types}, "training": {}}
    for name, feed_forward_types in (("peer", ["dense", "dense", "peer", "peer"]), ("dense", ["dense"] * 4))
}

PRETRAINING = {
    "per_device_train_batch_size": 16,
    "learning_rate": 2e-3,
    "weight_decay": 0.01,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 100,
    "expert_lr_multiplier": 1.0,
    "down_proj_lr_multiplier": 1.0,
    "save_steps": 200,
    "save_total_limit": 1,
    "logging_steps": 50,
    "disable_tqdm": False,
    "report_to": [],
    "log_level": "error",
    "dataloader_pin_memory": False,
}


@dataclass
class StreamArguments:
    """Which texts are learned, in which order, and for how long."""

    output_dir: str = field(default="runs/stream", metadata={"help": "Output folder."})
    pretraining_texts: list[str] = field(
        default_factory=lambda: ["python-docs", "linux-docs"],
        metadata={"help": "Texts to pre-train on, by their names in studies/common/corpora.py or ids of the Hub."},
    )
    stream: list[str] = field(
        default_factory=lambda: ["handbook-german", "perl-docs", "prose", "brown"],
        metadata={"help": "Texts to learn after the pre-training, in this order."},
    )
    base: str | None = field(
        default=None,
        metadata={
            "help": "JSON file with the PEER model to pre-train: the name of its `configuration`, `fields` of it to "
            "change, and arguments of its `training`, as those of run_clm.py. The dense twin stays as it is."
        },
    )
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": "Arms to run."})
    pretraining_steps: int = field(default=1500, metadata={"help": "Pre-training steps, of 4,096 tokens each."})
    stage_steps: int = field(
        default=100, metadata={"help": "Training steps on each text of the stream, of 2,048 tokens each."}
    )
    block_size: int = field(default=256, metadata={"help": "Tokens per sequence."})
    eval_sequences: int = field(default=40, metadata={"help": "Held-out sequences per text, of each part."})
    seeds: int = field(
        default=3, metadata={"help": "Number of seeds for the chosen hyperparameters of each arm. All others get one."}
    )

    def __post_init__(self):
        if unknown := set(self.arms) - set(ARMS):
            raise ValueError(f"--arms must be some of {list(ARMS)}, got {sorted(unknown)} among them.")


@dataclass
class Texts:
    """
    The texts of the study in blocks of tokens; the first text is that of the pre-training.

    Args:
        names (`list[str]`)
        train (`list[Dataset]`)
        held_out (`list[torch.Tensor]`): Held-out sequences of each text, whose losses are reported.
        to_choose_by (`list[torch.Tensor]`): Sequences of other held-out documents, for choosing hyperparameters.
    """

    names: list[str]
    train: list[Dataset]
    held_out: list[torch.Tensor]
    to_choose_by: list[torch.Tensor]


def load_divided(name: str) -> dict[str, Dataset]:
    """Loads a text by name, with its held-out documents divided into those `to_choose_by` and those `held_out`."""
    corpus = load_corpus(name)
    column = text_column(corpus["validation"], DataTrainingArguments())
    to_choose_by, held_out = split_documents(corpus["validation"], column)
    return {"train": corpus["train"], "to_choose_by": to_choose_by, "held_out": held_out}


def load_texts(args: StreamArguments, folder: Path) -> tuple[AutoTokenizer, Texts]:
    """Loads all texts, and trains the tokenizer on the text of the pre-training."""
    parts = [load_divided(name) for name in args.pretraining_texts]
    base = {split: concatenate_datasets([part[split] for part in parts]) for split in parts[0]}
    if not (folder / "tokenizer").exists():
        train_tokenizer(base["train"], "text", 4096, 512).save_pretrained(folder / "tokenizer-unfinished")
        (folder / "tokenizer-unfinished").rename(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    texts = Texts(["pre-training", *args.stream], [], [], [])
    options = DataTrainingArguments()
    for corpus in [base, *map(load_divided, args.stream)]:
        blocks = {
            split: tokenize_into_blocks(documents, tokenizer, args.block_size, options).shuffle(seed=0)
            for split, documents in corpus.items()
        }
        texts.train.append(blocks["train"])
        for held_out, split in ((texts.held_out, "held_out"), (texts.to_choose_by, "to_choose_by")):
            sequences = blocks[split].select(range(min(args.eval_sequences, len(blocks[split]))))
            held_out.append(torch.tensor(sequences["input_ids"]))
    return tokenizer, texts


def load_base(file: str | None) -> dict[str, Any]:
    """
    The PEER model to pre-train, as an entry of `BASES`, from a file or by default. Raises `ValueError` if the file has
    other keys, or names a configuration, a field or an argument that does not exist.
    """
    if file is None:
        return BASES["peer"]
    base = {"fields": {}, "training": {}, **read_json(Path(file))}
    if base.keys() != BASES["peer"].keys():
        raise ValueError(
            f"--base {file} must have a `configuration`, and may have `fields` and `training`, got {sorted(base)}."
        )
    try:
        load_config(ModelArguments(config_name=base["configuration"]), **base["fields"])
        parse_training(base, output_dir=".")
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"--base {file} cannot be used: {error}") from error
    return base


def parse_training(base: dict[str, Any], **arguments: Any) -> tuple[TrainingArguments, OptimizerArguments]:
    """The arguments of a base's pre-training: those of `PRETRAINING`, and its own from `BASES`."""
    parser = HfArgumentParser((TrainingArguments, OptimizerArguments))
    return parser.parse_dict(arguments | PRETRAINING | base["training"])


def pretrain(
    name: str, base: dict[str, Any], args: StreamArguments, tokenizer: AutoTokenizer, texts: Texts, folder: Path
) -> None:
    """Pre-trains the model of a base, see [`BASES`], once. An interrupted pre-training is resumed."""
    if (folder / name / "config.json").exists():
        return
    config = load_config(ModelArguments(config_name=base["configuration"]), **base["fields"])
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    set_seed(0)
    model = PeerForCausalLM(config)
    output_dir = str(folder / f"{name}-training")
    arguments, optimizer = parse_training(base, output_dir=output_dir, max_steps=args.pretraining_steps)
    checkpoint = last_complete_checkpoint(output_dir)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=texts.train[0],
        data_collator=default_data_collator,
        optimizers=make_optimizers(optimizer, arguments, model, is_new=True),
    )
    if checkpoint is not None and has_finished(checkpoint, arguments):  # it was killed before it saved the model
        trainer.model = PeerForCausalLM.from_pretrained(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(folder / f"{name}-unfinished"))
    (folder / f"{name}-unfinished").rename(folder / name)


def losses(model: nn.Module, held_out: list[torch.Tensor]) -> list[float]:
    """Returns the loss of the held-out sequences of each text, in nats per token."""
    return [held_out_loss(model, sequences, progress_bar=False) for sequences in held_out]


def run(
    name: str,
    hyperparameters: dict[str, float],
    seed: int,
    args: StreamArguments,
    texts: Texts,
    folder: Path,
) -> dict:
    """Runs one arm through the stream, or reads the result of an earlier run."""
    settings = [f"{key}={value:g}" for key, value in hyperparameters.items()]
    file = folder / "stages" / ("-".join([name, *settings, f"seed={seed}"]) + ".json")
    if not file.exists():
        start = time.time()
        result = take_through_stream(ARMS[name], hyperparameters, seed, args, texts, folder)
        label = {"arm": name, "settings": hyperparameters, "seed": seed}
        write_json(file, {**label, **result, "seconds": time.time() - start})
    return read_json(file)


def take_through_stream(
    arm: Arm, hyperparameters: dict[str, float], seed: int, args: StreamArguments, texts: Texts, folder: Path
) -> dict:
    """
    Teach a model all texts of the stream by an arm. Returns the `losses` of all texts at first and after each stage,
    those for choosing hyperparameters (`losses_to_choose_by`), and those with added experts `masked`.
    """
    set_seed(seed)
    model = PeerForCausalLM.from_pretrained(folder / arm.base)
    result: dict[str, list] = {"losses": [], "losses_to_choose_by": [], "masked": []}

    def measure():
        result["losses"].append(losses(model, texts.held_out))
        result["losses_to_choose_by"].append(losses(model, texts.to_choose_by))

    measure()
    for i in range(1, len(texts.names)):
        stage = Stage(
            texts.train[i].shuffle(seed=seed),
            texts.train[:i],
            args.stage_steps,
            8,
            folder / "trainer",
            seed,
        )
        model = arm.learn(model, stage, hyperparameters)
        measure()
        if getattr(model.config, "expert_additions", None):
            with masked_experts(model):
                result["masked"].append(losses(model, texts.held_out))
    return result


def run_all(
    arms: dict[str, Arm], seeds: int, run: Callable[[str, dict[str, float], int], dict[str, Any]]
) -> tuple[list[dict[str, Any]], float, dict[str, dict[str, float]]]:
    """
    Sweeps the hyperparameters of all arms with one seed, and runs the chosen ones of each arm with several. The choice
    may fall on values that were not swept: these are run with the first seed, and the choice is repeated with them.
    Returns all runs, the level of learning at which arms are compared, and the chosen hyperparameters of each arm.
    """
    tried = [(name, hyperparameters) for name, arm in arms.items() for hyperparameters in arm.sweep]
    runs = [run(*each, 0) for each in tqdm(tried, desc="Sweep")]
    while further := rates_beyond(runs):
        runs += [run(*each, 0) for each in tqdm(further, desc="Beyond the sweep")]
        tried = tried + further
    level, chosen = choose_hyperparameters(runs)
    while untried := [(name, chosen[name]) for name in arms if (name, chosen[name]) not in tried]:
        runs += [run(*each, 0) for each in tqdm(untried, desc="Chosen hyperparameters")]
        tried = tried + untried
        level, chosen = choose_hyperparameters(runs)
    repeated = [(name, hyperparameters, seed) for seed in range(1, seeds) for name, hyperparameters in chosen.items()]
    return runs + [run(*each) for each in tqdm(repeated, desc="Seeds")], level, chosen


def main():
    (args,) = parse_arguments((StreamArguments,), __doc__)
    arms = {name: ARMS[name] for name in args.arms}
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(args.output_dir)
    bases = {**BASES, "peer": load_base(args.base)}
    arguments = {**vars(args), "base": bases["peer"]}
    with sole_use(folder):
        make_study(args, arms, bases, arguments, folder)


def make_study(
    args: StreamArguments,
    arms: dict[str, Arm],
    bases: dict[str, dict[str, Any]],
    arguments: dict[str, Any],
    folder: Path,
) -> None:
    """Make all runs in the folder of a study, and sum them up. Ends the process if it has other `arguments`."""
    claim_folder(folder, arguments)
    print("Reading the texts ...")
    tokenizer, texts = load_texts(args, folder)
    for name in dict.fromkeys(arm.base for arm in arms.values()):
        print(f"Pre-training the {name} model ...")
        pretrain(name, bases[name], args, tokenizer, texts, folder)
    runs, level, chosen = run_all(arms, args.seeds, lambda *each: run(*each, args, texts, folder))
    summary = summarize(runs, texts.names, level, chosen, arguments)
    write_json(folder / "results.json", summary)
    plot(summary, folder / "results.png")
    print("", describe_shares(summary), describe(summary), f"In {folder}: results.json, results.png", sep="\n\n")


if __name__ == "__main__":
    main()
