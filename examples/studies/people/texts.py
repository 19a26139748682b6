# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Real text with the biographies of invented people among it, and what of both a model is asked."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import PreTrainedTokenizerBase

from common.text_data import train_tokenizer
from modeling_peer.analysis.evaluation import evaluation
from studies.common.corpora import blocks_in_documents, load_corpus
from studies.common.people import NUM_TRAINED, VALUES, Person, draw_people
from studies.common.single_run import token_losses
from studies.common.study_folder import write_json
from studies.common.training_plan import CORPUS


TRAINING_TEXTS = ("python-docs", "linux-docs", "perl-docs", "php-docs", "sqlite-docs", "prose")
HELD_OUT_TEXTS = ("brown", "handbook", "postgresql-docs", "django-docs", "git-docs")
# The wordings in which people are asked.
NEVER_TRAINED, TOLD_OF_OTHERS, TOLD = "never trained", "told of others", "told"
VOCABULARY = 8192  # tokens of the tokenizer


def biography(person: Person, generator: np.random.Generator) -> str:
    """A biography as text."""
    return " ".join(person.biography(generator)).replace(" .", ".")


def prepare(folder: Path, people: int, exposures: int, characters: int, block: int, num_held_out: int) -> None:
    """
    Writes the training text, `train.parquet`, the tokenizer and the held-out sequences of each text, once.

    Args:
        folder (`Path`)
        people, exposures (`int`): Number of people, and of biographies of each.
        characters (`int`): Characters of real text beside them.
        block (`int`): Tokens of a sequence.
        num_held_out (`int`): Sequences of each held-out text.
    """
    if (folder / "held_out" / "texts.json").exists():
        return
    parts = [load_corpus(name) for name in TRAINING_TEXTS]
    documents, corpus = (concatenate_datasets([part[split] for part in parts]) for split in ("train", "validation"))
    documents = documents.select_columns("text").shuffle(seed=0)
    lengths = np.cumsum([len(text) for text in documents["text"]])
    documents = documents.select(range(int(np.searchsorted(lengths, characters))))
    generator = np.random.default_rng(0)
    drawn = draw_people(people, seed=0)
    told = [biography(person, generator) for _ in range(exposures) for person in drawn]
    train = concatenate_datasets([documents, Dataset.from_dict({"text": told})]).shuffle(seed=0)
    train.to_parquet(folder / "train.parquet")
    tokenizer = train_tokenizer(train, "text", VOCABULARY, block)
    tokenizer.save_pretrained(folder / "tokenizer")
    held_out = {
        CORPUS: corpus,
        **{name: concatenate_datasets([*load_corpus(name).values()]) for name in HELD_OUT_TEXTS},
    }
    for name, texts in held_out.items():
        sequences = blocks_in_documents(texts["text"], tokenizer, block, num_held_out)
        sequences.save_to_disk(folder / "held_out" / name)
    write_json(folder / "held_out" / "texts.json", list(held_out))


def recall(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    people: list[Person],
    wording: str = NEVER_TRAINED,
    batch_size: int = 64,
) -> dict[str, dict[str, float]]:
    """
    What a model says of each attribute of people, asked in a wording and behind the end of a text: the share that greedy
    decoding gets right (`recalled`), and the `bits` of a person that it knows, the entropy of the attribute minus the
    model's `-log2 p(answer | question)`, not clipped.
    """
    shares, bits = {}, {}
    with evaluation(model):
        for attribute, values in VALUES.items():
            right, surprise = 0, 0.0
            pairs = [ask(tokenizer, person, attribute, wording) for person in people]
            for start in range(0, len(pairs), batch_size):
                batch = pairs[start : start + batch_size]
                width = max(len(tokens) for tokens, _ in batch)
                # Behind an answer nothing is asked: what stands there does not matter.
                padded = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in batch])
                for own, (tokens, begin) in zip(model(padded).logits.log_softmax(-1), batch, strict=True):
                    own, answer = own[begin - 1 : len(tokens) - 1], torch.tensor(tokens[begin:])
                    right += torch.equal(own.argmax(-1), answer)
                    surprise -= own.gather(-1, answer[:, None]).sum().item() / math.log(2)
            shares[attribute] = right / len(people)
            bits[attribute] = math.log2(math.prod(map(len, values))) - surprise / len(people)
    return {"recalled": shares, "bits": bits}


def ask(tokenizer, person, attribute, wording=NEVER_TRAINED):
    """The tokens of a question with its answer, and where the answer begins."""
    place = {NEVER_TRAINED: -1, TOLD_OF_OTHERS: person.untold, TOLD: (person.untold + 1) % NUM_TRAINED}[wording]
    question = " ".join(person.question(attribute, place))
    answer = f"{question} {' '.join(person.attributes[attribute])}"
    asked, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, answer))
    return [tokenizer.eos_token_id, *whole], 1 + len(asked)


def losses(model: nn.Module, texts: dict[str, torch.Tensor], batch_size: int = 8) -> dict[str, dict[str, Any]]:
    """
    Nats per token of each text, over all of a sequence and over its second half, and of the latter in each sequence.
    """
    found = {}
    with evaluation(model):
        for name, text in texts.items():
            of_tokens = token_losses(model, text, batch_size)
            half = text.shape[1] // 2
            second = of_tokens[:, half - 1 :].mean(1)
            found[name] = {"all": of_tokens.mean().item(), "second half": second.mean().item()}
            found[name]["second half of each"] = [round(each, 4) for each in second.tolist()]
    return found
