# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Every example runs from its command line at a tiny size and saves what its description promises."""

import json
import math
import os
import shutil
import subprocess
import sys

import datasets
import pytest
import quantize
import quickstart
import run_classification
import run_clm
import torch
from documentation import ROOT
from graft_models import merged_in_turn
from hub_server import HubServer
from huggingface_hub import ModelCard
from preloaded import python
from release_names import is_at_least
from run_generation import describe_experts
from safetensors.torch import load_file
from slow_tests import slow
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl, TrainerState, TrainingArguments

from common.cards import MARK, make_card
from common.library_sources import byte_level_tokenizer
from common.model_arguments import ModelArguments, load_config
from common.text_data import DataTrainingArguments
from common.training import OptimizerArguments, PretrainingArguments, make_optimizers
from modeling_peer import PeerConfig, PeerForSequenceClassification, SplitCheckpointCallback, add_experts


SMALL = "vocab_size=300,hidden_size=32,intermediate_size=48,num_experts=64,num_experts_per_head=4,query_size=16"
RUN = ("--block_size", "32", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--logging_steps", "4")


def run(script, *flags, environment=None, code=0):
    """
    Runs an example and returns what it printed; it must end with the given code. With an environment, it is in a process
    that imports the libraries itself.
    """
    done = subprocess.run(
        [python() if environment is None else sys.executable, ROOT / "examples" / script, *map(str, flags)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.fixture
def run_here(monkeypatch, tmp_path):
    """Runs the `main` of a script in this process."""

    def main(script, *flags, **options):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(script, "setup_logging", lambda _: None, raising=False)  # would outlast the test
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, flags)])
        script.main(**options)

    return main


def counting_lines(number):
    return [f"{i} and {i + 1} are {2 * i + 1}\n" for i in range(number)]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "numbers.txt"
    file.write_text("".join(counting_lines(1000)))
    return file


@pytest.fixture(scope="module")
def checkpoint(text_file, tmp_path_factory):
    """Folder of a model trained on numbers for twelve steps, with a checkpoint after six."""
    folder = tmp_path_factory.mktemp("run_clm") / "model"
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder.parent / "cache")}
    run("run_clm.py", *clm_flags(folder, text_file), environment=environment)
    return folder


def clm_flags(folder, text_file):
    return (
        *("--config_name", "peer-tiny", "--config_overrides", SMALL, "--train_file", text_file, *RUN),
        *("--do_train", "--do_eval", "--output_dir", folder, "--max_steps", "12", "--save_steps", "6"),
        *("--eval_strategy", "steps", "--eval_steps", "6", "--eval_on_start"),
    )


def results(folder, name="all_results.json"):
    return json.loads((folder / name).read_text())


def weights(folder):
    return load_file(folder / "model.safetensors")


