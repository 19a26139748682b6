# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Invented people and their biographies, after the description of "Physics of Language Models: Part 3.3"
(arXiv 2404.05405): five attributes, in sentences of several wordings whose order changes with every exposure.

One wording of each attribute is never trained, so that recall can be asked in it.
"""

import calendar
import math
from dataclasses import dataclass
from itertools import product

import numpy as np


def _words(number: int, beginnings: str, ends: str) -> list[str]:
    """Invented words."""
    parts = [f"{a}{b}{c}" for a, b, c in product(beginnings.split(), ["a", "e", "i", "o", "u", "ai"], ends.split())]
    assert len(parts) >= number
    return parts[:: len(parts) // number][:number]


NAMES = [
    _words(400, "B D F G H J K L M N P R", "bel dan fer gor lin mar nus rik sen tor vin"),
    _words(400, "Al Ber Cor Dal El Far Gil Hel Is Jor Kar Lor", "d k l m n r s t v x"),
    _words(
        1000,
        "Bram Cald Dun Est Farn Gold Hart Ing Kess Lang Mor Nor Oak Pen Quil",
        "by dale field ford ham ley man mere more ridge son ton well wick worth",
    ),
]
_, *MONTHS = calendar.month_name
CITIES = _words(200, "Avel Brim Cor Dray Els Fen Gar", "burg chester haven mouth polis stad ville")
UNIVERSITIES = [
    f"{word}-University"
    for word in _words(300, "Ash Black Clear Deep East Fair Grey", "bridge brook cliff gate hill lake wood moor")
]
MAJORS = [f"{word}ics" for word in _words(100, "Bio Chem Geo Astro", "log math nom phys tect")]
EMPLOYERS = [
    f"{word}-Company" for word in _words(263, "Acr Bolt Cent Dyn Exo Flux", "corp dex gen line max net soft tron")
]
PRONOUNS = ["He", "She"]

# The values of each attribute, by position, and its wordings. The last wording is never trained, only asked. It ends
# like a trained wording of the same attribute, as small models know no synonyms.
VALUES = {
    "birth date": [MONTHS, [f"{day}," for day in range(1, 29)], [str(year) for year in range(1900, 2100)]],
    "birth city": [CITIES],
    "university": [UNIVERSITIES],
    "major": [MAJORS],
    "employer": [EMPLOYERS],
}
WORDINGS = {
    "birth date": (
        "was born on",
        "came into the world on",
        "has a birthday on",
        "celebrates every year",
        "keeps a birthday on",
    ),
    "birth city": ("was born in", "grew up in", "comes from", "spent the first years in", "spent a childhood in"),
    "university": ("studied at", "graduated from", "was a student of", "took a degree at", "took courses at"),
    "major": ("majored in", "specialized in", "chose the field of", "holds a degree in", "has a degree in"),
    "employer": ("works for", "is employed by", "has a position at", "earns a living at", "has a job at"),
}


# Number of trained wordings. The biographies of a person use all of them but one.
NUM_TRAINED = 4


@dataclass(frozen=True)
class Person:
    """The words of a name, the pronoun, the words of each attribute, and the trained wording that only others have."""

    name: tuple[str, ...]
    pronoun: str
    attributes: dict[str, tuple[str, ...]]
    untold: int

    def biography(self, generator: np.random.Generator) -> list[str]:
        """
        Draw the words of a biography: all attributes in random order, each in one of this person's wordings. The first
        sentence has the name, the others the pronoun.
        """
        words: list[str] = []
        for attribute in generator.permutation([*VALUES]):
            told = [wording for place, wording in enumerate(WORDINGS[attribute][:-1]) if place != self.untold]
            wording = told[generator.integers(len(told))]
            subject = (self.pronoun,) if words else self.name
            words += [*subject, *wording.split(), *self.attributes[attribute], "."]
        return words

    def question(self, attribute: str, wording: int) -> list[str]:
        """The words of the name and of a wording; the attribute follows them. The last wording is never trained."""
        return [*self.name, *WORDINGS[attribute][wording].split()]


def draw_people(number: int, seed: int) -> list[Person]:
    """People with different names."""
    generator = np.random.default_rng(seed)
    sizes = [len(names) for names in NAMES]
    chosen = generator.choice(math.prod(sizes), number, replace=False)
    people = []
    for places in zip(*np.unravel_index(chosen, sizes), strict=True):
        name = tuple(names[place] for names, place in zip(NAMES, places, strict=True))
        attributes = {
            attribute: tuple(choices[generator.integers(len(choices))] for choices in values)
            for attribute, values in VALUES.items()
        }
        pronoun = PRONOUNS[generator.integers(2)]
        people.append(Person(name, pronoun, attributes, untold=len(people) % NUM_TRAINED))
    return people
