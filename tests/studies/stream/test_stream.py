# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The study of streams: measures, the comparison at equal learning, and resuming."""

import json
import math
from functools import partial

import pytest
import torch
from datasets import Dataset, DatasetDict
from main_runs import run_main
from slow_tests import slow

from modeling_peer import PeerForCausalLM, fit_gates
from studies.stream import __main__ as stream_study
from studies.stream import arms as stream_arms
from studies.stream import report
from studies.stream.arms import Arm, with_rates


def test_what_is_chosen_is_tried_and_chosen_again(monkeypatch):
    """Learning is the square root of the rate, and a line through two runs is a bad guess of it."""
    made = []

    def run(arm, hyperparameters, seed):
        made.append((arm, hyperparameters["learning_rate"], seed))
        learned = hyperparameters["learning_rate"] ** (0.5 if arm == "full" else 0.1)
        losses = [[3.0, 6.0], [3.5, 6.0 - learned]]
        return {"arm": arm, "settings": hyperparameters, "seed": seed, "losses": losses}

    arms = {"full": Arm("", None, with_rates(0.1, 10.0)), "lora": Arm("", None, with_rates(1.0, 2.0))}
    monkeypatch.setattr(report, "MOST_RATES_BEYOND", 0)
    runs, level, chosen = stream_study.run_all(arms, 2, run)
    assert level == pytest.approx(2**0.1)
    assert chosen["lora"] == {"learning_rate": 2.0}
    assert chosen["full"]["learning_rate"] ** 0.5 == pytest.approx(level, rel=0.05)
    assert made[4][0] == "full" and made[4][1] != chosen["full"]["learning_rate"]
    assert made[-2:] == [("full", chosen["full"]["learning_rate"], 1), ("lora", 2.0, 1)]
    assert len(runs) == len(made) == len(set(made))


# Each held-out document has a word of its own.
TEXTS = {
    name: DatasetDict(
        {
            "train": Dataset.from_list([{"text": words * 400}] * 4),
            "validation": Dataset.from_list([{"text": f"{words}{name}{i} " * 100} for i in range(4)]),
        }
    )
    for name, words in {"old": "one two three ", "new": "four five six "}.items()
}


@pytest.fixture
def study(monkeypatch, tmp_path):
    """The study at its smallest, as a function of further flags."""
    monkeypatch.setattr(stream_study, "load_corpus", TEXTS.get)
    monkeypatch.setattr(report, "MOST_RATES_BEYOND", 0)

    def main(*flags):
        named = ("--output_dir", tmp_path, "--pretraining_texts", "old", "--stream", "new", "--pretraining_steps", 1)
        sizes = ("--stage_steps", 1, "--block_size", 32, "--eval_sequences", 2, "--seeds", 2)
        run_main(stream_study, *named, *sizes, *flags)
        return json.loads((tmp_path / "results.json").read_text())

    return main


@slow
def test_all_arms_come_to_their_end(study, tmp_path, monkeypatch):
    monkeypatch.setattr(stream_arms, "fit_gates", partial(fit_gates, num_steps=20))
    arms = dict(stream_study.ARMS)
    for name, arm in arms.items():
        monkeypatch.setitem(stream_study.ARMS, name, arm.__class__(arm.label, arm.learn, arm.sweep[:1], arm.base))
    results = study()
    assert list(results["arms"]) == list(arms) and (tmp_path / "results.png").stat().st_size > 10_000
    for run in results["runs"]:
        first, last = run["losses"]
        assert all(map(math.isfinite, last)) and last[1] < first[1], run["arm"]
        assert len(run["losses_to_choose_by"]) == 2 and run["losses_to_choose_by"] != run["losses"]
        if run["arm"].startswith("protected") or run["arm"] == "open":
            assert run["masked"] == [first]  # without what it added it is the model it was
        else:
            assert not run["masked"]
    assert {result["seeds"] for result in results["arms"].values()} == {2}


def test_goes_on_where_it_was_killed(study, tmp_path, monkeypatch):
    def killed(*_):
        raise SystemExit("killed")

    first = stream_study.ARMS["full"]
    with monkeypatch.context() as patch:
        patch.setitem(stream_study.ARMS, "experts", first.__class__("", killed, ({"learning_rate": 1.0},)))
        with pytest.raises(SystemExit, match="killed"):
            study("--arms", "full", "experts")
    saved = {path: path.read_bytes() for path in (tmp_path / "stages").iterdir()}
    assert len(saved) == len(first.sweep)
    # What is there is read, not made again.
    with monkeypatch.context() as patch:
        patch.setitem(stream_study.ARMS, "full", first.__class__("", killed, first.sweep))
        patch.setattr(stream_study, "Trainer", killed)
        study("--arms", "full", "--seeds", "1")
    assert {path: path.read_bytes() for path in (tmp_path / "stages").iterdir()} == saved


def test_a_pre_training_that_was_killed_after_its_last_step_makes_no_more(study, tmp_path, monkeypatch):
    save = stream_study.Trainer.save_model

    def save_checkpoints_alone(trainer, folder, _internal_call=False):
        if not _internal_call:
            raise SystemExit("killed")
        save(trainer, folder, _internal_call=True)

    with monkeypatch.context() as patch:
        patch.setattr(stream_study.Trainer, "save_model", save_checkpoints_alone)
        patch.setitem(stream_study.PRETRAINING, "save_steps", 1)
        with pytest.raises(SystemExit, match="killed"):
            study("--arms", "full")
    saved = PeerForCausalLM.from_pretrained(tmp_path / "peer-training" / "checkpoint-1").state_dict()
    study("--arms", "full", "--seeds", "1")
    found = PeerForCausalLM.from_pretrained(tmp_path / "peer").state_dict()
    assert saved.keys() == found.keys() and all(torch.equal(found[name], saved[name]) for name in saved)
