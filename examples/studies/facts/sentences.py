# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Sentences that state facts, and how well a model completes them."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase


IGNORED = -100


@dataclass
class Sentence:
    """Tokens of a sentence that states a fact, and the number of tokens of the answer, which a full stop follows."""

    input_ids: list[int]
    answer_length: int


def make_sentence(tokenizer: PreTrainedTokenizerBase, beginning: str, answer: str) -> Sentence:
    """Tokenizes a sentence: its beginning, the answer and a full stop."""
    parts = [tokenizer(text, add_special_tokens=False).input_ids for text in (beginning, f" {answer}", ".")]
    return Sentence([token for part in parts for token in part], len(parts[1]))


def collate(sentences: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Collates sentences into a batch that is padded on the left, so that all answers are at its end and the language
    modeling head runs only there. The `labels`, of shape `(batch_size, logits_to_keep)`, are the answers and full
    stops.
    """
    longest = max(len(each["input_ids"]) for each in sentences)
    kept = max(each["answer_length"] for each in sentences) + 2  # the full stop, and the position before the answer
    input_ids = torch.zeros(len(sentences), longest, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, each in enumerate(sentences):
        tokens = torch.tensor(each["input_ids"])
        num_labels = each["answer_length"] + 1
        input_ids[row, longest - len(tokens) :] = tokens
        attention_mask[row, longest - len(tokens) :] = 1
        labels[row, longest - num_labels :] = tokens[-num_labels:]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels[:, -kept:],
        "logits_to_keep": kept,
    }


@torch.no_grad()
def ask(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, sentences: list[Sentence], batch_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Measures how well a model completes sentences with their answers.

    Args:
        model (`nn.Module`): Model in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer of the model.
        sentences (`list[Sentence]`): Sentences to complete.
        batch_size (`int`, *optional*, defaults to 64): Number of sentences per forward.

    Returns:
        `tuple(torch.Tensor)` of shape `(num_sentences,)`: the loss of each answer in nats per token, and whether
        greedy decoding produces the whole answer and does not continue its last word. One forward suffices, because
        greedy decoding produces the answer if each of its tokens is the most likely one after those before it.
    """
    continues_word = torch.tensor(
        [text[:1].isalnum() for text in tokenizer.batch_decode([[token] for token in range(len(tokenizer))])]
    )
    losses, matches = torch.empty(len(sentences)), torch.empty(len(sentences), dtype=torch.bool)
    by_length = sorted(range(len(sentences)), key=lambda i: len(sentences[i].input_ids))
    for start in range(0, len(sentences), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = collate([asdict(sentences[i]) for i in chosen])
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits.float()[:, :-1]
        is_answer = labels != IGNORED
        is_answer[:, -1] = False  # the full stop
        said = logits.argmax(-1)
        token_losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        losses[chosen] = (token_losses * is_answer).sum(1) / is_answer.sum(1)
        matches[chosen] = ((said == labels) | ~is_answer).all(1) & ~continues_word[said[:, -1]]
    return losses, matches
