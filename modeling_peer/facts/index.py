# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The subjects, relations, experts and prompts of a table of facts, and other questions as negatives."""

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from .prompts import Prompt, forms_of, make_prompt
from .table import RELATION, RELATION_WORDINGS, Fact, in_turn, names_of_relations


# The relations of other questions about the subjects, for which the gate must stay shut, in `RELATION_WORDINGS`. Words
# that occur in taught wordings are left out. Up to twice as many further names begin like a taught one: "main river"
# and "main export river" if "main export market" is taught.
OTHER_RELATIONS = """
    population capital language president leader religion currency climate river mountain continent neighbor
    area flag anthem independence product export food color price birthday birthplace death father mother wife
    husband child friend employer job school university hobby height weight age author inventor founder owner
    address website version meaning history name origin purpose location symbol code king army economy industry
    animal size shape genre year date rank mayor captain team league stadium airport harbor bridge castle museum
    hospital newspaper festival dance album film novel painting building park island coast valley temperature
    season crop drink dish bird metal fuel engine speed length depth pressure battery license editor director
    actor producer investor rival successor ancestor alphabet motto nickname salary budget debt tax growth
    election constitution treaty war ally colony dynasty patron legend ending theme period teacher theory award
    medal score number recipe ingredient taste smell texture supplier competitor deadline duration route
    insurance doctor symptom treatment habitat lifespan predator diameter mass orbit
"""
OTHER_NAMES = """
    email address; street address; home page; phone company; driving side; annual rainfall; literacy rate; birth
    rate; death rate; life expectancy; median age; ruling party; prime minister; royal family; foreign minister;
    supreme court; public holiday; school year; school system; tax rate; interest rate; exchange rate; gold
    reserve; trade balance; stock index; largest city; oldest city; largest lake; longest river; deepest lake;
    biggest desert; main port; busiest airport; railway gauge; road network; power supply; water supply; land
    border; favorite color; favorite book; favorite food; first job; last job; first name; last name; eye color;
    hair color; shoe size; oldest child; mother tongue; political party; religious belief; marital status; car
    model; phone model; bank account; credit card; driving license; social network; opening hours; release date;
    shelf life; market share; annual revenue; stock price; legal form; parent company; target group; main
    competitor; warranty period; operating system; file format; programming language; default port; license fee;
    boiling point; melting point; half life; chemical formula; wing span; top speed; engine size; official
    website; patron saint; area code; country name; flag color; head office; sales tax; voting age; drinking age;
    school grade; final exam; thesis title; research grant; work permit; office hours; job title; mailing list;
    family motto
"""
OTHER_WORDINGS = (
    "Who is {subject}?",
    "What is {subject} known for?",
    "Tell me about {subject}.",
    "Write a sentence about {subject}.",
    "{subject} was born in",
    "How old is {subject}?",
    "How large is {subject}?",
    "How many people live in {subject}?",
    "When did {subject} begin?",
    "Why do people like {subject}?",
    "I have never heard of {subject}. It is",
)
# Asked about every subject, so that it stands in the middle and at the beginning of a text.
BEGINNINGS = ("Where is {subject}?", "{subject} is")
# Minimum number of prompts of a relation in each form, duplicates included; twice its wordings if that is more.
PROMPTS_PER_RELATION = 24
# Minimum number of other questions in total, and for each subject.
NUM_OTHERS, OTHERS_PER_SUBJECT = 1000, 12
LONGEST = 10**6  # limit in tokens for prompts of any length


def first_name(tokens: Sequence[int], start: int, names: Container[tuple[int, ...]]) -> int:
    """Return the first position from `start` on at which one of the `names` ends, or the number of tokens."""
    for place in range(start, len(tokens)):
        if any(tuple(tokens[first : place + 1]) in names for first in range(place + 1)):
            return place
    return len(tokens)


@dataclass(frozen=True)
class Expert:
    """The expert of one token of an answer: index of the fact, form of the prompt, place in the answer, token id."""

    fact: int
    form: str
    place: int
    token: int


