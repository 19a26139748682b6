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
from studies.teaching.plan import RATES, Run, best, next_runs
from studies.teaching.questions import NAMES, OTHER_NAMES, Item, Question, as_fact, negatives, recall_of, split, uses
from studies.teaching.report import NEGATIVES, behind_gate, describe, looked_up, plot, runs_of, upper_bound


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
    # By any taught name, and only a fact whose subject is named.
    assert retrieval.nearest(replace(question, wording="{subject}'s official money")) == items[0]
    for subject in ("Nowhere", "Norlandia"):
        unknown = replace(question, item=Item("currency", subject, ""))
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
    examples = examples_of(ITEMS, tokenizer, 1)
    assert len(examples) == plan.EXPOSURES * len(ITEMS)
    for item in ITEMS:  # as often as a text as in a chat
        own = [tokenizer.decode(example["tokens"]) for example in examples]
        own = [text for text in own if item.answer in text]
        assert len(own) == plan.EXPOSURES and sum("<user>" in text for text in own) == plan.EXPOSURES / 2
    assert examples_of(ITEMS, tokenizer, 2) != examples
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


NEVER = "subjects never taught"


def a_run(recall, known, invented="000", **more):
    right = {"recall": recall, "known, others": known}
    return {"right": right, "invented": {NEVER: invented}, "text": 0.0, **more}


def test_behind_a_gate():
    opens = {"recall": "100", "known, others": "01", NEVER: "1100"}
    gate = a_run("111", "11", open=opens, looked_up={"recall": "100"})
    before = a_run("001", "11", "001")
    for run, invented in ((a_run("110", "00", "010"), "011"), (looked_up(gate), "111")):
        found = behind_gate(gate, run, before)
        assert found["right"] == {"recall": "101", "known, others": "10"} and found["invented"] == {NEVER: invented}
    # Of none of 1,000, at most 0.38 %, as by the rule of Wilson.
    assert upper_bound("0" * 1000) == pytest.approx(0.00383, abs=1e-5)


def test_plan(tmp_path):
    results = {}
    made = []
    while runs := next_runs(results):
        for run in dict.fromkeys(runs):
            made.append(run)
            recall = "1" * 8 + "0" * 8 if run.learning_rate == RATES.get(run.arm, (0, 0))[1] else "1" + "0" * 15
            opens = dict.fromkeys(("recall", "known, others", *NEGATIVES), "01" * 8)
            results[run.name] = a_run(
                recall,
                "11" * 8,
                open=opens,
                looked_up={"recall": recall},
                open_behind=0.0,
                open_in_text=0.0,
                seconds=1.0,
                bytes=240,
                block=run.block,
            )
            results[run.name]["invented"] = dict.fromkeys(NEGATIVES, "01")
            if run.arm == "two":
                results[run.name] |= {
                    "seconds_a_token": {"of a text": {"base": 1.0, "taught": 2.0}},
                    "first_is_as_before": True,
                    "base_is_as_before": True,
                }
            if run.arm == "seconds":
                results[run.name]["seconds"] = {"facts": 1234.5, "full": 2.0}
    assert made[0] == Run("base") and len(made) == len(set(made))
    arms = [run.arm for run in made]
    assert arms.index("two") == 1 + 3 * 3 and {*arms[: arms.index("two")]} == {"base", "facts", "bm25", "nothing"}
    assert arms.index("seconds") == arms.index("two") + 1
    # The best rate is in the middle: no trial beyond, and it is the one that is reported.
    assert sum(run.arm == "lora" for run in made) == 3 + 3 + 1
    assert {run.learning_rate for run in made if run.arm == "lora" and run.block} == {RATES["lora"][1]}
    for name in (Run("lora", learning_rate=rate).name for rate in RATES["lora"][:2]):
        results.pop(name)
    assert {run.arm for run in next_runs(results)} == {"lora"}
    table = describe(results)
    assert "the gate before full finetuning" in table and "the gate's fact, looked up" in table
    # Runs of other seeds are no pair.
    results.pop(Run("nothing", block=2).name)
    assert len(runs_of("lookup", 240, results)) == 2
    # Of rates that recall as much the lowest is taken.
    rates = RATES["full"]
    level = {Run("full", learning_rate=rate): a_run("1" * 99 + "0", "1") for rate in rates}
    level[Run("full", learning_rate=rates[2])] = a_run("1" * 100, "1")
    level[Run("full", learning_rate=rates[0])] = a_run("1" * 90 + "0" * 10, "1")
    assert best([*level], {run.name: result for run, result in level.items()}).learning_rate == rates[1]
    assert "2.00 times base" in describe(results) and "1,234" in describe(results)
    plot(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()
