# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The study of taught facts: what is asked is not taught, how a model and a gate are asked, and which runs come next."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from fact_models import base_of, words_tokenizer

from modeling_peer import Fact, teach_facts
from modeling_peer.facts import index
from modeling_peer.facts.table import FRAMES
from modeling_peer.facts.teaching import grafts_of_facts
from studies.teaching import plan, questions
from studies.teaching.arms import collate, examples_of
from studies.teaching.asking import Retrieval, ask, ask_freely, open_experts, opens_behind, place_of
from studies.teaching.plan import RATES, Run, next_runs
from studies.teaching.questions import NAMES, OTHER_NAMES, Item, Question, as_fact, negatives, recall_of, split, uses
from studies.teaching.report import behind_gate, describe, looked_up, plot, upper_bound


COUNTRIES = [
    Item(relation, f"{letter}land", f"{relation} of {letter}")
    for letter in "ABCDEFGHIJKLMNOPQRST"
    for relation in ("capital", *[name for name in NAMES if name not in questions.VALUES])
]
FORMS = ("plain", "chat")


def words_of(texts):
    return set(re.findall(r"\w+", " ".join(texts).lower()))


def test_what_is_asked_is_not_taught():
    facts = split(COUNTRIES, 60, 1)
    taught = {
        (fact.subject, frame.format(wording))
        for fact in map(as_fact, facts.taught)
        for wording in fact.wordings
        for frame in ("{}", *FRAMES)
    }
    asked = [*recall_of(facts.taught, FORMS), *recall_of(facts.taught, FORMS, otherwise=True)]
    asked += itertools.chain(*negatives(facts, FORMS).values(), *uses(facts, {}, FORMS).values())
    assert not {(question.item.subject, question.wording) for question in asked} & taught
    # No negative of `teach_facts` has a word of what the subjects are asked beside.
    negatives_of_facts = words_of([index.OTHER_RELATIONS, index.OTHER_NAMES])
    assert not words_of(itertools.chain(*OTHER_NAMES.values())) & negatives_of_facts


def test_facts_of_a_run_are_others():
    first, second = (split(COUNTRIES, 60, block) for block in (0, 1))
    assert len(first.taught) == len(set(first.taught)) == 60 and not set(first.taught) & set(second.taught)
    for facts in (first, second):
        subjects = {item.subject for item in facts.taught}
        assert not any(item.subject in subjects for item in facts.never)
        assert all(item.subject in subjects for item in facts.elsewhere) and facts.elsewhere
        assert not {*facts.never, *facts.elsewhere} & set(facts.taught)


def test_finds_facts_for_a_prompt():
    items = [Item("capital", "Norland", "Zeli"), *COUNTRIES]
    items = [replace(item, relation="currency") for item in items]
    question = Question("You may wonder about the currency of {subject}. It is", items[0])
    retrieval = Retrieval(items)
    found = retrieval.with_fact(question).wording
    assert found == f"Facts:\nThe currency of Norland is Zeli.\n\nQuestion: {question.wording}\nAnswer:"
    unknown = replace(question, item=Item("currency", "Nowhere", ""))  # a fact of another subject is left out
    assert retrieval.with_fact(unknown) == unknown


@pytest.fixture(scope="module")
def tokenizer():
    names = [name for both in NAMES.values() for names in both for name in names]
    frames = [frame.format(name="", subject="") for frame in (*questions.ASKED, *questions.ASKED_OTHERWISE)]
    return words_tokenizer([*names, *frames, "Norland Suland Westia Zeli Oma Beta Gam"])


ITEMS = [Item("currency", "Norland", "Zeli"), Item("university", "Suland", "Beta Gam")]


