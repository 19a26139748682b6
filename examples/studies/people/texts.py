# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Real text mixed with the biographies of invented people."""

from itertools import islice
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets

from common.text_data import train_tokenizer
from studies.common.corpora import blocks_in_documents, load_corpus
from studies.common.people import Person, draw_people
from studies.common.study_folder import write_json
from studies.common.training_plan import CORPUS


TRAINING_TEXTS = ("python-docs", "linux-docs", "perl-docs", "php-docs", "sqlite-docs", "prose")
HELD_OUT_TEXTS = ("brown", "handbook", "postgresql-docs", "django-docs", "git-docs")
VOCABULARY = 8192  # tokens of the tokenizer
BLOCK = 1024  # tokens of a sequence
CHARACTERS = 17_000_000  # of real text
NUM_HELD_OUT = 64  # sequences of each held-out text
# Biographies per person, and people, of each group. All groups have the same number of biographies.
GROUPS = {768: 50, 192: 200, 48: 800}


def groups_of_people() -> dict[int, list[Person]]:
    """The people of each group, by the number of biographies per person."""
    people = iter(draw_people(sum(GROUPS.values()), seed=0))
    return {told: list(islice(people, number)) for told, number in GROUPS.items()}


def biography(person: Person, generator: np.random.Generator) -> str:
    """A biography as text, with the name in each sentence."""
    text = " ".join(person.biography(generator)).replace(" .", ".")
    return text.replace(f". {person.pronoun} ", f". {' '.join(person.name)} ")


def prepare(folder: Path) -> None:
    """Writes the training text, `train.parquet`, the tokenizer and the held-out sequences of each text, once."""
    if (folder / "held_out" / "texts.json").exists():
        return
    parts = [load_corpus(name) for name in TRAINING_TEXTS]
    documents, corpus = (concatenate_datasets([part[split] for part in parts]) for split in ("train", "validation"))
    documents = documents.select_columns("text").shuffle(seed=0)
    lengths = np.cumsum([len(text) for text in documents["text"]])
    documents = documents.select(range(int(np.searchsorted(lengths, CHARACTERS))))
    generator = np.random.default_rng(0)
    groups = groups_of_people()
    told = [biography(each, generator) for number in groups for _ in range(number) for each in groups[number]]
    train = concatenate_datasets([documents, Dataset.from_dict({"text": told})]).shuffle(seed=0)
    train.to_parquet(folder / "train.parquet")
    tokenizer = train_tokenizer(train, "text", VOCABULARY, BLOCK)
    tokenizer.save_pretrained(folder / "tokenizer")
    held_out = {
        CORPUS: corpus,
        **{name: concatenate_datasets([*load_corpus(name).values()]) for name in HELD_OUT_TEXTS},
    }
    for name, texts in held_out.items():
        sequences = blocks_in_documents(texts["text"], tokenizer, BLOCK, NUM_HELD_OUT)
        sequences.save_to_disk(folder / "held_out" / name)
    write_json(folder / "held_out" / "texts.json", list(held_out))
