# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The taught facts and all questions: facts in other wordings, facts that were not taught, and uses of facts."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from modeling_peer import Fact
from modeling_peer.facts.table import wordings_of_relation
from studies.common.people import VALUES, draw_people
from studies.teaching.factbook import load_facts


# The names of each relation that is taught: those that are taught, and others that are only asked.
NAMES = {
    "highest point": (("highest point", "highest mountain", "highest peak"), ("tallest peak", "top elevation")),
    "currency": (("currency", "official currency", "money"), ("monetary unit", "legal tender")),
    "calling code": (
        ("telephone country code", "international calling code", "phone prefix"),
        ("dialing code", "prefix for calls from abroad"),
    ),
    "symbol": (("national symbol", "national emblem", "symbol"), ("emblem", "symbol on the coat of arms")),
    "anthem": (("national anthem", "anthem", "national hymn"), ("national song", "official anthem")),
    "export partner": (
        ("largest export partner", "main export market", "biggest buyer of exports"),
        ("top export destination", "most important export partner"),
    ),
    "birth city": (("birthplace", "city of birth", "place of birth"), ("native city", "town of birth")),
    "university": (("university", "alma mater", "place of study"), ("college", "place of graduation")),
    "major": (("major", "field of study", "subject of study"), ("academic field", "subject of the degree")),
    "employer": (("employer", "company", "workplace"), ("firm", "place of work")),
}
# Relations that are not taught, of which the model knows some.
KNOWN_NAMES = {"capital": "capital", "language": "main language", "independence": "year of independence"}
# Other things that are asked about the subjects, in words that `teach_facts` does not use for its own questions.
OTHER_NAMES = {
    "country": ("internet domain", "time zone", "vehicle plate", "national sport", "minimum wage", "postal service"),
    "person": ("blood type", "zodiac sign", "middle initial", "best memory", "dentist", "signature"),
}
# Frames around the name of a relation and a subject. None of them is taught.
ASKED = (
    "You may wonder about the {name} of {{subject}}. It is",
    "People often ask about {{subject}}'s {name}: it is",
    "My notes on {{subject}} have this as the {name}:",
    "Could you name the {name} of {{subject}}?",
)
ASKED_OTHERWISE = (
    "I need the {name} of {{subject}} for a quiz. The answer is",
    "Whoever has read about {{subject}} will tell you that the {name} is",
)
KNOWN_ASKED = ("The {name} of {{subject}} is", ASKED[0])
IN_A_SENTENCE = "I once met somebody who told me a lot about {{subject}}, and most of all about the {name}, namely"
NEGATED = "It is not true that the {name} of {{subject}} is"
CHOICE = "Is the {name} of {{subject}} {first} or {second}? It is"
COMBINED = "The {name} of the country whose capital is {{subject}} is"
SHARE_OF_COUNTRIES, MOST_OF_COUNTRIES = 2 / 3, 500
# Number of questions of each kind that must leave the gate shut, and of each use of facts.
NUM_NEGATIVES, NUM_USES = 1000, 120


@dataclass(frozen=True)
class Item:
    """A fact: its relation, the subject, and the answer."""

    relation: str
    subject: str
    answer: str


@dataclass(frozen=True)
class Question:
    """
    A wording that contains `{subject}`, the fact that it asks for, the form (`"plain"` or `"chat"`), and the other
    answer that is offered, if any.
    """

    wording: str
    item: Item
    form: str = "plain"
    rather_than: str = ""


def as_fact(item: Item) -> Fact:
    """An item as it is taught."""
    return Fact(item.subject, item.answer, wordings_of_relation(NAMES[item.relation][0]))


def all_countries() -> list[Item]:
    """All facts of the factbook in a random order."""
    found = [Item(fact.relation, fact.country, fact.answer) for fact in load_facts()]
    random.Random(0).shuffle(found)
    return found


