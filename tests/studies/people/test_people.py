# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The study of people among real text: what is asked, and a small study from its texts to its tables."""

import json
import math
import re
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from main_runs import run_main
from slow_tests import slow
from study_runs import TEXTS
from torch import nn
from transformers import AutoTokenizer

from common.text_data import train_tokenizer
from studies.common.parallel_runs import results_of
from studies.common.people import VALUES, draw_people
from studies.common.study_folder import write_json
from studies.common.training_plan import CORPUS
from studies.people import __main__ as people_study
from studies.people import arms, measure, report, texts
from studies.people.arms import Run
from studies.people.measure import (
    NEVER_TRAINED,
    OTHERS,
    PLACES,
    TOLD,
    TOLD_OF_OTHERS,
    WORDINGS,
    ask,
    documents_before,
    make,
    recall,
)
from studies.people.texts import GROUPS, biography, groups_of_people, prepare


class Knows(nn.Module):
    """Answers the questions of some people, and nothing else."""

    def __init__(self, tokenizer, people):
        super().__init__()
        self.known = [ask(tokenizer, person, attribute, NEVER_TRAINED)[0] for person in people for attribute in VALUES]
        self.size = len(tokenizer)

    def forward(self, tokens, past_key_values=None, use_cache=False):
        if use_cache:
            return SimpleNamespace(past_key_values=[tokens])
        self.before = past_key_values.pop()
        logits = torch.zeros(*tokens.shape, self.size)
        for row, own in enumerate(tokens.tolist()):
            for known in self.known:
                if own[: len(known)] == known:
                    logits[row, range(len(known) - 1), known[1:]] = 1
        return SimpleNamespace(logits=logits)


def test_recall_is_of_whole_answers():
    people = draw_people(30, seed=0)
    generator = np.random.default_rng(0)
    rows = Dataset.from_dict({"text": [biography(person, generator) for _ in range(20) for person in people]})
    assert [text.count(" ".join(people[0].name)) for text in rows["text"][::30]] == [len(VALUES)] * 20
    tokenizer = train_tokenizer(rows, "text", 1000, 128)
    model, before = Knows(tokenizer, people[:15]), torch.arange(62).reshape(31, 2)
    found = recall(model, tokenizer, people, NEVER_TRAINED, before, batch_size=4)
    assert model.before.tolist() == [[56, 57, tokenizer.eos_token_id], [58, 59, tokenizer.eos_token_id]]
    assert found["recalled"] == dict.fromkeys(VALUES, 0.5)
    assert found["right"] == dict.fromkeys(VALUES, "1" * 15 + "0" * 15)
    size = len(tokenizer)
    surprises = [math.log2(math.e + size - 1) - math.log2(math.e), math.log2(size)]  # of a token, known or not
    for attribute, values in VALUES.items():
        asked = [ask(tokenizer, person, attribute, NEVER_TRAINED) for person in people]
        bits = [surprises[place >= 15] * (len(each) - begin) for place, (each, begin) in enumerate(asked)]
        entropy = sum(math.log2(len(each)) for each in values)
        assert found["bits"][attribute] == pytest.approx(entropy - sum(bits) / 30, rel=1e-5)
    for attribute in VALUES:
        tokens, begin = ask(tokenizer, people[0], attribute, NEVER_TRAINED)
        assert tokenizer.decode(tokens[begin:]).strip() == " ".join(people[0].attributes[attribute])
        own = [text for text in rows["text"] if " ".join(people[0].name) in text]
        for wording, is_read, is_read_of_them in (
            (NEVER_TRAINED, False, False),
            (TOLD_OF_OTHERS, True, False),
            (TOLD, True, True),
        ):
            tokens, begin = ask(tokenizer, people[0], attribute, wording)
            words = " ".join(tokenizer.decode(tokens[:begin]).split()[3:])
            assert any(words in text for text in rows["text"]) == is_read
            assert any(words in text for text in own) == is_read_of_them


def test_groups_are_told_of_as_often():
    groups = groups_of_people()
    assert {told: len(people) for told, people in groups.items()} == GROUPS
    assert len({told * len(people) for told, people in groups.items()}) == 1
    names = [person.name for people in groups.values() for person in people]
    assert len(set(names)) == len(names)


