# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Every example runs from its command line at a tiny size and saves what its description promises."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import quantize
import run_classification
import run_clm
from documentation import ROOT
from hub_server import HubServer
from huggingface_hub import ModelCard
from main_runs import run_main
from preloaded import python
from release_names import is_at_least
from safetensors.torch import load_file
from slow_tests import slow
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from common.cards import MARK
from modeling_peer import PeerForSequenceClassification, SplitCheckpointCallback


SMALL = "vocab_size=300,hidden_size=32,intermediate_size=48,num_experts=64,num_experts_per_head=4,query_size=16"
RUN = ("--block_size", "32", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--logging_steps", "4")


def run(script, *flags, environment=None):
    """
    Runs an example and returns what it printed; it must not fail. With an environment, it is in a process that imports
    the libraries itself.
    """
    done = subprocess.run(
        [python() if environment is None else sys.executable, ROOT / "examples" / script, *map(str, flags)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


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


def test_results(checkpoint):
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
    assert (checkpoint / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("last", [6, 12])
def test_resumes_from_the_last_checkpoint(checkpoint, text_file, tmp_path, last):
    """It ends bit-identical, also if no step is left."""
    resumed = shutil.copytree(checkpoint / f"checkpoint-{last}", tmp_path / f"checkpoint-{last}")
    before = (resumed / "optimizer.pt").stat().st_mtime_ns
    run("run_clm.py", *clm_flags(tmp_path, text_file))
    assert (resumed / "optimizer.pt").stat().st_mtime_ns == before  # no step up to it was made again
    assert_close(weights(tmp_path), weights(checkpoint), rtol=0, atol=0)
    assert results(tmp_path)["perplexity"] == results(checkpoint)["perplexity"]
    assert not (tmp_path / "checkpoint-13").exists()


@pytest.mark.skipif(not is_at_least("5.24"), reason="memory groups need Transformers 5.24")
def test_one_process_resumes_the_optimizer_of_a_split_model(text_file, tmp_path):
    """To the bit, which without the state of optimizer and schedule it does not."""

    def save_in_parts(trainer):
        trainer.args.save_only_model = True
        trainer.add_callback(SplitCheckpointCallback())

    flags = ("--config_overrides", SMALL, "--train_file", text_file, *RUN, "--do_train", "--max_steps", 6)
    flags += ("--output_dir", tmp_path / "model", "--save_steps", 3, "--use_cpu", "--report_to", "none")
    run_main(run_clm, *flags, change=save_in_parts)
    expected = weights(tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "checkpoint-6")
    run_main(run_clm, *flags)
    assert (tmp_path / "model" / "checkpoint-6" / "training_state").is_dir()
    assert_close(weights(tmp_path / "model"), expected, rtol=0, atol=0)


def test_goes_on_from_a_model_with_other_text(checkpoint, tmp_path):
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


@pytest.mark.parametrize("bits", [8, 4])
def test_quantize(checkpoint, text_file, bits, tmp_path):
    flags = ("--model_name_or_path", checkpoint, "--train_file", text_file, "--block_size", 32)
    run_main(quantize, *flags, "--bits", bits, "--output_dir", tmp_path)
    figures = results(tmp_path, "quantization.json")
    assert figures["perplexity_before"] == pytest.approx(results(checkpoint)["perplexity"], rel=1e-4)
    assert figures["perplexity_after"] == pytest.approx(figures["perplexity_before"], rel=1e-2)
    assert figures["perplexity_after"] != figures["perplexity_before"]
    assert figures["table_bytes_before"] == 2 * 64 * 32 * 4
    assert figures["table_bytes_after"] == 2 * 64 * (32 * bits // 8 + 2)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.quantization_config.bits == bits


def test_prints_text_and_experts(checkpoint):
    flags = ("--do_sample", "--temperature", "0.7", "--max_new_tokens", "12", "--num_shown_experts", "3")
    printed = run("run_generation.py", "--model_name_or_path", checkpoint, "--prompt", "7 and 8 are", *flags)
    (line,) = (line for line in printed.splitlines() if line.startswith("layer_1: "))
    assert "7 and 8 are" in printed and "of 64 experts" in line and line.count("%") == 3


def test_learns_labels_of_a_csv_and_keeps_their_ids(checkpoint, tmp_path):
    """Also if what it is evaluated on lacks a label that the model knows. Rows without a text or a label are left out."""
    for name, numbers in (("train", range(160)), ("held_out", range(1000, 1160)), ("odd", range(1001, 1160, 2))):
        rows = [f"{'odd' if i % 2 else 'even'},number {i}" for i in numbers]
        (tmp_path / f"{name}.csv").write_text("\n".join(["parity,content", *rows, "odd,", ",number 3"]))
    columns = ("--label_column_name", "parity")
    run(
        *("run_classification.py", "--model_name_or_path", checkpoint, "--output_dir", tmp_path / "model"),
        *("--train_file", tmp_path / "train.csv", "--validation_file", tmp_path / "held_out.csv", *columns),
        *("--do_train", "--do_eval", "--max_steps", "60", "--per_device_train_batch_size", "16"),
        *("--learning_rate", "1e-2", "--save_strategy", "no"),
    )
    metrics = results(tmp_path / "model")
    assert metrics["eval_samples"] == 160 and metrics["eval_accuracy"] > 0.9
    model = PeerForSequenceClassification.from_pretrained(tmp_path / "model")
    assert model.config.id2label == {0: "even", 1: "odd"}
    flags = ("--model_name_or_path", tmp_path / "model", "--validation_file", tmp_path / "odd.csv", *columns)
    flags += ("--do_eval", "--output_dir", tmp_path / "out", "--report_to", "none", "--use_cpu")
    run_main(run_classification, *flags)
    metrics = results(tmp_path / "out")
    assert metrics["eval_samples"] == 80 and metrics["eval_accuracy"] > 0.8


@slow
def test_pushed_comes_back(checkpoint, tmp_path):
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
    assert (
        'from_pretrained("user/counting", trust_remote_code=True)' in card.text
        and "| `learning_rate` | 0.01 |" in card.text
    )
    assert files["expert_usage.png"].startswith(b"\x89PNG")


@slow
def test_compares_models(tmp_path):
    """All that are named, on the same tokens, of which 5-grams with a cache predict more."""
    flags = ("--output_dir", tmp_path, "--max_steps", "8", "--block_size", "64", "--max_eval_samples", "8")
    printed = run("quickstart.py", "--models", "dense", "pkm", "peer", *flags)
    found = results(tmp_path, "results.json")
    dense, pkm, peer = (found[f"{name}-toy"] for name in ("dense", "pkm", "peer"))
    assert pkm["flops_per_token"] == peer["flops_per_token"]
    assert peer["flops_per_token"] == pytest.approx(0.79 * dense["flops_per_token"], rel=0.01)
    for result in (dense, pkm, peer):
        assert result["perplexity_after"] < 0.9 * result["perplexity_before"]
        loss = result["eval_losses"][str(result["steps_at_equal_seconds"])]
        assert result["perplexity_at_equal_seconds"] == math.exp(loss)
    assert dense["perplexity_at_equal_seconds"] == dense["perplexity_after"]
    assert 0 < found["5-grams"]["eval_loss"] < math.log(peer["perplexity_after"])
    change = peer["perplexity_after"] / dense["perplexity_after"] - 1
    assert f"peer-toy: perplexity {abs(change):.1%} {'above' if change > 0 else 'below'} dense-toy after" in printed
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    AutoModelForCausalLM.from_pretrained(tmp_path / "peer-toy")


@slow
def test_experts_store_facts_that_a_dense_model_does_not():
    printed = run("store_facts.py")
    rows = dict(re.findall(r"^(\S[\w -]+?)  +(.*)$", printed, re.MULTILINE))
    peer, *dense = (float(cell.rstrip("%")) for cell in rows["facts recalled"].split())
    assert peer > 90 and max(dense) < 10
    bits = [int(cell) for cell in rows["kbit stored"].split()]
    assert bits[0] > bits[2] > bits[1]
    seen, seconds = ([int(cell) for cell in rows[name].split()] for name in ("times seen", "seconds"))
    assert seen[0] == seen[1] < seen[2] and 0.4 * seconds[0] < seconds[2] < 2.5 * seconds[0]
    flops = [int(cell.replace(",", "")) for cell in rows["FLOPs per token"].split()]
    assert max(flops) < 1.05 * min(flops)
    answers = {name: rest.partition(" -> ")[2] for name, rest in rows.items() if " -> " in rest}
    assert answers["peer-16384"] == answers["the fact"] != answers["dense"]


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
