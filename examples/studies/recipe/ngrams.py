# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Prediction of the study's texts by n-grams that are counted on as many tokens as its models read."""

from math import exp
from statistics import mean
from typing import Any

import numpy as np
from datasets import Dataset, load_from_disk
from transformers import AutoTokenizer

from common.text_data import DataTrainingArguments, tokenize_into_blocks
from studies.common.ngrams import losses_by_ngrams
from studies.common.tables import markdown_table
from studies.common.training_plan import CORPUS
from studies.recipe.study import Study


# The number of tokens that the dense models of the comparison were trained on, by training FLOPs.
TOKENS = {"2e13": 2685 * 2048, "1e14": 9872 * 2048}


def read_by_ngrams(study: Study) -> dict[str, dict[str, Any]]:
    """For each number of `TOKENS`, [`losses_by_ngrams`] of the study's texts, from sequences drawn at random."""
    study.prepare()
    tokenizer = AutoTokenizer.from_pretrained(study.folder / "tokenizer")
    text = Dataset.from_parquet(str(study.folder / "text" / "train.parquet"))
    size = study.plan.block_size
    blocks = tokenize_into_blocks(text, tokenizer, size, DataTrainingArguments()).shuffle(seed=0)
    held_out = {
        name: np.array(load_from_disk(study.folder / "held_out" / name)["input_ids"])
        for name in (CORPUS, *study.plan.evaluation_texts)
    }
    return {
        budget: losses_by_ngrams(
            np.array(blocks.select(range(tokens // size))["input_ids"]), held_out, len(tokenizer), CORPUS
        )
        for budget, tokens in TOKENS.items()
    }


def ngrams_table(results: dict[str, dict[str, Any]]) -> str:
    """Perplexity of each text, and the geometric mean over all but the corpus."""
    texts = list(next(iter(results.values()))["ngrams"])
    rows = [["", "tokens, M", *texts, "geometric mean"]]
    for budget, found in results.items():
        for kind, label in (("ngrams", "5-gram"), ("cache", "5-gram and cache")):
            over = exp(mean(loss for name, loss in found[kind].items() if name != CORPUS))
            cells = [f"{exp(found[kind][name]):.2f}" for name in texts]
            rows.append([f"{label}, as of {budget} FLOPs", f"{found['tokens'] / 1e6:.1f}", *cells, f"{over:.2f}"])
    return markdown_table(rows)
