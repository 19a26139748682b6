# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables of facts, and their prompts."""

import json
from itertools import islice

import pytest

from modeling_peer.facts.table import (
    FRAMES,
    RELATION_WORDINGS,
    Fact,
    check_facts,
    in_turn,
    read_facts,
    wordings_of_relation,
)


def test_reads_questions_and_relations(tmp_path):
    table = tmp_path / "facts.csv"
    table.write_text('subject,question,answer\nNorland,"What, in Norland, is the capital?",Zeli\n')
    (fact,) = read_facts(table)
    assert fact == Fact("Norland", "Zeli", ("What, in {subject}, is the capital?",))
    assert fact.question == "What, in Norland, is the capital?"
    table = tmp_path / "facts.jsonl"
    rows = [
        {"subject": "Norland", "answer": "Zeli", "questions": ["Capital of Norland?", "Norland's capital is"]},
        {"subject": "Suland", "relation": "longest river | river", "answer": 0},
        {"subject": "Suland", "relation": ["longest river", "river", " "], "answer": "0"},
    ]
    table.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    given, named = read_facts(table)
    assert given == Fact("Norland", "Zeli", ("Capital of {subject}?", "{subject}'s capital is"))
    assert named == Fact("Suland", "0", wordings_of_relation(["longest river", "river"]))
    assert named.question == "The longest river of Suland is"
    assert named.wordings[len(RELATION_WORDINGS)] == "The river of {subject} is"
    assert len(named.wordings) == 2 * len(RELATION_WORDINGS)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no facts"),
        ("subject,question,answer\n", "no facts"),
        ("subject,question,answer\nA,What of A?,\n", "`answer`"),
        ("subject,question,answer\nA,What of B?,C\n", "`question` with its subject 'A' in it"),
        ("subject;relation;answer\nA;capital;B\n", "needs a `subject`, a `relation` and an `answer`, got"),
        ("subject,relation,answer\nA,capital,B, the old one\n", "more cells than the header"),
        ("subject,relation,answer\nA,|,C\n", "`relation`"),
        ("subject,question,answer\nA,What of A?,B\nA,What of A?,C\n", "two answers, 'B' and 'C'"),
    ],
)
def test_refuses_what_is_no_table_of_facts(text, message, tmp_path):
    table = tmp_path / "facts.csv"
    table.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_facts(table)


def test_the_same_fact_twice_is_one():
    fact = Fact("A", "B", ("What of {subject}?",))
    assert check_facts([fact, fact]) == [fact]
    with pytest.raises(ValueError, match="at least one fact"):
        check_facts([])
    for subject, wording in (("A", "What of A?"), ("", "What of {subject}?")):
        with pytest.raises(ValueError, match="{subject}"):
            check_facts([Fact(subject, "B", (wording,))])


def test_half_of_the_wordings_are_framed_and_all_come_in_turn():
    wordings = tuple(f"{place} {{subject}}?" for place in range(12))
    framed = {frame.format(wording) for frame in FRAMES for wording in wordings}
    turn = in_turn(wordings)
    first, second = (list(islice(turn, 24)) for _ in range(2))
    for own in (first, second):
        assert {*own[::2]} == {*wordings} and len({*own[1::2]} & framed) == 12
    assert first[::2] != second[::2] and not {*first[1::2]} & {*second[1::2]}
