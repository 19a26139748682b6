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
"""The study of streams: measures, the comparison at equal learning, and resuming."""

import json
import math
import re
import sys
from functools import partial

import pytest
import torch
from datasets import Dataset, DatasetDict
from slow_tests import slow
from tiny_models import random_tokens, tiny_config, tiny_model
from transformers import AutoTokenizer

from modeling_peer import PeerForCausalLM, fit_gates, generate_text, masked_experts
from studies.common.arms import run_all, with_rates
from studies.common.study_folder import sole_use
from studies.stream import __main__ as stream_study
from studies.stream import arms as stream_arms
from studies.stream import report
from studies.stream.arms import Arm, Stage
from studies.stream.report import (
    choose_hyperparameters,
    describe,
    describe_shares,
    measures,
    shown_orders,
    summarize,
)


def run_of(arm, losses, seed=0, rate=1.0, masked=(), **others):
    hyperparameters = {"learning_rate": rate}
    return {
        "arm": arm,
        "settings": hyperparameters,
        "seed": seed,
        "losses": losses,
        "masked": list(masked),
        "seconds": 1.0,
        **others,
    }


def cells_of(table):
    """The cells of a table, row by row."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")]


# Two texts after the pre-training: rows are stages, columns texts.
LOSSES = [[3.0, 6.0, 5.0], [3.2, 4.0, 4.5], [3.5, 4.4, 3.0]]


class TestReport:
    def test_measures(self):
        found = measures(run_of("full", LOSSES, masked=[[3.0, 6, 5], [3.1, 6, 5]]))
        assert found == pytest.approx(
            {
                "learning": ((6 - 4) + (5 - 3)) / 2,
                "forgetting": ((3.5 - 3) + (4.4 - 4)) / 2,
                "backward_transfer": -0.45,
                "forgetting_of_pretraining": 0.5,
                "forgetting_of_pretraining_masked": 0.1,
                "forward_transfer": 5 - 4.5,
                "final_mean": (3.5 + 4.4 + 3) / 3,
            }
        )

    def test_arms_are_compared_at_what_all_of_them_learned(self):
        def swept(arm, rate, learned, forgotten, **hyperparameters):
            run = run_of(arm, [[3.0, 6.0], [3.0 + forgotten, 6.0 - learned]], rate=rate)
            return {**run, "settings": {**run["settings"], **hyperparameters}}

        runs = [
            swept("full", 1, 1.0, 0.1),
            swept("full", 100, 3.0, 0.9),
            swept("full", 1000, 3.5, 2.0),
            swept("lora", 1, 2.0, 0.2),
            swept("lora", 2, 1.9, 0.1),  # learns less again: nothing to look for between
            swept("sparse", 1, 3.0, 0.9, t=1),
            swept("sparse", 10, 4.0, 2.0, t=1),
            swept("sparse", 4, 1.8, 0.1, t=2),  # learns too little at any rate
            swept("sparse", 1, 1.0, 0.0, t=3),
            swept("sparse", 10, 3.0, 0.2, t=3),
        ]
        level, chosen = choose_hyperparameters(runs)
        assert level == pytest.approx(2.0)
        assert chosen == {
            "full": {"learning_rate": 10},  # half way between the runs around the level, as rates go
            "lora": {"learning_rate": 1},
            "sparse": {"learning_rate": 3.2, "t": 3},
        }
        # Of families that learn more with any rate, a slower one is sought, and forgets what it would forget there.
        assert choose_hyperparameters([*runs[3:7]])[1]["sparse"] == {"learning_rate": 0.1, "t": 1}

    def test_hyperparameters_are_chosen_by_other_losses_than_are_reported(self):
        def swept(arm, rate, learned, forgotten, reported):
            """A run that learned and forgot by the text to choose by, and `reported` by the text that is reported."""
            losses = [[3.0, 6.0], [3.0 + forgotten, 6.0 - learned]]
            return run_of(arm, [[3.0, 6.0], [3.0 + reported, 6.0 - reported]], rate=rate, losses_to_choose_by=losses)

        runs = [
            swept("full", 1, 1.0, 0.5, reported=7.0),
            swept("full", 10, 2.0, 0.7, reported=0.1),
            swept("lora", 3, 2.0, 0.5, reported=9.0),
        ]
        level, chosen = choose_hyperparameters(runs)
        assert level == 2.0 and chosen == {"full": {"learning_rate": 10}, "lora": {"learning_rate": 3}}
        summary = summarize(runs, ["a", "b"], level, chosen, {})
        found = {arm: result["mean"] for arm, result in summary["arms"].items()}
        for arm, reported in (("full", 0.1), ("lora", 9.0)):
            assert [found[arm][name] for name in ("learning", "forgetting")] == pytest.approx([reported, reported])
        # Of two families at the level the one is chosen that forgets less of the text to choose by.
        family = {**swept("full", 20, 2.0, 0.6, reported=8.0), "settings": {"learning_rate": 20, "t": 1}}
        assert choose_hyperparameters([*runs, family])[1]["full"] == {"learning_rate": 20, "t": 1}

    def test_what_is_chosen_is_tried_and_chosen_again(self):
        """Learning is the square root of the rate, and a line through two runs is a bad guess of it."""
        made = []

        def run(arm, hyperparameters, seed):
            made.append((arm, hyperparameters["learning_rate"], seed))
            learned = hyperparameters["learning_rate"] ** (0.5 if arm == "full" else 0.1)
            return {
                **run_of(arm, [[3.0, 6.0], [3.5, 6.0 - learned]], rate=hyperparameters["learning_rate"]),
                "seed": seed,
            }

        arms = {"full": Arm("", None, with_rates(0.1, 10.0)), "lora": Arm("", None, with_rates(1.0, 2.0))}
        runs, level, chosen = run_all(arms, 2, run, choose_hyperparameters)
        assert level == pytest.approx(2**0.1)
        assert chosen["lora"] == {"learning_rate": 2.0}
        assert chosen["full"]["learning_rate"] ** 0.5 == pytest.approx(level, rel=0.05)
        assert made[4][0] == "full" and made[4][1] != chosen["full"]["learning_rate"]
        assert made[-2:] == [("full", chosen["full"]["learning_rate"], 1), ("lora", 2.0, 1)]
        assert len(runs) == len(made) == len(set(made))

    def test_the_end_of_a_sweep_does_not_set_the_level(self, monkeypatch):
        """Learning of `sparse` rises with the rate up to 2 with t = 1, and to the last that is tried with t = 2."""
        arms = {
            "full": Arm("", None, with_rates(1.0, 10.0)),
            "sparse": Arm("", None, with_rates(0.1, 1.0, t=1) + with_rates(0.01, 0.1, t=2)),
        }
        for name, arm in arms.items():
            monkeypatch.setitem(report.ARMS, name, arm)
        made = []

        def run(arm, hyperparameters, seed):
            rate = hyperparameters["learning_rate"]
            made.append((arm, rate, hyperparameters.get("t")))
            learned = {None: 4.0 if rate < 10 else math.nan, 1: min(rate, 4 - rate), 2: rate}[hyperparameters.get("t")]
            return {**run_of(arm, [[3.0, 6.0], [3.5, 6.0 - learned]], rate=rate), "settings": hyperparameters}

        _, level, chosen = run_all(arms, 1, run, choose_hyperparameters, report.rates_beyond)
        beyond = [("sparse", 0.3, 2), ("sparse", 3.0, 1), ("sparse", 0.9, 2)]
        assert made[6:9] == beyond  # no more of either, and none of `full`, which learned more and diverged
        assert level == 1.0 and chosen["sparse"] == {"learning_rate": 1.0, "t": 1}
        assert all(math.isfinite(each["learning_rate"]) for each in chosen.values())

    def test_shares_are_of_means_over_seeds(self):
        def learned(arm, forgotten, seed):
            return {**run_of(arm, [[3.0, 6.0], [3.0 + forgotten, 5.0]]), "seed": seed}

        runs = [learned("full", 0.3, 0), learned("full", 0.5, 1), learned("open", 0.05, 0), learned("open", 0.03, 1)]
        hyperparameters = runs[0]["settings"]
        summary = summarize(runs, ["a", "b"], 1.0, {"full": hyperparameters, "open": hyperparameters}, {})
        assert summary["arms"]["open"]["seeds"] == 2
        for table, cell in ((describe, "| learning_rate 1 |"), (describe_shares, "| 10% |")):
            (row,) = (" ".join(line.split()) for line in table(summary).split("\n") if "grown, open" in line)
            assert "0.040 ± 0.014" in row and row.endswith(cell)

    def test_two_orders_and_their_mean(self, tmp_path):
        def learned(arm, order, seed, learned, forgotten):
            losses = [[3.0, 6.0], [3.0 + forgotten, 6.0 - learned]]
            return run_of(arm, losses, seed=seed, **({} if order is None else {"order": order}))

        runs = [
            *(learned("full", None, 0, 1.0, 0.2), learned("full", 1, 1, 1.2, 0.4)),  # without an order it is the first
            *(learned("full", 2, 0, 2.0, 0.8), learned("full", 2, 1, 2.2, 0.6)),
            *(learned("open", order, seed, 2.0, 0.1) for order in (1, 2) for seed in (0, 1)),
        ]
        chosen = {"full": {"learning_rate": 1.0}, "open": {"learning_rate": 1.0}}
        summary = json.loads(json.dumps(summarize(runs, ["a", "b"], 1.0, chosen, {})))
        assert summary["arms"]["full"]["seeds"] == 2
        head, _, full, grown = cells_of(describe_shares(summary))
        assert head == [
            "",
            *("learning, first order", "learning, reversed order", "learning, mean of both"),
            *("forgetting, first order", "forgetting, reversed order", "forgetting, mean of both"),
            "relative to full finetuning",
        ]
        # Seed by seed both orders have a mean: 1.5 and 1.7 were learned, 0.5 was forgotten with either seed.
        assert full[1:] == [
            *("1.100 ± 0.141", "2.100 ± 0.141", "1.600 ± 0.141"),
            *("0.300 ± 0.141", "0.700 ± 0.141", "0.500 ± 0.000"),
            "100%",
        ]
        assert grown[-2:] == ["0.100 ± 0.000", "20%"]
        assert shown_orders(summary) == [1, 2, None]
        for order, name, forgotten in (
            (1, "first order", "0.300"),
            (2, "reversed order", "0.700"),
            (None, "mean of both", "0.500"),
        ):
            head, _, full, _ = cells_of(describe(summary, order))
            assert head[0] == f"nats per token, {name}"
            assert full[head.index("forgetting")].startswith(forgotten)

    def test_pictures_are_of_the_first_order(self, tmp_path, monkeypatch):
        drawn = []
        monkeypatch.setattr(report, "save_picture", lambda figure, file: drawn.append(figure))
        losses = {1: [[3.0, 6.0], [3.2, 5.0]], 2: [[3.0, 6.0], [7.7, 5.0]]}
        for orders in ((1,), (2, 1)):
            runs = [run_of("full", losses[order], order=order) for order in orders]
            summary = summarize(runs, ["a", "b"], 1.0, {"full": runs[0]["settings"]}, {})
            report.plot(summary, tmp_path / "x.png")
            trade_off, stream, *_ = drawn[-1].axes
            assert trade_off.lines[0].get_ydata() == pytest.approx([0.2])
            assert list(stream.lines[0].get_ydata()) == [3.0, 3.2]
            assert ("first order" in stream.get_title()) is (len(orders) == 2)


# Each held-out document has a word of its own.
TEXTS = {
    name: DatasetDict(
        {
            "train": Dataset.from_list([{"text": words * 400}] * 4),
            "validation": Dataset.from_list([{"text": f"{words}{name}{i} " * 100} for i in range(4)]),
        }
    )
    for name, words in {"old": "one two three ", "new": "four five six ", "newer": "seven eight nine "}.items()
}


@pytest.fixture
def study(monkeypatch, tmp_path):
    """The study at its smallest, as a function of further flags."""
    monkeypatch.setattr(stream_study, "load_corpus", TEXTS.get)
    monkeypatch.setattr(report, "MOST_RATES_BEYOND", 0)

    def main(*flags):
        sizes = {"pretraining_steps": 1, "stage_steps": 1, "block_size": 32, "eval_sequences": 2, "seeds": 2}
        command = [
            "studies.stream",
            "--output_dir",
            str(tmp_path),
            "--pretraining_texts",
            "old",
            "--stream",
            "new",
        ]
        command += [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", [*command, *flags])
        stream_study.main()
        return json.loads((tmp_path / "results.json").read_text())

    return main


class TestStudy:
    @slow
    def test_all_arms_come_to_their_end(self, study, tmp_path, monkeypatch):
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

    def test_goes_on_where_it_was_killed(self, study, tmp_path, monkeypatch):
        class Killed(Exception):
            pass

        def killed(*_):
            raise Killed

        first = stream_study.ARMS["full"]
        with monkeypatch.context() as patch:
            patch.setitem(stream_study.ARMS, "experts", first.__class__("", killed, ({"learning_rate": 1.0},)))
            with pytest.raises(Killed):
                study("--arms", "full", "experts")
        saved = {path: path.read_bytes() for path in (tmp_path / "stages").iterdir()}
        assert len(saved) == len(first.sweep)
        # What is there is read, not made again.
        with monkeypatch.context() as patch:
            patch.setitem(stream_study.ARMS, "full", first.__class__("", killed, first.sweep))
            patch.setattr(stream_study, "Trainer", killed)
            study("--arms", "full", "--seeds", "1")
        assert {path: path.read_bytes() for path in (tmp_path / "stages").iterdir()} == saved

    def test_refuses_the_folder_of_another_study(self, study, tmp_path):
        (tmp_path / "arguments.json").write_text('{"pretraining_steps": 7}')
        with pytest.raises(ValueError, match="pretraining_steps was 7, got 1"):
            study()

    def test_parts_of_the_held_out_text_share_no_document(self, monkeypatch, tmp_path):
        monkeypatch.setattr(stream_study, "load_corpus", TEXTS.get)
        args = stream_study.StreamArguments(
            pretraining_texts=["old", "newer"], stream=["new"], block_size=32, eval_sequences=1000
        )
        tokenizer, texts = stream_study.load_texts(args, tmp_path)
        for i, names in enumerate((("old", "newer"), ("new",))):
            found = [
                set(re.findall(r"[a-z]+\d", " ".join(tokenizer.batch_decode(part[i]))))
                for part in (texts.held_out, texts.to_choose_by)
            ]
            whole = {f"{name}{number}" for name in names for number in range(4)}
            assert whole <= found[0] | found[1] and not whole & found[0] & found[1]
            assert len(whole & found[0]) == len(whole & found[1])

    def test_the_stream_is_also_learned_in_reverse(self, study, tmp_path, monkeypatch):
        seen = []

        def learn(model, stage, hyperparameters):
            tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
            texts = [tokenizer.decode(text[0]["input_ids"]) for text in (*stage.earlier, stage.blocks)]
            seen.append((stage.seed, ["".join(re.findall("two|five|eight", text))[:3] for text in texts]))
            return stream_arms.full_finetuning(model, stage, hyperparameters)

        arm = Arm("full finetuning", learn, with_rates(1e-3, 2e-3))
        monkeypatch.setitem(stream_study.ARMS, "full", arm)
        flags = ("--arms", "full", "--stream", "new", "newer")
        first = study(*flags)
        assert {run["order"] for run in first["runs"]} == {1} and "orders" not in first["arms"]["full"]
        seen.clear()
        both = study(*flags, "--orders", "2")  # resumes, with what is new
        stages = [["two", "eig"], ["two", "eig", "fiv"]]
        assert seen == [(seed, texts) for seed in range(2) for texts in stages]
        assert both["runs"][: len(first["runs"])] == first["runs"]
        added = both["runs"][len(first["runs"]) :]
        assert [(run["order"], run["seed"], run["settings"]) for run in added] == [
            (2, seed, both["arms"]["full"]["settings"]) for seed in range(2)
        ]
        (old, new, newer), reversed_losses = first["runs"][0]["losses"][0], added[0]["losses"][0]
        assert reversed_losses == [old, newer, new]
        assert len(both["arms"]["full"]["orders"]) == 2
        assert not (tmp_path / "dense").exists()  # its arm was not asked for

    def test_goes_on_beyond_the_sweep(self, study, monkeypatch):
        monkeypatch.setattr(report, "MOST_RATES_BEYOND", 2)
        arm = stream_study.ARMS["full"]
        monkeypatch.setitem(stream_study.ARMS, "full", Arm(arm.label, arm.learn, with_rates(1e-5, 1e-4)))
        runs = study("--arms", "full", "--seeds", "1")["runs"]
        assert [run["settings"]["learning_rate"] for run in runs] == [1e-5, 1e-4, 3e-4, 9e-4]

    def test_a_pre_training_that_was_killed_after_its_last_step_makes_no_more(self, study, tmp_path, monkeypatch):
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

    def test_has_its_folder_to_itself(self, study, tmp_path):
        with sole_use(tmp_path), pytest.raises(SystemExit, match="Another process is running the study in"):
            study()

    def test_refuses_other_numbers_of_orders(self, study, capsys):
        with pytest.raises(SystemExit):
            study("--orders", "3")
        assert "--orders must be 1 or 2, got 3" in capsys.readouterr().err

    def test_another_base_model(self, study, tmp_path, monkeypatch):
        trained = {}

        class Spy(stream_study.Trainer):
            def __init__(self, model, args, optimizers, **options):
                super().__init__(model, args, optimizers=optimizers, **options)
                trained["peer" if "peer" in model.config.feed_forward_types else "dense"] = (model.config, self)

        monkeypatch.setattr(stream_study, "Trainer", Spy)
        for name in ("full", "dense"):
            arm = stream_study.ARMS[name]
            monkeypatch.setitem(stream_study.ARMS, name, Arm(arm.label, arm.learn, arm.sweep[:1], arm.base))
        base = {
            "configuration": "peer-nano",
            "fields": {"num_experts": 1600},
            "training": {"learning_rate": 3e-3, "down_proj_lr_multiplier": 8, "per_device_train_batch_size": 2},
        }
        file = tmp_path / "base.json"
        file.write_text(json.dumps(base))
        results = study("--arms", "full", "dense", "--base", str(file))
        assert results["arguments"]["base"] == base

        config, trainer = trained["peer"]
        assert (config.num_experts, config.hidden_size) == (1600, 64)
        assert config.feed_forward_types == ["peer"] * 4
        assert trainer.args.per_device_train_batch_size == 2 and trainer.args.lr_scheduler_type == "cosine"
        rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
        assert rates == {3e-3, 8 * 3e-3}
        config, trainer = trained["dense"]
        assert config.hidden_size == 128 and config.feed_forward_types == ["dense"] * 4
        assert trainer.args.per_device_train_batch_size == 16
        groups = trainer.optimizer.param_groups
        assert {(group["initial_lr"], group["weight_decay"]) for group in groups} == {(2e-3, 0.01), (2e-3, 0.0)}

        trained.clear()
        moved = file.rename(tmp_path / "moved.json")
        assert study("--arms", "full", "dense", "--base", str(moved))["runs"] == results["runs"] and not trained
        base["fields"]["num_experts"] = 2500
        moved.write_text(json.dumps(base))
        with pytest.raises(ValueError, match="base was .*'num_experts': 1600.* got .*'num_experts': 2500"):
            study("--arms", "full", "--base", str(moved))

    @pytest.mark.parametrize("base", [{"fields": {}}, {"configuration": "peer-tiny", "rate": 1}])
    def test_refuses_a_base_of_another_form(self, base, study, tmp_path):
        (tmp_path / "base.json").write_text(json.dumps(base))
        with pytest.raises(ValueError, match=r"base.json must have a `configuration`, and may have .*, got \['"):
            study("--base", str(tmp_path / "base.json"))

    @pytest.mark.parametrize(
        "wrong, message",
        [
            ({"configuration": "peer-tinny"}, "peer-tinny"),
            ({"fields": {"num_expert": 9}}, "PeerConfig has no field 'num_expert'"),
            ({"training": {"learning_rates": 1e-3}}, "learning_rates"),
        ],
    )
    def test_refuses_a_base_that_there_is_not(self, wrong, message, study, tmp_path):
        file = tmp_path / "base.json"
        file.write_text(json.dumps({"configuration": "peer-tiny", **wrong}))
        with pytest.raises(ValueError, match=f"--base .*base.json cannot be used: .*{message}"):
            study("--base", str(file))
        assert list(tmp_path.iterdir()) == [file]  # the mended file is no other study

    def test_refuses_the_folder_of_a_study_whose_held_out_text_was_not_divided(self, study, tmp_path):
        """Such a study knew no other base, and said none."""
        study("--arms", "full", "--seeds", "1")
        arguments = json.loads((tmp_path / "arguments.json").read_text())
        del arguments["base"]
        (tmp_path / "arguments.json").write_text(json.dumps(arguments))
        with pytest.raises(ValueError, match="base was None, got {'configuration': 'peer-tiny'"):
            study("--arms", "full", "--seeds", "1")

    def test_refuses_an_arm_that_is_not_there(self, study):
        with pytest.raises(ValueError, match=r"--arms must be some of \['full', .*got \['half'\]"):
            study("--arms", "half")


class TestGrowthWithoutOldText:
    """A stage whose earlier texts cannot be read."""

    @pytest.fixture
    def stage(self, tmp_path):
        text = [{"input_ids": tokens, "labels": tokens} for tokens in random_tokens(20, 8).tolist()]
        return Stage(Dataset.from_list(text), None, steps=2, batch_size=4, folder=tmp_path, seed=0)

    @pytest.fixture
    def model(self):
        return tiny_model(tiny_config("peer", "dense", bos_token_id=3))

    @staticmethod
    def gate_of(model):
        return model.model.layers[0].mlp.added_routers[0].gate(torch.randn(1000, 24))

    def test_gates_that_are_not_fitted_are_open_for_every_token(self, model, stage):
        model = stream_arms.grown_protected_ungated(model, stage, {"learning_rate": 0.1})
        assert (self.gate_of(model) == 1).all()
        tokens = random_tokens(4, 8)
        logits = model(tokens).logits
        with masked_experts(model):
            assert not torch.allclose(model(tokens).logits, logits)  # the added experts were trained and are used

    def test_gates_are_fitted_to_what_the_model_generated_before(self, model, stage, monkeypatch):
        additions, fitted = [], []

        def generate(model, *args, **options):
            additions.append(model.config.expert_additions)
            return generate_text(model, *args, **options)

        def fit(model, new_text, reference_text, **options):
            fitted.append((new_text, reference_text, options))
            return fit_gates(model, new_text, reference_text, **options, num_steps=20)

        monkeypatch.setattr(stream_arms, "generate_text", generate)
        monkeypatch.setattr(stream_arms, "fit_gates", fit)
        hyperparameters = {"learning_rate": 0.1, "reference_weight": 7}
        model = stream_arms.grown_protected_generated(model, stage, hyperparameters)
        ((new_text, reference_text, options),) = fitted
        assert not additions[0] and new_text["input_ids"] == stage.blocks["input_ids"]
        assert options["reference_weight"] == 7
        tokens = torch.stack([each["input_ids"] for each in reference_text])
        assert tokens.shape == (128, 8) and (tokens[:, 0] == 3).all()
        assert self.gate_of(model).min() < 1