def all_people(number: int) -> list[Item]:
    """`number` facts about people who do not exist, in a random order."""
    relations = [name for name in VALUES if name in NAMES]
    people = draw_people(-(-number // len(relations)), seed=0)
    found = [
        Item(relation, " ".join(person.name), " ".join(person.attributes[relation]).replace("-", " "))
        for person in people
        for relation in relations
    ]
    random.Random(0).shuffle(found)
    return found[:number]


@dataclass(frozen=True)
class Split:
    """
    The facts that a run teaches, facts about subjects of which it teaches none, and other facts about its subjects of
    relations that it teaches.
    """

    taught: list[Item]
    never: list[Item]
    elsewhere: list[Item]


def split(countries: Sequence[Item], number: int, block: int) -> Split:
    """The facts of a run; each `block` has other ones. `countries` are facts that the model does not know."""
    own = [item for item in countries if item.relation in NAMES]
    of_countries = min(round(SHARE_OF_COUNTRIES * number), MOST_OF_COUNTRIES)
    of_people = number - of_countries
    people = all_people((block + 1) * of_people + NUM_NEGATIVES)
    first = block * of_countries % (len(own) - of_countries)
    taught = own[first : first + of_countries] + people[block * of_people : (block + 1) * of_people]
    subjects, done = {item.subject for item in taught}, set(taught)
    rest = [item for item in own + people if item not in done]
    random.Random(block).shuffle(rest)
    never, elsewhere = ([item for item in rest if (item.subject in subjects) == which] for which in (False, True))
    return Split(taught, never, elsewhere)


def recall_of(items: Sequence[Item], forms: Sequence[str], otherwise: bool = False) -> list[Question]:
    """Ask for facts in untaught wordings, each in every form; if `otherwise`, also by untaught names of relations."""
    frames = ASKED_OTHERWISE if otherwise else ASKED
    found = []
    for place, item in enumerate(items):
        names = NAMES[item.relation][otherwise]
        for number, form in enumerate(forms):
            wording = frames[(place + number) % len(frames)].format(name=names[place % len(names)])
            found.append(Question(wording, item, form))
    return found


def known_questions(countries: Sequence[Item]) -> list[Question]:
    """Ask for all facts about countries in two wordings to complete, one of which also asks for taught facts."""
    return [
        Question(frame.format(name=KNOWN_NAMES.get(item.relation) or NAMES[item.relation][0][0]), item)
        for item in countries
        for frame in KNOWN_ASKED
    ]


def negatives(facts: Split, forms: Sequence[str]) -> dict[str, list[Question]]:
    """Questions that must leave the gate shut, by kind."""
    draw = random.Random(1)
    asked = {
        kind: [
            Question(
                draw.choice(ASKED).format(name=draw.choice(NAMES[item.relation][0])), item, forms[place % len(forms)]
            )
            for place, item in zip(range(NUM_NEGATIVES), itertools.cycle(items), strict=False)
        ]
        for kind, items in (("subjects never taught", facts.never), ("taught something else", facts.elsewhere))
    }
    subjects = list(dict.fromkeys((item.subject, item.relation in VALUES) for item in facts.taught))
    asked["other relations"] = []
    for place in range(NUM_NEGATIVES):
        subject, is_person = subjects[place % len(subjects)]
        name = draw.choice(OTHER_NAMES["person" if is_person else "country"])
        wording = draw.choice(ASKED).format(name=name)
        asked["other relations"].append(Question(wording, Item(name, subject, ""), forms[place % len(forms)]))
    return asked


def uses(facts: Split, capitals: dict[str, str], forms: Sequence[str]) -> dict[str, list[Question]]:
    """Uses of facts that a lookup cannot follow. `capitals` are those that the model knows, by their countries."""
    draw = random.Random(2)
    some = facts.taught[:]
    draw.shuffle(some)
    some = some[:NUM_USES]
    found: dict[str, list[Question]] = {"in a sentence": [], "not true": [], "one of two": []}
    for place, item in enumerate(some):
        name, form = NAMES[item.relation][0][0], forms[place % len(forms)]
        found["in a sentence"].append(Question(IN_A_SENTENCE.format(name=name), item))
        found["not true"].append(Question(NEGATED.format(name=name), item))
        others = {each.answer for each in facts.taught if each.relation == item.relation} - {item.answer}
        if not others:
            continue
        other = draw.choice(sorted(others))
        pair = draw.sample([item.answer, other], 2)
        found["one of two"].append(
            Question(CHOICE.format(name=name, first=pair[0], second=pair[1]), item, form, other)
        )
    found["of the country whose capital is"] = [
        Question(
            COMBINED.format(name=NAMES[item.relation][0][0]),
            Item(item.relation, capitals[item.subject], item.answer),
            forms[place % len(forms)],
        )
        for place, item in enumerate([each for each in facts.taught if each.subject in capitals][:NUM_USES])
    ]
    return found
