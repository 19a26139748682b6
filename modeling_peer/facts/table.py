# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Facts, the tables in which a user writes them, and the wordings in which they are asked."""

import csv
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arguments.check_types import check_types


SUBJECT, RELATION = "{subject}", "{relation}"

# Wordings of a relation that is given by its name, such as "capital".
RELATION_WORDINGS = (
    "The {relation} of {subject} is",
    "{subject}'s {relation} is",
    "What is the {relation} of {subject}?",
    "What is {subject}'s {relation}?",
    "In {subject}, the {relation} is",
    "As for the {relation} of {subject}, it is",
    "Tell me the {relation} of {subject}.",
    "Tell me what the {relation} of {subject} is.",
    "Do you know the {relation} of {subject}? Yes, it is",
    "Which {relation} does {subject} have?",
    "The {relation} that {subject} has is",
    "Can you tell me about {subject}'s {relation}?",
    "I am looking for the {relation} of {subject}. It is",
    "When people talk about the {relation} of {subject}, they mean",
    "If you ask about {subject}'s {relation}, the answer is",
    "Regarding {subject}, the {relation} is",
    "It is well known that the {relation} of {subject} is",
    "What do you know about the {relation} of {subject}?",
    "As everybody knows, {subject}'s {relation} is",
    "How would you describe the {relation} of {subject}?",
)
# Frames for any wording. Taught and other questions have the same frames; otherwise the gate would learn the form of
# a question and not its content.
FRAMES = (
    "Question: {}\nAnswer:",
    "{} Answer:",
    "{} The answer is",
    "Please tell me: {}",
    "Q: {}\nA:",
    "Here is something that I would like to know. {}",
    "{} Answer briefly.",
)


@dataclass(frozen=True)
class Fact:
    """
    A fact: a subject, the wordings in which it is asked for, and the answer.

    Args:
        subject (`str`): What it is about, as it stands in questions: "France".
        answer (`str`): The answer: "Paris".
        wordings (`tuple[str]`):
            Questions, or beginnings of sentences that the answer completes, with `{subject}` in the place of the
            subject. Facts with the same wordings have a relation in common, and are recognized together.
    """

    subject: str
    answer: str
    wordings: tuple[str, ...]

    @property
    def question(self) -> str:
        """The first wording, with the subject."""
        return self.wordings[0].replace(SUBJECT, self.subject)


@check_types
def read_facts(file: str | Path) -> list[Fact]:
    """
    Read a table of facts.

    Args:
        file (`str` or `Path`):
            A CSV file with a header, or JSONL. Its columns are `subject`, `answer`, and either `relation` or
            `question`. A relation is a name, or several with `|` between them ("capital|capital city", a list in
            JSONL). A question contains the subject. JSONL may have a list of `questions`.

    Returns:
        `list[Fact]`: the facts, without duplicates.

    Raises:
        `ValueError`: for a file without facts, a row with missing or extra cells, or two answers to one question.
    """
    file = Path(file)
    with file.open(newline="", encoding="utf-8-sig") as lines:
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in lines if line.strip()]
        else:
            rows = list(csv.DictReader(lines))
    if not rows:
        raise ValueError(f"{file} has no facts.")
    return check_facts(_fact_of(row, f"Fact {number} of {file}") for number, row in enumerate(rows, 1))


def _fact_of(row: dict[str, Any], place: str) -> Fact:
    subject, answer = ("" if row.get(name) is None else str(row[name]).strip() for name in ("subject", "answer"))
    if not subject or not answer:
        raise ValueError(f"{place} needs a `subject`, a `relation` and an `answer`, got {row}.")
    if None in row:  # where `csv.DictReader` puts extra cells
        raise ValueError(f"{place} has more cells than the header: put what contains a comma in quotes, got {row}.")
    relation = row.get("relation") or ""
    names = [each.strip() for each in (relation if isinstance(relation, list) else str(relation).split("|"))]
    if any(names):
        return Fact(subject, answer, wordings_of_relation(filter(None, names)))
    questions = [str(each).strip() for each in row.get("questions") or [row.get("question") or ""]]
    as_a_word = re.compile(rf"(?<!\w){re.escape(subject)}(?!\w)")
    if not all(map(as_a_word.search, questions)):
        raise ValueError(
            f"{place} needs a `relation`, or a `question` with its subject {subject!r} in it, got {questions}."
        )
    return Fact(subject, answer, tuple(as_a_word.sub(SUBJECT, question) for question in questions))


def wordings_of_relation(names: Iterable[str]) -> tuple[str, ...]:
    """Make the wordings of a relation with these names, all of the first name first."""
    return tuple(wording.replace(RELATION, name) for name in names for wording in RELATION_WORDINGS)


def names_of_relations(wordings: Iterable[str]) -> list[str]:
    """Find the names of relations in those of the wordings that [`wordings_of_relation`] made."""
    pattern = re.compile(re.escape(RELATION_WORDINGS[0]).replace(re.escape(RELATION), "(.+)"))
    return [match[1] for wording in wordings if (match := pattern.fullmatch(wording))]


def check_facts(facts: Iterable[Fact]) -> list[Fact]:
    """
    Remove duplicates. Raises `ValueError` for no facts, two answers to a question, or a missing subject or wording.
    """
    found: dict[Fact, None] = {}
    answers: dict[tuple[str, str], str] = {}
    for fact in facts:
        if not fact.subject or not fact.wordings or any(SUBJECT not in wording for wording in fact.wordings):
            raise ValueError(f"A fact needs a `subject`, and `wordings` with {SUBJECT} in each, got {fact}.")
        for wording in fact.wordings:
            if (known := answers.setdefault((fact.subject, wording), fact.answer)) != fact.answer:
                question = wording.replace(SUBJECT, fact.subject)
                raise ValueError(f"{question!r} has two answers, {known!r} and {fact.answer!r}: keep one.")
        found[fact] = None
    if not found:
        raise ValueError("`facts` must have at least one fact, got none.")
    return list(found)


def in_turn(wordings: Sequence[str]) -> Iterator[str]:
    """
    Yield wordings without end, in random order, every second one in a frame. Those without a frame repeat only after
    all have come, and so do those in frames.
    """
    draw = random.Random(0)
    framed = [frame.format(each) for frame in FRAMES for each in wordings]

    def rounds(choices: Sequence[str]) -> Iterator[str]:
        while True:
            yield from draw.sample(choices, len(choices))

    for pair in zip(rounds(wordings), rounds(framed), strict=True):
        yield from pair
