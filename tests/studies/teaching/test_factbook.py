# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Facts about countries are read from their files."""

import json

import pytest

from studies.teaching import factbook
from studies.teaching.factbook import RELATIONS, load_facts


# Countries and what is told of them, by the names of their files.
COUNTRIES = {
    "africa/aa": ("Aland", {"capital": "Bree (Bri)", "highest point": "Mount Tor 1,234 m", "calling code": "cable; country code - 41"}),
    "europe/cc": ("Korea, North", {"capital": "NA", "highest point": "Paektu-san 2,744 m", "currency": "Northern won (KPW) per US dollar - ++ 98.1 (2014 est.)"}),
    "europe/dd": ("none", {"capital": "Nowhere"}),
    "europe/ee": ("Singapura", {"capital": "Singapura", "calling code": "country code - 65", "anthem": '"Onward," (Maju)'}),
}  # fmt: skip


@pytest.fixture
def countries(tmp_path, monkeypatch):
    """The files of the package with these countries."""
    folder = tmp_path / "factbook"
    for name, (country, told) in COUNTRIES.items():
        content = {"Government": {"Country name": {"conventional short form": {"text": country}}}}
        for relation, text in told.items():
            *path, last = RELATIONS[relation].field
            place = content
            for part in path:
                place = place.setdefault(part, {})
            place[last] = {"text": text}
        file = folder / "package" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    monkeypatch.setattr(factbook, "fetch_package", lambda registry, name: folder)


def test_load(countries):
    found = {(fact.relation, fact.country): fact.answer for fact in load_facts()}
    assert found == {
        ("capital", "Aland"): "Bree",
        ("highest point", "Aland"): "Mount Tor",
        ("calling code", "Aland"): "41",
        ("highest point", "North Korea"): "Paektu-san",
        ("currency", "North Korea"): "Northern won",
        ("calling code", "Singapura"): "65",
        ("anthem", "Singapura"): "Onward",
    }