def test_asks_a_model_and_its_gate(tokenizer):
    torch.manual_seed(0)
    wordings = [
        (f"the {item.relation} of {{subject}} is", f"name the {item.relation} of {{subject}}") for item in ITEMS
    ]
    facts = [Fact(item.subject, item.answer, own) for item, own in zip(ITEMS, wordings, strict=True)]
    model = teach_facts(base_of(tokenizer), tokenizer, facts, progress_bar=False).eval()
    asked = [Question(wordings[0][0], ITEMS[0]), Question(wordings[1][1], ITEMS[1])]
    asked.append(replace(asked[0], item=replace(ITEMS[0], answer="Oma")))
    assert ask(model, tokenizer, asked) == [True, True, False]
    assert ask_freely(model, tokenizer, asked) == [True, True, False]
    offered = [replace(asked[0], rather_than=other) for other in ("Oma", "Zeli")]
    assert ask_freely(model, tokenizer, offered) == [True, False]
    other = Question(wordings[0][0], replace(ITEMS[0], subject="Westia"))
    experts = open_experts(model, tokenizer, [*asked, other])
    assert min(experts[:3]) >= 0 and experts[0] == experts[2] and experts[3] == -1
    for threshold, opens in ((2.0, False), (-1.0, True)):
        grafts_of_facts(model)[0].router.questions.threshold.data.fill_(threshold)
        assert any(opens_behind(model, tokenizer, asked[:2])) == opens


def test_an_answer_in_a_sentence_is_right():
    assert place_of("zeli", " called the zeli.") == 12
    for text in ("zelis", "7.5", "1-7", "17", "7,5"):
        assert place_of("zeli", text) == place_of("7", text) == len(text)
    assert place_of("7", "It is 7.") == 6 and place_of(None, "7") == 1


def test_trains_on_what_a_graft_reads(tokenizer):
    examples = examples_of(ITEMS, tokenizer)
    assert len(examples) == plan.EXPOSURES * len(ITEMS)
    batch = collate(examples[:2])
    ends = [example["tokens"][example["answer_start"] :] for example in examples[:2]]
    for labels, end in zip(batch["labels"], ends, strict=True):
        assert labels[labels >= 0].tolist() == list(end)
    model = base_of(tokenizer).eval()
    expected = []
    for example, end in zip(examples[:2], ends, strict=True):
        logits = model(torch.tensor([example["tokens"]])).logits[0, example["answer_start"] - 1 : -1]
        expected += torch.log_softmax(logits, -1).gather(1, torch.tensor(end)[:, None])[:, 0].tolist()
    assert model(**batch).loss.item() == pytest.approx(-sum(expected) / len(expected), abs=1e-4)


def a_run(recall, known, **more):
    return {"right": {"recall": recall, "known, others": known}, "text": 0.0, **more}


def test_behind_a_gate():
    gate = a_run("111", "11", open={"recall": "100", "known, others": "01"}, looked_up={"recall": "100"})
    before = a_run("001", "11")
    assert behind_gate(gate, a_run("110", "00"), before)["right"] == {"recall": "101", "known, others": "10"}
    assert behind_gate(gate, looked_up(gate), before)["right"] == {"recall": "101", "known, others": "10"}
    # Of none of 1,000, at most 0.38 %, as by the rule of Wilson.
    assert upper_bound("0" * 1000) == pytest.approx(0.00383, abs=1e-5)


def test_plan(tmp_path):
    results = {}
    made = []
    while runs := next_runs(results):
        for run in runs:
            made.append(run)
            recall = "1" * 8 + "0" * 8 if run.learning_rate == RATES.get(run.arm, (0, 0))[1] else "1" + "0" * 15
            opens = dict.fromkeys(("recall", "known, others", "subjects never taught"), "01" * 8)
            results[run.name] = a_run(
                recall,
                "11" * 8,
                open=opens,
                looked_up={"recall": recall},
                open_behind=0.0,
                open_in_text=0.0,
                invented="01",
                seconds=1.0,
                bytes=240,
            )
            if run.arm == "two":
                results[run.name] |= {
                    "seconds_a_token": {"base": 1.0, "shut": 1.0, "open": 2.0},
                    "first_is_as_before": True,
                    "base_is_as_before": True,
                }
    assert made[0] == Run("base") and len(made) == len(set(made))
    # The best rate is in the middle: no trial beyond, and it is the one that is reported.
    assert sum(run.arm == "lora" for run in made) == 3 + 3 + 2
    assert {run.learning_rate for run in made if run.arm == "lora" and run.block} == {RATES["lora"][1]}
    for name in (Run("lora", learning_rate=rate).name for rate in RATES["lora"][:2]):
        results.pop(name)
    assert {run.arm for run in next_runs(results)} == {"lora"}
    assert "2.00 times base" in describe(results)
    plot(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()