def test_ratios_are_of_what_is_recalled_above_others():
    def run(*right):
        groups = zip(("2", "1", OTHERS), right, strict=True)
        return {
            "recall": {group: {TOLD: {"right": {"major": 25 * each, "employer": 25 * each}}} for group, each in groups}
        }

    peer, dense = run("1111", "1100", "0001"), run("1100", "0000", "0000")
    assert report.above_others(peer, TOLD)[0] == pytest.approx((1 + 0.5) / 2 - 0.25)
    assert len(set(report.above_others(peer, TOLD))) > 3
    ratio, low, high = map(float, re.findall(r"[\d.]+", report.times_dense(peer, dense, TOLD)))
    assert ratio == 2.0 and 1.4 < low < 1.8 and 2.2 < high < 2.8
    assert report.times_dense(peer, run("0000", "0000", "0000"), TOLD) == "at least 25.0"
    assert report.times_dense(run("0000", "0000", "0000"), run("0000", "0000", "0000"), TOLD) == "neither recalls them"
    # The people who are drawn anew are the same for all.
    assert report.times_dense(dense, dense, TOLD).startswith("1.00 (1.00 to 1.00")


@slow
def test_a_small_study(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(texts, "load_corpus", lambda name: TEXTS["old" if name in texts.TRAINING_TEXTS else "new"])
    small = {"BLOCK": 32, "CHARACTERS": 30_000, "GROUPS": {6: 5, 3: 10}, "NUM_HELD_OUT": 4, "TOKENS_PER_STEP": 64}
    small |= {
        "ASKED": 5,
        "BEFORE": 8,
        "TRAININGS": (Run("peer", 3, 1e-3, 0.02), Run("dense", 3, 1e-3, 0.02), Run("dense", 4, 1e-3, 0.02)),
        "ARMS": {"peer": ("peer-nano", {}), "dense": ("dense-nano", {})},
    }
    for module in (texts, arms, measure, report, people_study):
        for name in small.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, small[name])
    prepare(tmp_path)
    told = Dataset.from_parquet(str(tmp_path / "train.parquet"))["text"]
    for place, person in enumerate(draw_people(15, seed=0)):
        assert sum(" ".join(person.name) in text for text in told) == (6 if place < 5 else 3)
    tokenizer, groups = AutoTokenizer.from_pretrained(tmp_path / "tokenizer"), groups_of_people()
    before = documents_before(tokenizer, torch.arange(128).reshape(4, 32))
    assert {place: each.shape for place, each in before.items()} == dict(
        zip(PLACES, [(5, 0), (5, 8), (5, 8)], strict=True)
    )
    assert before[PLACES[1]].tolist() == [list(range(first, first + 8)) for first in range(0, 120, 24)]
    for tokens, person in zip(before[PLACES[2]], groups[3][5:], strict=True):  # the first five are asked
        text = tokenizer.decode(tokens)
        assert text.endswith(".") and any(value[-1] in text for value in person.attributes.values())
    runs = small["TRAININGS"][:2]
    for run in runs:
        write_json(tmp_path / "runs" / f"{run.name}.json", {**asdict(run), **make(run, tmp_path)})
    results = results_of(tmp_path)
    peer, dense = (results[run.name] for run in runs)
    assert peer["parameters"] > dense["parameters"]
    assert [*peer["recall"]] == ["6", "3", OTHERS]
    for found in (*peer["recall"].values(), *dense["recall"].values()):
        assert [*found] == [*WORDINGS, *(wording + place for place in PLACES[1:] for wording in WORDINGS[:2])]
    run_main(people_study, "--output_dir", str(tmp_path), "--hours", "0")
    printed = capsys.readouterr().out
    assert "the same command goes on" in printed
    assert all(f"| {arm} " in printed for arm in ("peer", "dense", "4-gram"))
    assert "peer below dense" in printed
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["runs"] == results and saved["ngrams"]["tokens"] <= 3 * 64
    saved["runs"][runs[0].name]["texts"][CORPUS] = "another"
    write_json(tmp_path / "other.json", saved)
    with pytest.raises(SystemExit, match=f"{runs[0].name} .* other texts"):
        run_main(
            people_study, "--output_dir", str(tmp_path), "--hours", "0", "--results", str(tmp_path / "other.json")
        )
    monkeypatch.setattr(people_study, "GROUPS", {6: 6})
    with pytest.raises(SystemExit, match="groups"):
        run_main(people_study, "--output_dir", str(tmp_path), "--hours", "0")
