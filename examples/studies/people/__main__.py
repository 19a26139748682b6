# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Trains dense-laptop, peer-laptop and a product-key memory for about equal seconds on real text, mixed with biographies of
invented people, and asks them about these people.

    ./run study people                 # five hours, two trainings at once with a core each
    ./run study people --results examples/studies/people/results.json    # goes on from these trainings

After an interruption, the same command resumes. Each run is a file in --output_dir; `results.json` there sums them up.
"""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer

from common.command_line import parse_arguments
from common.machine import machine
from common.text_data import DataTrainingArguments, tokenize_into_blocks
from studies.common.ngrams import losses_by_ngrams
from studies.common.parallel_runs import ParallelArguments, make_runs
from studies.common.single_run import digests, read_texts
from studies.common.study_folder import claim_folder, read_json, sole_use, write_runs
from studies.common.training_plan import CORPUS
from studies.people.arms import TOKENS_PER_STEP, next_runs
from studies.people.measure import make
from studies.people.report import describe, plot
from studies.people.texts import BLOCK, CHARACTERS, GROUPS, NUM_HELD_OUT, prepare


def read_by_ngrams(folder: Path, tokens: int) -> dict[str, Any]:
    """Losses on second halves of sequences by n-grams that are counted on as many tokens as the fastest arm reads."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    text = Dataset.from_parquet(str(folder / "train.parquet"))
    blocks = tokenize_into_blocks(text, tokenizer, BLOCK, DataTrainingArguments()).shuffle(seed=0)
    train_blocks = np.array(blocks.select(range(min(len(blocks), tokens // BLOCK)))["input_ids"])
    texts = {name: each.numpy() for name, each in read_texts(folder / "held_out", "cpu").items()}
    # Order 4: keys of 5-grams of 8,192 tokens exceed 64-bit integers.
    return losses_by_ngrams(train_blocks, texts, len(tokenizer), CORPUS, order=4, first=BLOCK // 2)


def main():
    (args,) = parse_arguments((ParallelArguments,), __doc__)
    folder = Path(args.output_dir or "runs/people")
    with sole_use(folder):
        # Settings that all runs share and that their names do not contain.
        shared = {"characters": CHARACTERS, "block_size": BLOCK, "held_out_sequences": NUM_HELD_OUT}
        claim_folder(folder, {**shared, "groups": [list(group) for group in GROUPS.items()]})
        prepare(folder)
        texts = digests(read_texts(folder / "held_out", "cpu"))
        for name, run in read_json(Path(args.results))["runs"].items() if args.results else ():
            if run.get("texts", texts) != texts:
                raise SystemExit(
                    f"{name} of {args.results} was measured on other texts: their packages have changed since, and a study "
                    "of these begins without --results."
                )
        results, is_finished = make_runs(args, folder, next_runs, make)
        head: dict[str, Any] = {"command": "./run study people", "machine": machine(), "ngrams": {}}
        if steps := max((run["steps"] for run in results.values()), default=0):
            head["ngrams"] = read_by_ngrams(folder, steps * TOKENS_PER_STEP)
        write_runs(folder / "results.json", head, results)
        plot(results, folder / "results.png")
        print(f"\n{describe(results, head['ngrams'])}\n\nResults and the picture are in {folder}.")
        if not is_finished:
            print("The study is not finished: the same command goes on.")


if __name__ == "__main__":
    main()
