# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The study of people among real text: what is asked, and a small study from its texts to its tables."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from main_runs import run_main
from slow_tests import slow
from study_runs import TEXTS
from torch import nn

from common.text_data import train_tokenizer
from studies.common.people import VALUES, draw_people
from studies.people import __main__ as people_study
from studies.people import arms, texts
from studies.people.arms import ARMS, LARGER, USUAL, Arm, next_trial
from studies.people.report import describe
from studies.people.texts import NEVER_TRAINED, TOLD, TOLD_OF_OTHERS, ask, biography, recall


class Knows(nn.Module):
    """Answers the questions of some people, and nothing else."""

    def __init__(self, tokenizer, people):
        super().__init__()
        self.known = [ask(tokenizer, person, attribute)[0] for person in people for attribute in VALUES]
        self.size = len(tokenizer)

    def forward(self, tokens):
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
    tokenizer = train_tokenizer(rows, "text", 1000, 128)
    found = recall(Knows(tokenizer, people[:15]), tokenizer, people, batch_size=4)
    assert found["recalled"] == dict.fromkeys(VALUES, 0.5)
    size = len(tokenizer)
    surprises = [math.log2(math.e + size - 1) - math.log2(math.e), math.log2(size)]  # of a token, known or not
    for attribute, values in VALUES.items():
        asked = [ask(tokenizer, person, attribute) for person in people]
        bits = [surprises[place >= 15] * (len(each) - begin) for place, (each, begin) in enumerate(asked)]
        entropy = sum(math.log2(len(each)) for each in values)
        assert found["bits"][attribute] == pytest.approx(entropy - sum(bits) / 30, rel=1e-5)
    for attribute in VALUES:
        tokens, begin = ask(tokenizer, people[0], attribute)
        assert tokens[0] == tokenizer.eos_token_id
        assert tokenizer.decode(tokens[begin:]).strip() == " ".join(people[0].attributes[attribute])
        own = [text for text in rows["text"] if " ".join(people[0].name) in text]
        for wording, is_read, is_read_of_them in (
            (NEVER_TRAINED, False, False),
            (TOLD_OF_OTHERS, True, False),
            (TOLD, True, True),
        ):
            tokens, begin = ask(tokenizer, people[0], attribute, wording)
            words = " ".join(tokenizer.decode(tokens[1:begin]).split()[3:])
            assert any(words in text for text in rows["text"]) == is_read
            assert any(words in text for text in own) == is_read_of_them


def test_trials_go_on_beyond_the_best():
    def all_trials(loss_of):
        losses = {}
        while run := next_trial("dense", 120, losses):
            assert run.is_trial and run not in losses
            losses[run] = loss_of(run.learning_rate, run.initializer_range)
        return [(run.learning_rate, run.initializer_range) for run in losses]

    low, middle, high = ARMS["dense"].rates
    three = [(rate, USUAL) for rate in ARMS["dense"].rates]
    assert all_trials(lambda rate, weights: abs(rate - middle) + weights) == [*three, (middle, LARGER)]
    found = all_trials(lambda rate, weights: -rate - weights)
    assert found == [*three, (high, LARGER), (2 * high, LARGER)]
    found = all_trials(lambda rate, weights: rate + weights)
    assert found == [*three, (low, LARGER), (low / 2, USUAL)]


@slow
def test_a_small_study(tmp_path, monkeypatch, capsys):
    small = {"dense": Arm("dense-nano", (1e-3, 2e-3), {}), "peer": Arm("peer-nano", (1e-3,), {})}
    for module in (people_study, arms):
        monkeypatch.setattr(module, "ARMS", small)
    monkeypatch.setattr(texts, "load_corpus", lambda name: TEXTS["old" if name in texts.TRAINING_TEXTS else "new"])
    sizes = {"people": 20, "exposures": 3, "characters": 30_000, "block_size": 32, "held_out_sequences": 4}
    flags = [str(part) for name, value in sizes.items() for part in (f"--{name}", value)]
    flags += ["--seconds", "1", "--trial_steps", "2", "--output_dir", str(tmp_path)]
    run_main(people_study, *flags, "--hours", "0")
    assert "the same command goes on" in capsys.readouterr().out
    run_main(people_study, *flags)
    results = json.loads((tmp_path / "results.json").read_text())
    assert describe(results) in capsys.readouterr().out
    assert [run["arm"] for run in results["runs"]] == ["peer", "dense"]
    for arm, number in (("dense", 3), ("peer", 2)):  # and perhaps one beyond
        assert sum(run["arm"] == arm for run in results["trials"]) in (number, number + 1)
    assert results["runs"][0]["parameters"] > results["runs"][1]["parameters"]
    told = Dataset.from_parquet(str(tmp_path / "train.parquet"))["text"]
    for person in draw_people(20, seed=0):
        assert sum(" ".join(person.name) in text for text in told) == 3
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "results").glob("*.json")}
    run_main(people_study, *flags)
    assert made == {file: file.stat().st_mtime_ns for file in (tmp_path / "results").glob("*.json")}
    with pytest.raises(SystemExit, match="people"):
        run_main(people_study, *flags, "--people", "30")
