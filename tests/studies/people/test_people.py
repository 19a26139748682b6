# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The study of people among real text: what is asked, and a small study from its texts to its tables."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from documentation import ROOT
from main_runs import run_main
from slow_tests import slow
from study_runs import TEXTS
from torch import nn

from common.text_data import train_tokenizer
from studies.common.people import VALUES, draw_people
from studies.people import __main__ as people_study
from studies.people import arms, texts
from studies.people.arms import Arm
from studies.people.report import describe
from studies.people.texts import ask, biography, recall


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
    rows = Dataset.from_dict({"text": [biography(person, np.random.default_rng(0)) for person in people] * 20})
    tokenizer = train_tokenizer(rows, "text", 1000, 128)
    assert recall(Knows(tokenizer, people[:15]), tokenizer, people, batch_size=4) == dict.fromkeys(VALUES, 0.5)
    for attribute in VALUES:
        tokens, begin = ask(tokenizer, people[0], attribute)
        assert tokens[0] == tokenizer.eos_token_id
        assert tokenizer.decode(tokens[begin:]).strip() == " ".join(people[0].attributes[attribute])
        assert not any(tokenizer.decode(tokens[4:begin]) in text for text in rows["text"])


def test_biographies_are_as_long_as_the_page_says():
    generator = np.random.default_rng(0)
    lengths = [len(biography(person, generator)) for person in draw_people(500, seed=0)]
    page = (ROOT / "examples/studies/people/README.md").read_text()
    (millions,) = re.findall(r"([0-9.]+)\s+million of biographies", page)
    assert sum(lengths) / 500 * 10_000 * 20 / 1e6 == pytest.approx(float(millions), rel=0.02)


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
    assert [run["arm"] for run in results["runs"]] == ["dense", "peer"] and len(results["trials"]) == 3
    assert results["runs"][1]["parameters"] > results["runs"][0]["parameters"]
    told = Dataset.from_parquet(str(tmp_path / "train.parquet"))["text"]
    for person in draw_people(20, seed=0):
        assert sum(" ".join(person.name) in text for text in told) == 3
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "results").glob("*.json")}
    run_main(people_study, *flags)
    assert made == {file: file.stat().st_mtime_ns for file in (tmp_path / "results").glob("*.json")}
    with pytest.raises(ValueError, match="people"):
        run_main(people_study, *flags, "--people", "30")