class TestLanguageModel:
    def test_results(self, checkpoint):
        history = results(checkpoint, "trainer_state.json")["log_history"]
        eval_losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        metrics = results(checkpoint)
        assert len(eval_losses) == 3 and eval_losses[-1] < eval_losses[0] - 1
        assert metrics["eval_loss"] == pytest.approx(eval_losses[-1], abs=1e-3)
        assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
        assert metrics["train_samples"] > 10 * metrics["eval_samples"] > 0
        assert 0 < metrics["eval_expert_usage/layer_1"] <= 1
        card = (checkpoint / "README.md").read_text()
        assert MARK in card and "| `learning_rate` | 0.01 |" in card and "](expert_usage.png)" in card

    def test_checkpoint_loads(self, checkpoint):
        model, tokenizer = (kind.from_pretrained(checkpoint) for kind in (AutoModelForCausalLM, AutoTokenizer))
        config = model.config
        assert (config.hidden_size, config.num_experts, config.feed_forward_types[1]) == (32, 64, "peer")
        assert len(tokenizer) <= config.vocab_size == 300
        assert config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id == config.pad_token_id
        text = "any text: \t\n  été 漢字"
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    @pytest.mark.parametrize("last", [6, 12])
    def test_resumes_from_the_last_checkpoint(self, checkpoint, text_file, tmp_path, last):
        """It ends bit-identical, also if no step is left."""
        resumed = shutil.copytree(checkpoint / f"checkpoint-{last}", tmp_path / f"checkpoint-{last}")
        before = (resumed / "optimizer.pt").stat().st_mtime_ns
        run("run_clm.py", *clm_flags(tmp_path, text_file))
        assert (resumed / "optimizer.pt").stat().st_mtime_ns == before  # no step up to it was made again
        assert_close(weights(tmp_path), weights(checkpoint), rtol=0, atol=0)
        assert results(tmp_path)["perplexity"] == results(checkpoint)["perplexity"]
        assert not (tmp_path / "checkpoint-13").exists()

    @pytest.mark.skipif(not is_at_least("5.24"), reason="memory groups need Transformers 5.24")
    def test_one_process_resumes_the_optimizer_of_a_split_model(self, text_file, tmp_path, run_here):
        """To the bit, which without the state of optimizer and schedule it does not."""

        def save_in_parts(trainer):
            trainer.args.save_only_model = True
            trainer.add_callback(SplitCheckpointCallback())

        flags = ("--config_overrides", SMALL, "--train_file", text_file, *RUN, "--do_train", "--max_steps", 6)
        flags += ("--output_dir", tmp_path / "model", "--save_steps", 3, "--use_cpu", "--report_to", "none")
        run_here(run_clm, *flags, change=save_in_parts)
        expected = weights(tmp_path / "model")
        shutil.rmtree(tmp_path / "model" / "checkpoint-6")
        run_here(run_clm, *flags)
        assert (tmp_path / "model" / "checkpoint-6" / "training_state").is_dir()
        assert_close(weights(tmp_path / "model"), expected, rtol=0, atol=0)

    def test_goes_on_from_a_model_with_other_text(self, checkpoint, tmp_path):
        """A stream of JSON, by the name of its column, with fewer heads than the model was trained with."""
        rows = [json.dumps({"id": i, "body": line * 3}) for i, line in enumerate(counting_lines(400))]
        (tmp_path / "rows.jsonl").write_text("\n".join(rows))
        run(
            *("run_clm.py", "--model_name_or_path", checkpoint, "--config_overrides", "num_retrieval_heads=2"),
            *("--train_file", tmp_path / "rows.jsonl", "--text_column_name", "body", "--streaming", *RUN),
            *("--do_train", "--do_eval", "--output_dir", tmp_path / "model", "--max_steps", "4"),
            *("--max_eval_samples", "8", "--save_strategy", "no"),
        )
        assert results(tmp_path / "model")["perplexity"] < 1.5 * results(checkpoint)["perplexity"]
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.num_retrieval_heads == 2

    def test_row_adamw(self, checkpoint, text_file, tmp_path):
        """A table's state says which of its experts were trained; its own learning rate is in the optimizer's."""
        multipliers = ("--expert_lr_multiplier", "2", "--down_proj_lr_multiplier", "1")
        run("run_clm.py", *clm_flags(tmp_path, text_file), "--second_moment", "row", *multipliers)
        assert results(tmp_path)["perplexity"] == pytest.approx(results(checkpoint)["perplexity"], rel=0.3)
        optimizer = torch.load(tmp_path / "checkpoint-6/optimizer.pt")
        groups = {group["rows"]: group for group in optimizer["param_groups"]}
        assert groups[True]["initial_lr"] == 2 * groups[False]["initial_lr"] == 2e-2
        for table in groups[True]["params"]:
            assert optimizer["state"][table]["exp_avg_sq"].shape == (64, 1)
            assert 0 < optimizer["state"][table]["row_steps"].max() <= 6

    def test_learning_rates(self, tmp_path):
        """New models train at those of the studies."""
        args = PretrainingArguments(output_dir=str(tmp_path))
        for hidden_size, is_new, rate in ((64, True, 4e-3), (128, True, 2e-3), (32, False, 5e-5)):
            args.learning_rate = None
            args.set_learning_rate(PeerConfig(hidden_size=hidden_size, num_attention_heads=4), is_new)
            assert args.learning_rate == rate
        args.set_learning_rate(PeerConfig(), True)
        assert args.learning_rate == rate  # as it was named
        model = AutoModelForCausalLM.from_config(load_config(ModelArguments(config_overrides=SMALL)))
        training_args = TrainingArguments(output_dir=str(tmp_path), learning_rate=0.5)
        named = {"expert_lr_multiplier": 2.0, "down_proj_lr_multiplier": 4.0}
        for options, is_new, rates in (({}, True, [0.125, 24.0]), ({}, False, [0.5, 0.5]), (named, True, [1.0, 4.0])):
            optimizer, _ = make_optimizers(OptimizerArguments(**options), training_args, model, is_new=is_new)
            assert {group["lr"] for group in optimizer.param_groups} == {0.5, *rates}
        training_args.fsdp = True
        assert make_optimizers(OptimizerArguments(), training_args, model, True) == (None, None)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantize(checkpoint, text_file, bits, tmp_path, run_here):
    flags = ("--model_name_or_path", checkpoint, "--train_file", text_file, "--block_size", 32)
    run_here(quantize, *flags, "--bits", bits, "--output_dir", tmp_path)
    figures = results(tmp_path, "quantization.json")
    assert figures["perplexity_before"] == pytest.approx(results(checkpoint)["perplexity"], rel=1e-4)
    assert figures["perplexity_after"] == pytest.approx(figures["perplexity_before"], rel=1e-2)
    assert figures["perplexity_after"] != figures["perplexity_before"]
    assert figures["table_bytes_before"] == 2 * 64 * 32 * 4
    assert figures["table_bytes_after"] == 2 * 64 * (32 * bits // 8 + 2)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.quantization_config.bits == bits


class TestGeneration:
    def test_prints_text_and_experts(self, checkpoint):
        flags = ("--do_sample", "--temperature", "0.7", "--max_new_tokens", "12", "--num_shown_experts", "3")
        printed = run("run_generation.py", "--model_name_or_path", checkpoint, "--prompt", "7 and 8 are", *flags)
        (line,) = (line for line in printed.splitlines() if line.startswith("layer 1: "))
        assert "7 and 8 are" in printed and "of 64 experts" in line and line.count("%") == 3

    def test_each_layer_with_experts_has_a_line(self):
        """Of which a pool of several layers has one, and each merged graft."""
        sizes = {"feed_forward_types": ["moe", "peer", "dense", "moe"], "moe_num_experts": 3}
        model = AutoModelForCausalLM.from_config(load_config(ModelArguments(config_overrides=SMALL), **sizes)).eval()
        add_experts(model, 36)
        sizes = {"feed_forward_types": ["dense", "peer"] * 2, "share_experts_across_layers": True}
        shared = AutoModelForCausalLM.from_config(load_config(ModelArguments(config_overrides=SMALL), **sizes)).eval()
        for each, numbers in ((model, [3, 100, 3]), (shared, [64]), (merged_in_turn(64, 36), [64, 36])):
            lines = describe_experts(each, torch.arange(20)[None], num_shown=1).splitlines()
            assert len(lines) == len(numbers)
            assert all(f"of {number} experts" in line for line, number in zip(lines, numbers, strict=True))


class TestClassification:
    @pytest.fixture(scope="class")
    def classifier(self, tmp_path_factory):
        """Folder of a classifier of random weights, texts, and what it says of each."""
        folder, texts = tmp_path_factory.mktemp("classifier"), [f"{i * 7919} and {i % 13}" for i in range(150)]
        tokenizer, labels = byte_level_tokenizer(texts, 300, 512), {0: "c", 1: "a", 2: "b"}
        options = {"pad_token_id": tokenizer.pad_token_id, "id2label": labels}
        torch.manual_seed(0)
        config = load_config(ModelArguments(config_overrides=SMALL), **options)
        model = PeerForSequenceClassification(config).eval()
        torch.nn.init.normal_(model.score.weight)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with torch.no_grad():
            scores = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
        return folder, texts, [labels[label] for label in scores.argmax(-1).tolist()]

    def test_learns_labels_of_a_csv(self, checkpoint, tmp_path):
        for name, start in (("train", 0), ("held_out", 1000)):
            rows = [f"number {i},{'odd' if i % 2 else 'even'}" for i in range(start, start + 160)]
            (tmp_path / f"{name}.csv").write_text("\n".join(["content,parity", *rows]))
        run(
            *("run_classification.py", "--model_name_or_path", checkpoint, "--output_dir", tmp_path / "model"),
            *("--train_file", tmp_path / "train.csv", "--validation_file", tmp_path / "held_out.csv"),
            *("--text_column_name", "content", "--label_column_name", "parity", "--do_train", "--do_eval"),
            *("--max_steps", "60", "--per_device_train_batch_size", "16", "--learning_rate", "1e-2"),
            *("--save_strategy", "no"),
        )
        metrics = results(tmp_path / "model")
        assert metrics["eval_samples"] == 160 and metrics["eval_accuracy"] > 0.9
        model = PeerForSequenceClassification.from_pretrained(tmp_path / "model")
        assert model.config.id2label == {0: "even", 1: "odd"}

    def test_evaluation_keeps_the_label_ids_of_the_model(self, classifier, tmp_path, run_here):
        """Labels that are the model's own answers are all right, also if the data lacks one that the model knows."""
        folder, texts, answers = classifier
        (missing, *_) = known = sorted(set(answers))
        rows = [f"{text},{answer}" for text, answer in zip(texts, answers, strict=True) if answer != missing]
        assert rows and len(known) > 1
        (tmp_path / "held_out.csv").write_text("\n".join(["text,label", *rows]))
        flags = ("--model_name_or_path", folder, "--validation_file", tmp_path / "held_out.csv", "--do_eval")
        run_here(run_classification, *flags, "--output_dir", tmp_path / "out", "--report_to", "none", "--use_cpu")
        found = results(tmp_path / "out")
        assert (found["eval_accuracy"], found["eval_samples"]) == (1.0, len(rows))

    def test_a_classifier_of_other_labels_gets_a_new_output_layer_when_asked_to(self, classifier, tmp_path, run_here):
        folder, texts, _ = classifier
        rows = [f"{text},{'de'[len(text) % 2]}" for text in texts]
        (tmp_path / "data.csv").write_text("\n".join(["text,label", *rows]))
        flags = ("--model_name_or_path", folder, "--train_file", tmp_path / "data.csv", "--do_train", "--max_steps", 1)
        flags += ("--output_dir", tmp_path / "out", "--report_to", "none", "--use_cpu")
        with pytest.raises(SystemExit):
            run_here(run_classification, *flags)
        run_here(run_classification, *flags, "--ignore_mismatched_sizes")
        model = PeerForSequenceClassification.from_pretrained(tmp_path / "out")
        assert (model.config.id2label, model.score.weight.shape[0]) == ({0: "d", 1: "e"}, 2)


class TestHub:
    @slow
    def test_pushed_comes_back(self, checkpoint, tmp_path):
        with HubServer() as hub:
            run(
                *("push_to_hub.py", "--model_name_or_path", checkpoint, "--repo_id", "counting", "--pull"),
                *("--license", "apache-2.0", "--tags", "numbers", "--prompt", "7 and"),
                environment=hub.environment(tmp_path),
            )
            files = hub.files("user/counting")
            flags = ("--repo_id", "user/counting", "--pull", "--prompt", "7 and")
            again = run("push_to_hub.py", *flags, environment=hub.environment(tmp_path / "other"))
        assert "user/counting continues:\n7 and" in again
        assert {"config.json", "generation_config.json", "tokenizer.json", "modeling_peer.py"} <= set(files)
        assert not any("checkpoint" in name and not name.endswith(".py") for name in files)
        assert not {"training_args.bin", "training.json"} & set(files)
        assert files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
        card = ModelCard(files["README.md"].decode())
        assert (card.data.license, card.data.tags) == ("apache-2.0", ["peer", "numbers"])
        values = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert values["perplexity"] == pytest.approx(results(checkpoint)["perplexity"])
        assert 'from_pretrained("user/counting")' in card.text and "| `learning_rate` | 0.01 |" in card.text
        assert files["expert_usage.png"].startswith(b"\x89PNG")

    def test_a_dataset_in_a_folder_is_none_of_the_hub(self, tmp_path, monkeypatch):
        """Nor does the card say where it is."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "my" / "texts").mkdir(parents=True)
        config = load_config(ModelArguments(config_overrides=SMALL))
        for name, shown in (("my/texts", None), (str(tmp_path), None), ("user/texts", "user/texts")):
            options = {"prompt": "a", "max_new_tokens": 1}
            options["training"] = {"data": DataTrainingArguments(dataset_name=name).description}
            card = make_card("user/model", config, {"perplexity": 2.0}, dataset_name=name, **options)
            assert card.data.datasets == shown and (shown or name not in str(card))

    def test_refuses_half_a_checkpoint(self, checkpoint, tmp_path):
        shutil.copy(checkpoint / "config.json", tmp_path)
        printed = run("push_to_hub.py", "--model_name_or_path", tmp_path, "--repo_id", "counting", code=1)
        assert "weights" in printed.splitlines()[-1]


class TestQuickstart:
    def test_trains_both_models(self, tmp_path):
        flags = ("--output_dir", tmp_path, "--max_steps", "8", "--block_size", "64", "--max_eval_samples", "8")
        run("quickstart.py", *flags)
        peer, dense = (results(tmp_path, "results.json")[name] for name in ("peer-toy", "dense-toy"))
        assert peer["flops_per_token"] == pytest.approx(0.79 * dense["flops_per_token"], rel=0.01)
        for result in (peer, dense):
            assert result["perplexity_after"] < 0.9 * result["perplexity_before"]
        assert dense["perplexity_at_equal_seconds"] == dense["perplexity_after"]
        loss = peer["eval_losses"][str(peer["steps_at_equal_seconds"])]
        assert peer["perplexity_at_equal_seconds"] == math.exp(loss)
        assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
        AutoModelForCausalLM.from_pretrained(tmp_path / "peer-toy")

    @pytest.mark.parametrize(("limit", "evaluated"), [(2.5, [3]), (math.inf, [])])
    def test_evaluates_once_the_seconds_are_reached(self, monkeypatch, limit, evaluated):
        """Steps take a second each; what is between them, such as evaluations, does not count."""
        now = iter(range(100))
        monkeypatch.setattr(quickstart.time, "perf_counter", lambda: next(now))
        clock, found = quickstart.StepClock(limit), []
        for step in range(1, 6):
            control, state = TrainerControl(), TrainerState(global_step=step)
            clock.on_step_begin(None, state, control)
            clock.on_step_end(None, state, control)
            found += [step] if control.should_evaluate else []
        assert (found, clock.last_step, clock.seconds) == (evaluated, evaluated[0] if evaluated else 5, 5)


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """From top to bottom in the folder in which it is opened, here with fewer steps."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "checkpoints").symlink_to(ROOT / "examples" / "checkpoints")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path / "examples")
    cells = json.loads((ROOT / "examples" / "peer_in_ten_minutes.ipynb").read_text())["cells"]
    printed, names = [], {}
    for source in ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"):
        fewer = source.replace("STEPS = 100", "STEPS = 4").replace("num_steps=200", "num_steps=20")
        exec(compile(fewer, "notebook", "exec"), names)
        printed.append(capsys.readouterr().out)
    assert names["STEPS"] == 4 and "True\n" in printed and "False\n" not in printed
    assert (tmp_path / "runs" / "experts.html").stat().st_size > 20_000
