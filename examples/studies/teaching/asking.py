# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Asking a model, with or without facts in the prompt, and what a gate of facts opens for."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from modeling_peer.analysis.evaluation import evaluation
from modeling_peer.fact_graft import FactGraft
from modeling_peer.facts.index import LONGEST
from modeling_peer.facts.measuring import are_answered, padded
from modeling_peer.facts.prompts import Prompt, make_prompt
from studies.teaching.questions import NAMES, Item, Question


IN_A_PROMPT, SATURATION, LENGTH_SHARE = 3, 1.2, 0.75


def prompts_of(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[Prompt]:
    """Questions with their answers, without what ends these: a model may go on as it likes."""
    made = [
        make_prompt(tokenizer, each.wording, each.item.subject, each.item.answer, each.form, LONGEST)
        for each in questions
    ]
    return [replace(prompt, tokens=prompt.tokens[:-1]) for prompt in made]


def ask(model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[bool]:
    """Whether greedy decoding answers each question."""
    return are_answered(model, prompts_of(tokenizer, questions), progress_bar=False)


def last_states(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], batch_size: int = 32
) -> tuple[list[int], list[int]]:
    """
    At the end of each question, the token that follows by greedy decoding, and the expert of the graft of facts that
    is open there, -1 for none or without a graft.
    """
    prompts = prompts_of(tokenizer, questions)
    order = sorted(range(len(prompts)), key=lambda place: prompts[place].answer_start)
    tokens, experts = [0] * len(prompts), [-1] * len(prompts)
    noted: dict[str, torch.Tensor] = {}
    hooks = [
        module.router.register_forward_hook(lambda router, args, output: noted.update(found=output))
        for module in model.modules()
        if isinstance(module, FactGraft)
    ]
    with evaluation(model, hooks):
        for start in range(0, len(order), batch_size):
            own = order[start : start + batch_size]
            ends = [prompts[place].answer_start - 1 for place in own]
            ids, mask = padded([prompts[place].tokens[: end + 1] for place, end in zip(own, ends, strict=True)])
            states = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            rows = torch.arange(len(own))
            following = model.get_output_embeddings()(states[rows, ends]).argmax(-1).tolist()
            for place, token in zip(own, following, strict=True):
                tokens[place] = token
            if hooks:
                found, weights = (each[rows, ends, 0, 0] for each in noted["found"])
                for place, expert, weight in zip(own, found.tolist(), weights.tolist(), strict=True):
                    experts[place] = expert if weight else -1
    return tokens, experts


class Retrieval:
    """
    The facts nearest to a question by BM25, as sentences.

    Args:
        items (sequence of [`Item`]): The facts, each of which is a sentence with the first name of its relation.
    """

    def __init__(self, items: Sequence[Item]):
        self.sentences = [f"The {NAMES[item.relation][0][0]} of {item.subject} is {item.answer}." for item in items]
        self.counts = [Counter(self._words(each)) for each in self.sentences]
        self.mean_length = sum(map(Counter.total, self.counts)) / len(self.counts)
        found_in = Counter(word for each in self.counts for word in each)
        self.rarity = {
            word: math.log(1 + (len(items) - count + 0.5) / (count + 0.5)) for word, count in found_in.items()
        }

    @staticmethod
    def _words(text):
        return re.findall(r"\w+", text.lower())

    def with_facts(self, question: Question) -> Question:
        """The question behind the sentences that are nearest to it."""
        words = self._words(question.wording.replace("{subject}", question.item.subject))

        def score(place):
            counts = self.counts[place]
            relative = 1 - LENGTH_SHARE + LENGTH_SHARE * counts.total() / self.mean_length
            return sum(
                self.rarity[word] * counts[word] * (SATURATION + 1) / (counts[word] + SATURATION * relative)
                for word in words
                if counts[word]
            )

        best = sorted(range(len(self.sentences)), key=score, reverse=True)[:IN_A_PROMPT]
        facts = "\n".join(self.sentences[place] for place in best)
        return replace(question, wording=f"{facts}\n\n{question.wording}")
