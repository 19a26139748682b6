# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The study of facts: reading facts, measuring a model, comparing arms, and resuming."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, DatasetDict
from main_runs import run_main
from slow_tests import slow
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from common.text_data import train_tokenizer
from studies.facts import __main__ as facts_study
from studies.facts import factbook
from studies.facts import study as shared
from studies.facts.arms import ARMS
from studies.facts.factbook import RELATIONS, load_facts
from studies.facts.report import choose_hyperparameters, curve_of, forgetting_at
from studies.facts.sentences import Sentence, ask, make_sentence


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


TEXTS = [
    f"The capital of {name} is {name}ville. People in {name} pay in dollars, and say so." for name in "ABCDEFGHIJ"
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(Dataset.from_dict({"text": TEXTS * 3}), "text", 300, 256)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": None}
    options = {"initializer_range": 0.2, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, **tokens, **options)
    return LlamaForCausalLM(config).eval()


def test_losses_and_matches_are_those_of_each_sentence_alone(model, tokenizer):
    """
    Of any answers, and of what is decoded: a match, unless what is decoded next goes on with the last word of the answer.
    """
    answers = ["Aville", "pay in dollars, and say so", "B"]
    sentences = [make_sentence(tokenizer, "The capital of A is", answer) for answer in answers]
    for name in "ABCDEFGHIJ":
        tokens = tokenizer(f"The capital of {name} is", return_tensors="pt").input_ids
        said = model.generate(tokens, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(tokens))[0]
        for length, shift in itertools.product((1, 2, 3), (0, 1)):  # also with another token at the end
            *answered, last = said[: tokens.shape[1] + length].tolist()
            answered.append((last + shift) % len(tokenizer))
            sentences.append(Sentence(answered + tokenizer(".").input_ids, length))
    losses, matches = ask(model, tokenizer, sentences, batch_size=2)
    for sentence, loss, match in zip(sentences, losses, matches, strict=True):
        tokens = torch.tensor([sentence.input_ids])
        start = len(sentence.input_ids) - 1 - sentence.answer_length
        logits, answer = model(input_ids=tokens).logits[0, start - 1 : -1], tokens[0, start:-1]
        assert_close(loss, torch.nn.functional.cross_entropy(logits[:-1], answer))
        *said, following = logits.argmax(-1).tolist()
        assert match == (said == answer.tolist() and not tokenizer.decode(following)[:1].isalnum())
    assert 0 < matches.sum() < len(matches) // 2  # of both kinds


def run_of(arm, rate, *points):
    """A run whose points have a loss of new facts, one of a text, and loss and matches of each kind of known facts."""
    measured = []
    for new, text, known, matches, elsewhere, matches_elsewhere in ((5.0, 3.0, 1.0, 0.8, 2.0, 0.5), *points):
        kinds = {"new": (new, 0.5), "known": (known, matches), "known_elsewhere": (elsewhere, matches_elsewhere)}
        asked = {kind: {"loss": loss, "matches": matched} for kind, (loss, matched) in kinds.items()}
        measured.append({"texts": {"a": text, "b": 1.0}, **asked})
    return {"arm": arm, "settings": {"learning_rate": rate}, "seed": 0, "points": measured}


def test_forgetting_between_points():
    """Of each kind of known facts by itself, where what was learned is first reached."""
    points = [(4.0, 3.2, 1.0, 0.8, 2.2, 0.4), (2.0, 4.2, 3.0, 0.4, 2.6, 0.2), (3.0, 9.0, 9.0, 0.0, 9.0, 0.0)]
    run = run_of("full", 1, *points)
    kinds = ("learning", "texts", "known_loss", "known_drop", "known_elsewhere_loss", "known_elsewhere_drop")
    assert curve_of(run)[1] == pytest.approx(dict(zip(kinds, (1.0, 0.1, 0.0, 0.0, 0.2, 20.0), strict=True)))
    expected_at = {2.0: (0.35, 1.0, 25.0, 0.4, 40.0), 0.5: (0.05, 0.0, 0.0, 0.1, 10.0), 0.0: 5 * (0.0,)}
    for level, expected in expected_at.items():
        assert forgetting_at(level, run) == pytest.approx(dict(zip(kinds[1:], expected, strict=True)))
    assert forgetting_at(3.1, run) is None


def test_settings_that_forget_least_of_those_that_learn_enough():
    elsewhere = (2.0, 0.5)  # has no part in it
    runs = [
        run_of("full", 1, (4.5, 3.0, 1.0, 0.8, *elsewhere)),  # learns too little
        run_of("full", 2, (3.0, 3.2, 1.0, 0.6, *elsewhere)),
        run_of("full", 3, (1.0, 9.0, 1.0, 0.0, *elsewhere)),
        run_of("full", 6, (3.0, 3.0, 1.4, 0.4, *elsewhere)),  # texts alone are better
        run_of("lora", 4, (4.0, 3.1, 1.0, 0.8, *elsewhere)),
        run_of("lora", 5, (4.1, 3.0, 1.0, 0.8, *elsewhere)),
    ]
    level, chosen = choose_hyperparameters(runs)
    assert level == pytest.approx(0.95)  # a little less than LoRA's 1
    assert chosen == {"full": {"learning_rate": 2}, "lora": {"learning_rate": 4}}


@pytest.fixture
def study_here(countries, model, tokenizer, tmp_path, monkeypatch):
    """Runs the study of a tiny model, one setting an arm, and returns the labels of the runs that were made."""
    base = tmp_path / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    corpus = Dataset.from_dict({"text": TEXTS * 40})
    monkeypatch.setattr(shared, "load_corpus", lambda name: DatasetDict(train=corpus, validation=corpus))
    monkeypatch.setattr(facts_study, "ARMS", {name: replace(arm, sweep=arm.sweep[:1]) for name, arm in ARMS.items()})
    flags = ("--output_dir", tmp_path / "study", "--model_name_or_path", base, "--min_loss", 0.0, "--seeds", 2)
    flags += ("--num_experts", 64, "--graft_layers", 1, "--steps", 4, "--batch_size", 4, "--measurements", 2)
    flags += ("--eval_blocks", 2, "--background_blocks", 4)
    train, made = facts_study.train_facts, []

    def counted(model, study, hyperparameters, seed, callbacks):
        made.append((hyperparameters, seed))
        return train(model, study, hyperparameters, seed, callbacks)

    # Something to know: of a fact that is asked for, what is said.
    def told(model, tokenizer, sentences, *args):
        losses, matches = ask(model, tokenizer, sentences, *args)
        matches[: 2 * len(matches) // 4] = True
        return losses, matches

    monkeypatch.setattr(facts_study, "train_facts", counted)
    monkeypatch.setattr(shared, "ask", told)

    def run(*more):
        made.clear()
        run_main(facts_study, *flags, *more)
        return list(made)

    return run


@slow
def test_goes_on_where_it_was_stopped(study_here, tmp_path):
    folder = tmp_path / "study"
    assert len(study_here()) == 2 * len(ARMS)
    results = json.loads((folder / "results.json").read_text())
    assert set(results["arms"]) == set(ARMS) and (folder / "results.png").stat().st_size
    for run in results["runs"]:
        assert [each["step"] for each in run["points"]] == [0, 1, 4]
        assert run["without_adapter_as_before"] is (None if run["arm"] == "full" else True)
    chosen = json.loads((folder / "facts.json").read_text())
    assert chosen["new"] and chosen["known"]
    assert not [fact for fact in chosen["new"] if fact in chosen["known"]]
    assert study_here() == []
    (lost,) = folder.glob("runs/lora*seed=1.json")
    content = json.loads(lost.read_text())
    lost.unlink()
    lost.with_suffix(".unfinished").write_text("{")  # killed while it was written
    torch.manual_seed(123)  # whatever state the killed command left
    assert [seed for _, seed in study_here()] == [1]
    assert json.loads(lost.read_text())["points"] == content["points"]


def test_chosen_hyperparameters_on_other_facts(study_here, tmp_path):
    study_here("--arms", "full", "lora", "--seeds", "1", "--num_new", "1")
    (earlier,) = json.loads((tmp_path / "study" / "facts.json").read_text())["new"]
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    for rate, result in zip((2e-3, 5e-3), results["arms"].values(), strict=True):
        result["settings"] = {"learning_rate": rate}  # none of those that are swept
    file, folder = tmp_path / "chosen.json", tmp_path / "apart"
    file.write_text(json.dumps(results))
    apart = ("--output_dir", str(folder), "--untaught_relations", "capital", "--chosen", str(file))
    made = study_here("--arms", "lora", "full", *apart)
    assert [(each["learning_rate"], seed) for each, seed in made] == [(5e-3, 0), (2e-3, 0), (5e-3, 1), (2e-3, 1)]
    results = json.loads((folder / "results.json").read_text())
    assert results["equal_learning"] == min(max(each["learning"] for each in curve_of(run)) for run in results["runs"])
    assert len(results["runs"]) == 4
    for rate, result in zip((5e-3, 2e-3), results["arms"].values(), strict=True):
        assert result["settings"] == {"learning_rate": rate} and result["seeds_that_learned_as_much"] == 2
    chosen = json.loads((folder / "facts.json").read_text())
    assert chosen["new"] and earlier not in chosen["new"]
