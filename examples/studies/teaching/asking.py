# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Asking a model, with or without facts in the prompt, and what a gate of facts opens for."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from modeling_peer.analysis.evaluation import evaluation
from modeling_peer.continual.generated_text import padded, write_on
from modeling_peer.fact_graft import FactGraft
from modeling_peer.facts.index import LONGEST, first_name
from modeling_peer.facts.measuring import are_answered, openings
from modeling_peer.facts.prompts import Prompt, make_prompt
from studies.teaching.questions import NAMES, Item, Question


SATURATION, LENGTH_SHARE = 1.2, 0.75
# Of nine ways to put a fact before a question, the one with the best recall of facts that are not reported.
WITH_FACT = "Facts:\n{fact}\n\nQuestion: {question}\nAnswer:"
# Tokens that a model writes after a question. An answer in a sentence counts: "The currency of France is the euro".
NEW_TOKENS = 24
# Maximum number of answers after which the gate is examined.
MOST_BEHIND = 120


def prompts_of(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[Prompt]:
    """Prompts of questions with their answers, without the last token, which ends them: a model may go on freely."""
    made = [
        make_prompt(tokenizer, each.wording, each.item.subject, each.item.answer, each.form, LONGEST)
        for each in questions
    ]
    return [replace(prompt, tokens=prompt.tokens[:-1]) for prompt in made]


def ask(model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[bool]:
    """Whether greedy decoding gives the answer to each question at once."""
    return are_answered(model, prompts_of(tokenizer, questions), progress_bar=False)


def write_freely(model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[str]:
    """The text that greedy decoding writes after each question, up to its end or to `NEW_TOKENS` tokens."""
    asked = [prompt.tokens[: prompt.answer_start] for prompt in prompts_of(tokenizer, questions)]
    written = write_on(model, asked, NEW_TOKENS, progress_bar=False)
    return [tokenizer.decode(tokens).partition(tokenizer.eos_token)[0] for tokens in written]


def ask_freely(model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[bool]:
    """Whether the text written after each question has the answer, before the other one if two are offered."""
    texts = write_freely(model, tokenizer, questions)
    return [
        place_of(question.item.answer, text) < place_of(question.rather_than or None, text)
        for question, text in zip(questions, texts, strict=True)
    ]


def place_of(answer: str | None, text: str) -> int:
    """The position of an answer in a text as a whole word or number, or the length of the text if it is not there."""
    if answer is None:
        return len(text)
    found = re.search(rf"(?<!\w)(?<!\d[.,-]){re.escape(answer)}(?!\w)(?![.,-]\d)", text, re.IGNORECASE)
    return found.start() if found else len(text)


def opens_behind(model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[bool]:
    """
    Whether the gate opens at each token that the base model writes after the taught answers to plain questions, up to
    the next name of a subject. Tokens followed by a token of the answer do not count, as answers may be repeated.
    """
    plain = [each for each in questions if each.form == "plain"]
    plain = plain[:: -(-len(plain) // MOST_BEHIND)]
    prompts = [
        make_prompt(tokenizer, each.wording, each.item.subject, each.item.answer, each.form, LONGEST) for each in plain
    ]
    with model.disable_adapter():
        written = write_on(model, [prompt.tokens for prompt in prompts], NEW_TOKENS, progress_bar=False)
    subjects = {f"{space}{each.item.subject}" for each in questions for space in ("", " ")}
    names = {tuple(tokenizer(name, add_special_tokens=False)["input_ids"]) for name in subjects}
    texts = [(*prompt.tokens, *tokens) for prompt, tokens in zip(prompts, written, strict=True)]
    found = []
    for prompt, text, opens in zip(prompts, texts, openings(model, texts, progress_bar=False), strict=True):
        first = len(prompt.tokens)
        last = min(first_name(text, first, names), len(text) - 1)
        found += [opens[place].item() for place in range(first - 1, last) if text[place + 1] not in prompt.answer]
    return found


def open_experts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], batch_size: int = 32
) -> list[int]:
    """The expert of the graft of facts that is open at the end of each question, or -1 if none is."""
    prompts = prompts_of(tokenizer, questions)
    order = sorted(range(len(prompts)), key=lambda place: prompts[place].answer_start)
    experts = [-1] * len(prompts)
    noted: dict[str, torch.Tensor] = {}
    routers = [module.router for module in model.modules() if isinstance(module, FactGraft)]
    hooks = [
        router.register_forward_hook(lambda router, args, output: noted.update(found=output)) for router in routers
    ]
    with evaluation(model, hooks):
        for start in range(0, len(order), batch_size):
            own = order[start : start + batch_size]
            ends = [prompts[place].answer_start - 1 for place in own]
            ids, mask = padded([prompts[place].tokens[: end + 1] for place, end in zip(own, ends, strict=True)])
            model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
            found, weights = (each[torch.arange(len(own)), ends, 0, 0].tolist() for each in noted["found"])
            for place, expert, weight in zip(own, found, weights, strict=True):
                experts[place] = expert if weight else -1
    return experts


class Retrieval:
    """
    Retrieval by BM25 of the fact nearest to a question, among facts whose subject the question names.

    Args:
        items (sequence of [`Item`]):
            The facts. Each is found by all taught names of its relation, and its sentence has the first of them.
    """

    def __init__(self, items: Sequence[Item]):
        self.items = items
        self.subjects = [re.compile(rf"(?<!\w){re.escape(item.subject)}(?!\w)") for item in items]
        self.counts = [Counter(self._words(f"{' '.join(NAMES[item.relation][0])} {item.subject}")) for item in items]
        self.mean_length = sum(map(Counter.total, self.counts)) / len(self.counts)
        found_in = Counter(word for each in self.counts for word in each)
        self.rarity = {
            word: math.log(1 + (len(items) - count + 0.5) / (count + 0.5)) for word, count in found_in.items()
        }

    @staticmethod
    def _words(text):
        return re.findall(r"\w+", text.lower())

    def nearest(self, question: Question) -> Item | None:
        """The fact that is nearest to a question, `None` if it names no subject."""
        text = question.wording.replace("{subject}", question.item.subject)
        words = self._words(text)

        def score(place):
            counts = self.counts[place]
            relative = 1 - LENGTH_SHARE + LENGTH_SHARE * counts.total() / self.mean_length
            return sum(
                self.rarity[word] * counts[word] * (SATURATION + 1) / (counts[word] + SATURATION * relative)
                for word in words
                if counts[word]
            )

        named = [place for place, subject in enumerate(self.subjects) if subject.search(text)]
        return self.items[max(named, key=score)] if named else None

    def with_fact(self, question: Question) -> Question:
        """The question after a sentence with the nearest fact, or the question alone if there is none."""
        if (item := self.nearest(question)) is None:
            return question
        fact = f"The {NAMES[item.relation][0][0]} of {item.subject} is {item.answer}."
        return replace(question, wording=WITH_FACT.format(fact=fact, question=question.wording))
