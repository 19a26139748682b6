# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Real text, of which half of the sequences repeat a passage, and what is asked of a model."""

from pathlib import Path

import numpy as np
import torch
from datasets import concatenate_datasets
from transformers import AutoTokenizer

from common.text_data import DataTrainingArguments, tokenize_into_blocks, train_tokenizer
from studies.common.corpora import blocks_in_documents, load_corpus


TRAINING_TEXTS = ("python-docs", "linux-docs", "perl-docs", "php-docs", "sqlite-docs", "prose")
HELD_OUT_TEXTS = ("brown", "handbook", "postgresql-docs", "django-docs", "git-docs")
VOCABULARY, BLOCK = 512, 256
CHARACTERS = 18_000_000  # of the training text
NUM_HELD_OUT = 64  # sequences of each held-out text
SHORTEST, LONGEST = 32, 100  # tokens of a repeated passage
ASKED = 64  # tokens of a passage in the measures of copying


def prepare(folder: Path) -> None:
    """Write the training sequences, `train.npy`, and the held-out ones, `held_out.npy`, once."""
    if (folder / "held_out.npy").exists():
        return
    documents = concatenate_datasets([load_corpus(name)["train"] for name in TRAINING_TEXTS])
    documents = documents.select_columns("text").shuffle(seed=0)
    lengths = np.cumsum([len(text) for text in documents["text"]])
    documents = documents.select(range(int(np.searchsorted(lengths, CHARACTERS))))
    train_tokenizer(documents, "text", VOCABULARY, BLOCK).save_pretrained(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    blocks = tokenize_into_blocks(documents, tokenizer, BLOCK, DataTrainingArguments()).shuffle(seed=0)
    np.save(folder / "train.npy", repeat_passages(np.array(blocks["input_ids"], dtype=np.int16)))
    held_out = [
        blocks_in_documents(
            concatenate_datasets([*load_corpus(name).values()])["text"], tokenizer, BLOCK, NUM_HELD_OUT
        )
        for name in HELD_OUT_TEXTS
    ]
    np.save(folder / "held_out.npy", np.array([each["input_ids"] for each in held_out], dtype=np.int16))


def repeat_passages(blocks: np.ndarray) -> np.ndarray:
    """Repeat a passage of every other sequence later in it, over other text."""
    generator = np.random.default_rng(0)
    blocks = blocks.copy()
    for block in blocks[::2]:
        length = generator.integers(SHORTEST, LONGEST + 1)
        first = generator.integers(BLOCK - 2 * length + 1)
        second = generator.integers(first + length, BLOCK - length + 1)
        block[second : second + length] = block[first : first + length].copy()
    return blocks


def copying_questions(held_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Sequences that end in a passage that they have had before, and the same sequences with other text in place of the
    first passage. A model that copies predicts the last `ASKED` tokens of the first ones better.
    """
    text = held_out.flatten(0, 1)
    repeated = text.clone()
    repeated[:, ASKED : 2 * ASKED] = text[:, -ASKED:]
    return repeated, text


def probe() -> torch.Tensor:
    """Sequences of random tokens that repeat their first half."""
    first = torch.randint(VOCABULARY, (32, BLOCK // 2), generator=torch.Generator().manual_seed(0))
    return torch.cat([first, first], dim=1)
