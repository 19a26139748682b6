# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What n-grams predict of the texts of the study: an interpolated, modified Kneser-Ney model, alone and with a cache."""

from collections import Counter
from itertools import product
from math import exp
from statistics import mean
from typing import Any

import numpy as np
from datasets import Dataset, load_from_disk
from transformers import AutoTokenizer

from common.text_data import DataTrainingArguments, tokenize_into_blocks
from studies.common.tables import markdown_table
from studies.common.training_plan import CORPUS
from studies.recipe.study import Study


ORDER = 5
# As many as the dense models of the comparison were trained on, by training FLOPs.
TOKENS = {"2e13": 2685 * 2048, "1e14": 9872 * 2048}
# How many occurrences in a sequence the prediction so far is worth: of a token, and of an n-gram behind its context.
STRENGTHS = (30.0, 100.0, 300.0), (0.5, 1.0, 2.0, 4.0, 8.0)


class KneserNey:
    """
    An interpolated, modified Kneser-Ney model (Chen and Goodman, 1998): n-grams of the highest order by how often they
    occur, those of lower orders by how many tokens stand before them, with discounts of each order for what is counted
    once, twice and more often.

    Args:
        sequences (`np.ndarray` of shape `(num_sequences, length)`): Tokens to count; no n-gram goes beyond a sequence.
        vocabulary (`int`): Number of tokens. `vocabulary**order` must be below `2**63`.
        order (`int`, *optional*, defaults to 5): Length of the longest n-grams.
    """

    def __init__(self, sequences: np.ndarray, vocabulary: int, order: int = ORDER):
        self.vocabulary, self.levels = vocabulary, []
        keys, counts = np.unique(self._keys(sequences, order), return_counts=True)
        for length in range(order, 0, -1):
            contexts, starts = np.unique(keys // vocabulary, return_index=True)
            discounts = _discounts(counts)
            totals, left = np.add.reduceat(counts, starts), np.add.reduceat(discounts, starts)
            self.levels.insert(0, (keys, counts - discounts, contexts, totals, left))
            # How many tokens stand before each n-gram that is shorter by one.
            keys, counts = np.unique(keys % vocabulary ** (length - 1), return_counts=True)

    def _keys(self, sequences, length):
        """The number of each n-gram, by where it begins: `(num_sequences, sequence_length - length + 1)`."""
        count = sequences.shape[1] - length + 1
        parts = [sequences[:, start : start + count].astype(np.int64) for start in range(length)]
        return sum(part * self.vocabulary**power for part, power in zip(parts, range(length - 1, -1, -1), strict=True))

    def probabilities(self, sequences: np.ndarray) -> np.ndarray:
        """The probability of each token after those before it: of the shape of `sequences`."""
        found = np.full(sequences.shape, 1 / self.vocabulary)
        for length, (keys, counts, contexts, totals, left) in enumerate(self.levels, 1):
            asked = self._keys(sequences, length)
            count = _look_up(keys, counts, asked)
            total, lower = (_look_up(contexts, each, asked // self.vocabulary) for each in (totals, left))
            own = found[:, length - 1 :]
            found[:, length - 1 :] = np.where(total > 0, (count + lower * own) / np.maximum(total, 1), own)
        return found


def _discounts(counts):
    """What is taken from each count, for the n-grams that are not counted; 0 to the count itself."""
    once, twice, thrice, four = ((counts == each).sum() for each in range(1, 5))
    share = once / max(once + 2 * twice, 1)
    more = np.array([twice / max(once, 1), thrice / max(twice, 1), four / max(thrice, 1)])
    places = np.arange(1, 4)
    return (places - (places + 1) * share * more).clip(0, places)[counts.clip(max=3) - 1]


def _look_up(keys, values, asked):
    """The value of each key that is asked for, 0 for one that is not there."""
    places = np.searchsorted(keys, asked).clip(max=len(keys) - 1)
    return np.where(keys[places] == asked, values[places], 0)


def counts_in_sequence(sequences: np.ndarray, order: int = ORDER) -> np.ndarray:
    """
    How often each token has stood behind its context of 0 to `order - 1` tokens in its sequence before, and how often
    the context has: `(2, order, num_sequences, length)`.
    """
    found = np.zeros((2, order, *sequences.shape))
    for row, sequence in enumerate(sequences.tolist()):
        seen: Counter = Counter()
        for place in range(len(sequence)):
            for length in range(min(place + 1, order)):
                context = tuple(sequence[place - length : place])
                whole = (*context, sequence[place])
                found[:, length, row, place] = seen[whole, "token"], seen[context, "context"]
                seen[whole, "token"] += 1
                seen[context, "context"] += 1
    return found


def with_cache(probabilities: np.ndarray, counts: np.ndarray, strengths: tuple[float, float]) -> np.ndarray:
    """Probabilities that the sequence so far corrects, from its tokens to its longest n-grams, see `STRENGTHS`."""
    for length, (count, total) in enumerate(zip(*counts, strict=True)):
        strength = strengths[min(length, 1)]
        probabilities = np.where(total > 0, (count + strength * probabilities) / (total + strength), probabilities)
    return probabilities


def losses(probabilities: np.ndarray) -> float:
    """Nats per token; the first of a sequence is given."""
    return float(-np.log(probabilities[:, 1:]).mean())


def losses_by_ngrams(
    train: np.ndarray, held_out: dict[str, np.ndarray], vocabulary: int, choose_by: str
) -> dict[str, Any]:
    """
    Losses of held-out texts, in nats per token, by n-grams of a text alone and with a cache of the sequence.

    Args:
        train (`np.ndarray` of shape `(num_sequences, length)`): Sequences to count.
        held_out (`dict[str, np.ndarray]`): Sequences of each held-out text.
        vocabulary (`int`): Number of tokens.
        choose_by (`str`): The text by which the strengths of the cache are chosen.
    """
    model = KneserNey(train, vocabulary)
    alone = {name: model.probabilities(sequences) for name, sequences in held_out.items()}
    counts = {name: counts_in_sequence(sequences) for name, sequences in held_out.items()}
    strengths = min(
        product(*STRENGTHS), key=lambda each: losses(with_cache(alone[choose_by], counts[choose_by], each))
    )
    return {
        "tokens": train.size,
        "strengths": strengths,
        "ngrams": {name: losses(each) for name, each in alone.items()},
        "cache": {name: losses(with_cache(alone[name], counts[name], strengths)) for name in held_out},
    }


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
