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
"""The scaling study as a user runs it: every run is made once, as planned, and a killed study can be resumed."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from datasets import load_from_disk
from filelock import FileLock
from scaling_plans import PEER_FIELDS, PLAN, SMALL
from slow_tests import REASON, RUN_SLOW
from study_runs import make_study, run_preloaded
from transformers import AutoModelForCausalLM

import studies.scaling.__main__ as scaling
from common.model_arguments import RETIRED_FIELDS
from common.subprocesses import module_command, module_environment
from modeling_peer import PeerConfig
from studies.common import training_study
from studies.common.single_run import changes_to_measure, comparable, with_study_defaults, without_places
from studies.common.study_folder import write_json
from studies.common.training_plan import CORPUS, DENSE, PEER, Run
from studies.scaling.cards import make_cards
from studies.scaling.plan import rate_runs, read_plan, with_seeds
from studies.scaling.plots import PLOTS
from studies.scaling.report import (
    Results,
    describe,
    read_results,
)
from studies.scaling.study import Study


@pytest.fixture(scope="module")
def small_study(tmp_path_factory):
    """The study at its smallest, made once, and as a function that goes on with it."""
    if not RUN_SLOW:
        pytest.skip(REASON)
    yield from make_study(scaling, tmp_path_factory.mktemp("scaling"), SMALL)


class TestStudy:
    def test_comes_to_its_end(self, small_study):
        folder, _ = small_study
        results = read_results(folder / "results.json")
        plan = results.plan
        assert plan == read_plan(folder / "plan.json")
        assert (folder / "tables.md").read_text() == describe(results)
        for name in PLOTS:
            assert (folder / f"{name}.png").stat().st_size > 5000
        assert {file.stem for file in (folder / "model_cards").iterdir()} == set(make_cards(results))
        for run in results.equal_seconds(plan.budgets[0]):
            assert len(results.with_seeds(run)) == 2
        assert not list(folder.glob("models/*/checkpoint-*"))

    def test_every_run_was_trained_as_it_says(self, small_study):
        folder, _ = small_study
        for name, result in read_results(folder / "results.json").runs.items():
            arguments = result["run_clm"]
            for field, argument in (("steps", "max_steps"), ("learning_rate",) * 2, ("seed",) * 2):
                assert arguments[argument] == result[field], name
            assert json.loads(arguments["config_overrides"]) == result["fields"]
            own_rate = None if result["variant"] != PEER else 1 if "one_learning_rate" in name else 4
            assert arguments.get("down_proj_lr_multiplier") == own_rate, name
            trained = result["all_results"]
            sequences = trained["epoch"] * trained["train_samples"]
            assert sequences == pytest.approx(result["steps"] * 4, abs=0.1)
            # 32 tokens a sequence, three times the forward's FLOPs.
            assert result["training_flops"] == round(3 * result["flops_per_token"] * sequences * 32)
            saved = PeerConfig.from_pretrained(folder / "models" / name)
            fields = {field: value for field, value in result["fields"].items() if field not in RETIRED_FIELDS}
            assert {field: getattr(saved, field) for field in fields} == fields, name
            optimizer = json.loads((folder / "work" / f"{name}.run_clm.json").read_text())
            if optimizer["row_adamw"]:  # none of the learning rates that run_clm.py has by itself
                assert optimizer["expert_lr_multiplier"] == arguments.get("expert_lr_multiplier", 1.0)
                assert optimizer["down_proj_lr_multiplier"] == arguments.get("down_proj_lr_multiplier", 1.0)
            assert result["train_history"][-1][0] <= result["steps"]

    def test_seeds_are_other_runs(self, small_study):
        folder, _ = small_study
        results = read_results(folder / "results.json")
        for run in results.optimal(results.plan.budgets[0]).values():
            one, other = results.with_seeds(run)
            assert one[CORPUS] != other[CORPUS]

    def test_losses_are_those_of_the_saved_model(self, small_study):
        """
        By the model's own loss, on each text, without what balances the experts of a MoE; also with h or k changed.
        """
        folder, _ = small_study
        results = read_results(folder / "results.json")
        texts = {
            name: torch.tensor(load_from_disk(folder / "held_out" / name)["input_ids"]) for name in (CORPUS, "new")
        }

        def losses(name, **fields):
            model = AutoModelForCausalLM.from_pretrained(
                folder / "models" / name, router_aux_loss_coef=0.0, **fields
            ).eval()
            with torch.no_grad():
                return {text: model(input_ids=tokens, labels=tokens).loss.item() for text, tokens in texts.items()}

        for name, result in results.runs.items():
            assert result["losses"] == pytest.approx(losses(name), rel=1e-5), name
        assert results.losses(results.reference())[CORPUS] != results.losses(results.reference())["new"]
        run = with_seeds(results.reference(), results.plan)[0]
        changed = {name: each["losses"] for name, each in results.runs[run.name]["after_training"].items()}
        assert changed["k = 2"] == pytest.approx(losses(run.name, num_experts_per_head=2), rel=1e-5)
        assert changed["h = 1"] == pytest.approx(losses(run.name, num_retrieval_heads=1), rel=1e-5)

    def test_what_is_saved_beside_the_model(self, small_study):
        """For its card; nothing of what made it, with paths of this machine."""
        folder, _ = small_study
        run = read_results(folder / "results.json").reference()
        result = read_results(folder / "results.json").runs[run.name]
        saved = json.loads((folder / "models" / run.name / "all_results.json").read_text())
        assert saved["perplexity/new"] == pytest.approx(math.exp(result["losses"]["new"]))
        assert not saved.keys() & {"perplexity", "eval_loss"}  # of another sample of the corpus
        made_with = json.loads((folder / "work" / f"{run.name}.run_clm.json").read_text())
        assert without_places(made_with) == with_study_defaults(result["run_clm"])
        assert str(folder) in json.dumps(made_with)
        assert str(folder) not in (folder / "results.json").read_text()
        assert not list((folder / "models" / run.name).glob("*run*")) + list(folder.glob("models/*/*.log"))

    def test_usage_counts_every_expert(self, small_study):
        folder, _ = small_study
        results = read_results(folder / "results.json")
        (usage,) = results.runs[results.reference().name]["usage"].values()
        assert sum(usage["histogram"]) + usage["unused"] == 64 == PEER_FIELDS["num_experts"]
        assert usage["usage"] == pytest.approx(1 - usage["unused"] / 64)

    def test_experts_that_choose_see_what_comes_later(self, small_study):
        folder, _ = small_study
        found = [run for run in read_results(folder / "results.json").runs.values() if "losses_as_trained" in run]
        assert found and all(run["variant"] == "moe-expert-choice" for run in found)
        assert all(run["losses_as_trained"] != run["losses"] for run in found)

    def test_what_is_there_is_not_made_again(self, small_study, monkeypatch):
        folder, main = small_study

        def fails(*_, **__):
            raise AssertionError

        before = {file: file.stat().st_mtime_ns for file in (folder / "results").iterdir()}
        monkeypatch.setattr(training_study.subprocess, "run", fails)
        main()
        assert {file: file.stat().st_mtime_ns for file in (folder / "results").iterdir()} == before

    def test_a_run_that_is_not_whole_keeps_its_checkpoints(self, small_study):
        """Of whatever stage it is: the study begins each time with the first."""
        folder, main = small_study
        run = read_results(folder / "results.json").reference()
        unfinished, whole = (folder / "models" / name / "checkpoint-1" for name in ("unfinished", run.name))
        for checkpoint in (unfinished, whole):
            checkpoint.mkdir(parents=True)
        try:
            main()
            assert unfinished.exists() and not whole.exists()
        finally:
            shutil.rmtree(unfinished.parent)

    def test_where_files_are_does_not_matter_to_what_goes_on(self):
        one = {"output_dir": "a", "max_steps": 1, "config_overrides": '{"num_experts": 16}'}
        assert comparable(one) == comparable(one | {"output_dir": "b"})
        assert comparable(one) == comparable(one | {"dataloader_pin_memory": True})  # as on a GPU
        for other in ({"max_steps": 2}, {"config_overrides": '{"num_experts": 64}'}):
            assert comparable(one) != comparable(one | other)

    def test_a_change_after_training_that_was_redefined_is_measured_again(self):
        result = {"after_training": {"h = 1": {"fields": {"num_retrieval_heads": 1}}}}
        for fields, is_missing in (({"num_retrieval_heads": 1}, False), ({"num_retrieval_heads": 2}, True)):
            assert bool(changes_to_measure(result, {"h = 1": fields})) == is_missing

    def test_a_run_goes_on_where_it_was_killed(self, small_study, tmp_path):
        """
        After a checkpoint, and after the last one: it ends as one that was not killed, with the same arguments only.
        """
        folder, _ = small_study
        run = read_results(folder / "results.json").reference()
        expected = read_results(folder / "results.json").runs[run.name]
        work = json.loads((folder / "work" / f"{run.name}.json").read_text())
        work["run_clm"] |= {"output_dir": str(tmp_path / "model"), "save_steps": 2, "save_total_limit": 10}
        file, result_file = tmp_path / "work.json", tmp_path / "result.json"
        file.write_text(json.dumps(work | {"result_file": str(result_file)}))

        def make():
            result_file.unlink(missing_ok=True)
            command = module_command("studies.common.single_run", str(file))
            run_preloaded(command, module_environment(), tmp_path / "printed")
            return json.loads(result_file.read_text())

        first = make()
        assert first["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        last = max(tmp_path.glob("model/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        assert last.name == f"checkpoint-{run.steps}"
        for name in ("trainer_state.json", "all_results.json"):
            (tmp_path / "model" / name).unlink()  # killed while the model was saved
        killed = make()
        assert killed["losses"] == pytest.approx(first["losses"], rel=1e-5)
        assert killed["all_results"]["train_samples"] == first["all_results"]["train_samples"]
        shutil.rmtree(last)
        again = make()
        assert again["losses"] == pytest.approx(first["losses"], rel=1e-5)
        assert again["all_results"]["train_runtime"] != first["all_results"]["train_runtime"]
        file.write_text(
            json.dumps(work | {"run_clm": work["run_clm"] | {"learning_rate": 0.5}, "result_file": str(result_file)})
        )
        with pytest.raises(subprocess.CalledProcessError) as error:
            make()
        assert "was started with other arguments" in error.value.output

    def test_a_run_that_fails_is_named_and_its_log(self, small_study, monkeypatch):
        folder, main = small_study
        run = rate_runs(read_plan(folder / "plan.json"))[0]
        lost = folder / "results" / f"{run.name}.json"
        kept = lost.read_bytes()
        lost.unlink()
        missing = [sys.executable, str(folder / "missing.py")]
        monkeypatch.setattr(training_study, "module_command", lambda *_: missing)
        monkeypatch.setattr(training_study, "subprocess", subprocess)
        try:
            with pytest.raises(RuntimeError, match=re.escape(run.name) + r" failed with exit code 2: see .*\.log"):
                main()
        finally:
            lost.write_bytes(kept)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"block_size": 16}, "block_size was 32, got 16"),
            # A variant that was redefined has results that are not its own: also by what was not there, and by its
            # base.
            (
                {"variants": SMALL["variants"] | {"peer": SMALL["variants"]["peer"] | {"expert_act": None}}},
                "expert_act was absent, got None",
            ),
            (
                {"variants": SMALL["variants"] | {"dense": {"configuration": "moe-tiny"}}},
                "config_name was dense-tiny, got moe-tiny",
            ),
        ],
    )
    def test_refuses_results_of_another_study(self, small_study, monkeypatch, changed, message):
        folder, main = small_study
        monkeypatch.setattr(training_study.subprocess, "run", lambda *_, **__: pytest.fail("trains before it refuses"))
        (folder / "plan.json").write_text(json.dumps(SMALL | changed))
        try:
            with pytest.raises(ValueError, match=message):
                main()
        finally:
            (folder / "plan.json").write_text(json.dumps(SMALL))

    def test_what_is_added_to_the_plan_is_measured(self, small_study):
        """A change after training needs no training."""
        folder, main = small_study
        before = read_results(folder / "results.json")
        plan = SMALL | {"after_training": SMALL["after_training"] | {"k = 3": {"num_experts_per_head": 3}}}
        (folder / "plan.json").write_text(json.dumps(plan))
        try:
            main()
            after = read_results(folder / "results.json")
        finally:
            (folder / "plan.json").write_text(json.dumps(SMALL))
        run = with_seeds(before.reference(), before.plan)[0]
        assert set(after.runs[run.name]["after_training"]) == {"k = 2", "h = 1", "k = 3"}
        assert after.losses(run) == before.losses(run) and after.runs.keys() == before.runs.keys()

    def test_goes_on_from_results_made_elsewhere(self, small_study, tmp_path, monkeypatch):
        """Without texts and models, to the same tables and cards."""
        folder, main = small_study
        for module, name in ((training_study.subprocess, "run"), (training_study, "train_tokenizer")):
            monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("makes what is there"))
        flags = ("--output_dir", str(tmp_path), "--results", str(folder / "results.json"))
        main(*flags)
        before, after = read_results(folder / "results.json"), read_results(tmp_path / "results.json")
        assert (after.runs, after.seconds) == (before.runs, before.seconds)
        assert (tmp_path / "tables.md").read_text() == describe(Results(after.plan, before.runs, before.seconds))
        assert {file.name: file.read_text() for file in (tmp_path / "model_cards").iterdir()} == {
            file.name: file.read_text() for file in (folder / "model_cards").iterdir()
        }
        assert not (tmp_path / "held_out").exists()

    def test_what_is_here_or_begun_is_not_taken_from_elsewhere(self, small_study, tmp_path):
        folder, _ = small_study
        results = read_results(folder / "results.json")
        here, begun, *others = results.runs
        (tmp_path / "models" / begun).mkdir(parents=True)
        (tmp_path / "results").mkdir()
        (tmp_path / "results" / f"{here}.json").write_text("{}")
        times = Results(results.plan, results.runs, {})  # of no size
        Study(results.plan, tmp_path, 1, times)
        assert (tmp_path / "results" / f"{here}.json").read_text() == "{}"
        assert {file.stem for file in (tmp_path / "results").iterdir()} == {here, *others}
        assert not (tmp_path / "seconds").exists()

    def test_steps_of_all_sizes_are_timed_together(self, tmp_path, monkeypatch):
        """Those of two days could not be compared."""
        study = Study(PLAN, tmp_path, 1)
        sizes = {str(size): [Run(DENSE, size, 1, 0.004), Run(PEER, size, 1, 0.004)] for size in (32, 64)}
        measured: list[str] = []

        def measure(runs, fields, file):
            measured.append(file.stem)
            write_json(file, {"fields": fields})

        monkeypatch.setattr(study, "timed_runs", lambda: sizes)
        monkeypatch.setattr(study, "_measure_seconds", measure)
        assert list(study.seconds()) == ["32", "64"] and study.seconds() == study.seconds()
        assert measured == ["32", "64"]
        write_json(tmp_path / "seconds" / "64.json", {"fields": {}})
        study.seconds()
        assert measured == ["32", "64"] * 2
        study.until = 0.0
        study.seconds()  # nothing is left to measure
        write_json(tmp_path / "seconds" / "64.json", {"fields": {}})
        with pytest.raises(training_study.TimeIsUp, match="The time is up: the seconds of training steps"):
            study.seconds()
        assert measured == ["32", "64"] * 2 and (tmp_path / "seconds" / "32.json").exists()

    def test_only_what_is_asked_for_is_told_of(self, small_study, tmp_path):
        """A seed that the plan no longer asks for may be of a model that it no longer describes."""
        folder, _ = small_study
        results = read_results(folder / "results.json")
        study = Study(results.plan, tmp_path, 1, results)
        runs = rate_runs(results.plan)
        assert study.make(runs, "").keys() == {run.name for run in runs}

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda made: made["all_results"].update(train_samples=7), "the number of training sequences"),
            (lambda made: made["texts"].update(new="another"), "new"),
        ],
    )
    def test_runs_on_other_texts_do_not_stand_beside_each_other(
        self, small_study, tmp_path, monkeypatch, change, text
    ):
        folder, _ = small_study
        results = read_results(folder / "results.json")
        run, *others = rate_runs(results.plan)
        made = results.runs.pop(run.name)
        study = Study(results.plan, tmp_path, 1, results)
        (tmp_path / "held_out").symlink_to(folder / "held_out")
        change(made)
        monkeypatch.setattr(study, "prepare", lambda: None)
        monkeypatch.setattr(study, "_make", lambda run, _: study.result_file(run).write_text(json.dumps(made)))
        with pytest.raises(ValueError, match=f"no longer the same: for {text}"):
            study.make([run, *others], "")

    def test_refuses_results_on_other_texts_before_it_trains(self, small_study, tmp_path):
        folder, _ = small_study
        results = read_results(folder / "results.json")
        run, *_ = rate_runs(results.plan)
        del results.runs[run.name]
        study = Study(results.plan, tmp_path, 1, results)
        shutil.copytree(folder / "held_out", tmp_path / "held_out")
        shutil.rmtree(tmp_path / "held_out" / "new")
        shutil.copytree(folder / "held_out" / CORPUS, tmp_path / "held_out" / "new")  # a package in another version
        with pytest.raises(ValueError, match=f"no longer the same: for new, {tmp_path} has"):
            study.make([run], "")
        assert not (tmp_path / "work").exists()

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"block_size": 16}, "a study whose `block_size` was 32, but got 16"),
            (
                {"after_training": {"never measured": {"num_experts_per_head": 1}}},  # by no test of the same study
                "lacks some of the changes after training, and its model is not in",
            ),
        ],
    )
    def test_refuses_results_made_elsewhere_in_another_way(self, small_study, tmp_path, changed, message):
        folder, main = small_study
        plan = tmp_path / "plan.json"
        plan.write_text(json.dumps(SMALL | changed))
        flags = ("--output_dir", str(tmp_path), "--plan", str(plan), "--results", str(folder / "results.json"))
        with pytest.raises(ValueError, match=message):
            main(*flags)
        if "block_size" in changed:  # nothing is claimed that was refused
            assert {file.name for file in tmp_path.iterdir()} <= {"plan.json", ".lock"}

    def test_one_at_a_time(self, small_study):
        folder, main = small_study
        with FileLock(folder / ".lock"), pytest.raises(SystemExit, match="Another process is running the study"):
            main()
