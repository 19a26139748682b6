# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Trains dense-laptop, peer-laptop and a product-key memory for equal seconds on real text with six thousand invented people
among it, and asks them about these people.

    ./run study people                 # six hours on two cores
    ./run study people --hours 2.5     # begins no training after that; the same command goes on

Killed at any point, the same command resumes. Each result is a file in --output_dir; `results.json` sums them up.
"""

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from common.command_line import parse_arguments
from common.machine import machine
from common.text_data import DataTrainingArguments, tokenize_into_blocks
from studies.common.ngrams import losses_by_ngrams
from studies.common.people import draw_people
from studies.common.single_run import read_texts
from studies.common.study_folder import claim_folder, read_json, sole_use, write_json
from studies.common.training_plan import CORPUS
from studies.people.arms import ARMS, TOKENS_PER_STEP, Run, next_trial, train
from studies.people.report import describe
from studies.people.texts import TOLD, TOLD_OF_OTHERS, losses, prepare, recall


ASKED = 1000  # people, and as many others


@dataclass
class PeopleArguments:
    """How much there is to read, for how long, and where the results are saved."""

    output_dir: str = field(default="runs/people", metadata={"help": "Output folder."})
    hours: float | None = field(default=None, metadata={"help": "Hours after which no further training is begun."})
    seconds: float = field(default=5400, metadata={"help": "Seconds of training of each model."})
    trial_steps: int = field(default=400, metadata={"help": "Steps of each trial of a rate."})
    seeds: int = field(default=1, metadata={"help": "Number of seeds."})
    people: int = field(default=6000, metadata={"help": "Number of people."})
    exposures: int = field(default=24, metadata={"help": "Biographies of each person."})
    characters: int = field(default=17_000_000, metadata={"help": "Characters of real text."})
    block_size: int = field(default=1024, metadata={"help": "Tokens of a sequence."})
    held_out_sequences: int = field(default=64, metadata={"help": "Sequences of each held-out text."})


def measured(run: Run, folder: Path, args: PeopleArguments) -> dict[str, Any]:
    """
    The result of a run, which is trained and measured if it is not there: losses of held-out texts, and recall. Of a
    trial, the loss by which rates are chosen.
    """
    file = folder / "results" / f"{run.name}.json"
    if not file.exists():
        output = train(run, folder, args.block_size)
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(output),
            AutoTokenizer.from_pretrained(folder / "tokenizer"),
        )
        texts = read_texts(folder / "held_out", "cpu")
        result = {**asdict(run), "training": read_json(output / "all_results.json")}
        if run.is_trial:
            result["losses"] = losses(model, {CORPUS: texts[CORPUS]})
        else:
            told, others = draw_people(args.people, seed=0)[:ASKED], draw_people(ASKED, seed=1)
            result |= {
                "parameters": model.num_parameters(),
                "losses": losses(model, texts),
                "recall": recall(model, tokenizer, told),
                "recall as told of others": recall(model, tokenizer, told, TOLD_OF_OTHERS),
                "recall as told": recall(model, tokenizer, told, TOLD),
                "recall of others": recall(model, tokenizer, others),
            }
        write_json(file, result)
    return read_json(file)


def read_by_ngrams(folder: Path, args: PeopleArguments, tokens: int) -> dict[str, Any]:
    """What n-grams of as many tokens as the fastest arm reads predict of the second half of sequences, made once."""
    file = folder / "ngrams.json"
    if not file.exists():
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        text = Dataset.from_parquet(str(folder / "train.parquet"))
        blocks = tokenize_into_blocks(text, tokenizer, args.block_size, DataTrainingArguments()).shuffle(seed=0)
        train_blocks = np.array(blocks.select(range(min(len(blocks), tokens // args.block_size)))["input_ids"])
        texts = {name: each.numpy() for name, each in read_texts(folder / "held_out", "cpu").items()}
        # 8,192 tokens to the fifth are more than an integer holds.
        half = args.block_size // 2
        write_json(file, losses_by_ngrams(train_blocks, texts, len(tokenizer), CORPUS, order=4, first=half))
    return read_json(file)


def make_study(args: PeopleArguments, folder: Path, until: float) -> dict[str, Any] | None:
    """Makes what is missing. Returns all results, or `None` if the time did not suffice."""
    prepare(folder, args.people, args.exposures, args.characters, args.block_size, args.held_out_sequences)
    tried: dict[str, dict[Run, dict[str, Any]]] = {arm: {} for arm in ARMS}

    def trial_of(arm: str) -> Run | None:
        return next_trial(
            arm, args.trial_steps, {run: each["losses"][CORPUS]["all"] for run, each in tried[arm].items()}
        )

    # In turns, as the machine may be faster at one time than at another.
    while runs := [run for arm in ARMS if (run := trial_of(arm)) is not None]:
        for run in runs:
            if time.time() > until:
                return None
            tried[run.arm][run] = measured(run, folder, args)
    results = []
    for seed in range(args.seeds):
        for arm in sorted(ARMS, key=lambda arm: arm != "peer"):  # this arm decides whether the others are trained
            if time.time() > until:
                return None
            found = tried[arm]
            best = min(found, key=lambda run: found[run]["losses"][CORPUS]["all"])
            # Of the trial that was disturbed least by what else the machine did.
            seconds = min(result["training"]["train_runtime"] / run.steps for run, result in found.items())
            steps = max(1, round(args.seconds / seconds))
            results.append(measured(replace(best, steps=steps, seed=seed, is_trial=False), folder, args))
    return {
        "arguments": asdict(args),
        "machine": machine(),
        "trials": [result for found in tried.values() for result in found.values()],
        "runs": results,
        "ngrams": read_by_ngrams(folder, args, max(run["steps"] for run in results) * TOKENS_PER_STEP),
    }


def main():
    (args,) = parse_arguments((PeopleArguments,), __doc__)
    logging.set_verbosity_error()
    folder = Path(args.output_dir)
    until = time.time() + 3600 * (1000 if args.hours is None else args.hours)
    with sole_use(folder):
        claim_folder(folder, {name: value for name, value in vars(args).items() if name != "hours"})
        results = make_study(args, folder, until)
        if results is None:
            print("The time is up: the same command goes on.")
            return
        write_json(folder / "results.json", results)
        print(f"\n{describe(results)}\n\nIn {folder}: results.json, models")


if __name__ == "__main__":
    main()