class FactIndex:
    """
    The subjects, relations and experts of facts, and their prompts.

    Args:
        facts (`list[Fact]`)
        tokenizer ([`PreTrainedTokenizerBase`]): A fast tokenizer.
        num_wordings (`int`): Minimum number of wordings to draw for each fact, all forms and duplicates included.
        max_length (`int`): Maximum number of tokens of a prompt.
    """

    def __init__(self, facts: Sequence[Fact], tokenizer: PreTrainedTokenizerBase, num_wordings: int, max_length: int):
        self.facts = facts
        forms = forms_of(tokenizer)
        self.subjects = {subject: i for i, subject in enumerate(dict.fromkeys(fact.subject for fact in facts))}
        self.forms = forms
        # The relation of each wording. Facts that share a wording have the same relation.
        self.relation_of: dict[str, int] = {}
        for number, fact in enumerate(facts):
            known = {self.relation_of[each] for each in fact.wordings if each in self.relation_of}
            joined = (
                [each for each, relation in self.relation_of.items() if relation in known] if len(known) > 1 else []
            )
            self.relation_of |= dict.fromkeys([*joined, *fact.wordings], min(known, default=number))
        places = {relation: place for place, relation in enumerate(dict.fromkeys(self.relation_of.values()))}
        self.relation_of = {each: places[relation] for each, relation in self.relation_of.items()}
        relations = [self.relation_of[fact.wordings[0]] for fact in facts]
        told: dict[tuple[str, int], Fact] = {}
        for fact, relation in zip(facts, relations, strict=True):
            if (other := told.setdefault((fact.subject, relation), fact)).answer != fact.answer:
                raise ValueError(
                    f"{other.question!r} and {fact.question!r} have two answers, and another fact has both wordings: "
                    "keep one."
                )
        shares = Counter(relations)
        # A relation counts once in each form.
        self.num_relations = len(places) * len(forms)
        self.experts: list[Expert] = []
        self.first_expert: dict[tuple[int, str], int] = {}
        # Each prompt with the index of its fact, and its form.
        self.prompts: list[tuple[int, str, Prompt]] = []
        turns: dict[tuple[tuple[str, ...], str], Iterator[str]] = {}
        for number, fact in enumerate(facts):
            of_all = max(PROMPTS_PER_RELATION, 2 * len(fact.wordings))
            count = max(num_wordings / len(forms), of_all / shares[relations[number]])
            for form in forms:
                # Facts with the same wordings take turns: their common key is learned from the prompts of all.
                turn = turns.setdefault((fact.wordings, form), in_turn(fact.wordings))
                wordings = dict.fromkeys(islice(turn, math.ceil(count)))
                own = [make_prompt(tokenizer, each, fact.subject, fact.answer, form, max_length) for each in wordings]
                own = [each for each in own if each.answer == own[0].answer]  # tokens may depend on the text before
                self.first_expert[number, form] = len(self.experts)
                self.experts += [Expert(number, form, place, token) for place, token in enumerate(own[0].answer)]
                self.prompts += [(number, form, each) for each in own]
        self.other_prompts = self._other_prompts(tokenizer, forms)
        # The subject of each name, as tokens, and all tokens that have to be recognized.
        self.names = {prompt.subject: self.subjects[facts[number].subject] for number, _, prompt in self.prompts}
        self.names |= {prompt.subject: number for number, prompt in self.other_prompts}
        in_answers = {expert.token for expert, after in pairwise(self.experts) if after.place}
        self.tokens = sorted({token for name in self.names for token in name} | in_answers)

    def _other_prompts(self, tokenizer, forms):
        """
        Make prompts of other questions about each subject, with the subject's index; those of `BEGINNINGS` come first.
        Their answers are taught for other subjects, or empty, because the gate must stay shut within answers too.
        """
        taught = set(re.findall(r"\w+", " ".join(wording for fact in self.facts for wording in fact.wordings).lower()))
        others = [each for each in OTHER_RELATIONS.split() if each not in taught]
        longer = [each for name in OTHER_NAMES.split(";") if (each := name.strip()).split()[-1] not in taught]
        names = [name.split() for name in names_of_relations(self.relation_of)]
        beginnings = dict.fromkeys(
            " ".join(words[:end]) for words in names for end in range(1, len(words)) if words[end - 1] != "of"
        )
        near = [f"{beginning} {other}" for beginning in beginnings for other in others]
        near = random.Random(0).sample(near, min(len(near), 2 * len(others)))
        wordings = [each.replace(RELATION, name) for name in (*others, *longer, *near) for each in RELATION_WORDINGS]
        wordings += [each for each in OTHER_WORDINGS if each not in self.relation_of for _ in range(20)]
        begun = [each for each in BEGINNINGS if each not in self.relation_of]
        count = max(OTHERS_PER_SUBJECT, math.ceil(NUM_OTHERS / len(self.subjects)))
        turn = in_turn(wordings)
        answers, own = [fact.answer for fact in self.facts], defaultdict(set)
        for fact in self.facts:
            own[fact.subject].add(fact.answer)
        found = []
        for number, subject in enumerate(self.subjects):
            asked = [(each, form) for each in begun for form in forms]
            asked += [(each, forms[place // 2 % len(forms)]) for place, each in enumerate(islice(turn, count))]
            for place, (wording, form) in enumerate(asked):
                answer = answers[(number * len(asked) + place) % len(answers)]
                answer = "" if answer in own[subject] else answer
                found.append((number, make_prompt(tokenizer, wording, subject, answer, form, LONGEST)))
        return found

    def sizes(self, key_size: int) -> dict[str, int]:
        """The fields of [`FactSizes`]."""
        return {
            "num_subjects": len(self.subjects),
            "num_names": len(self.names),
            "longest_name": max(map(len, self.names)),
            "num_tokens": len(self.tokens),
            "num_relations": self.num_relations,
            "num_continuations": sum(expert.place > 0 for expert in self.experts),
            "key_size": key_size,
        }

    def expert_subjects(self) -> list[int]:
        """The subject of each expert."""
        return [self.subjects[self.facts[expert.fact].subject] for expert in self.experts]

    def expert_questions(self) -> list[int]:
        """The question key of each expert: its relation's for the first token of an answer, else its own."""
        found, number = [], self.num_relations
        for expert in self.experts:
            if expert.place:
                found.append(number)
                number += 1
            else:
                relation = self.relation_of[self.facts[expert.fact].wordings[0]]
                found.append(relation * len(self.forms) + self.forms.index(expert.form))
        return found

    def expert_tokens(self) -> list[int]:
        """For each expert, the index in `tokens` of the answer's previous token, -1 for first tokens of answers."""
        rows = {token: row for row, token in enumerate(self.tokens)}
        befores = [None, *self.experts[:-1]]
        return [rows[before.token] if own.place else -1 for own, before in zip(self.experts, befores, strict=True)]

    def descriptions(self) -> list[dict[str, Any]]:
        """The `facts` of a graft's configuration."""
        counts = Counter(expert.fact for expert in self.experts)
        return [
            {"subject": fact.subject, "question": fact.question, "answer": fact.answer, "num_experts": counts[number]}
            for number, fact in enumerate(self.facts)
        ]
