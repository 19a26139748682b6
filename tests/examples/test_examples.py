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
"""Every example runs from its command line at a tiny size and saves what its description promises."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tokenize
from itertools import chain
from pathlib import Path

import datasets
import pytest
import quantize
import run_clm
import torch
from graft_models import merged_in_turn
from hub_server import HubServer
from huggingface_hub import ModelCard
from preloaded import python
from run_generation import describe_experts
from safetensors.torch import load_file
from slow_tests import slow
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
)

from common.cards import make_card
from common.command_line import UsageError
from common.model_arguments import DistributedArguments, ModelArguments, load_config
from common.run_estimate import estimate
from common.text_data import (
    DataTrainingArguments,
    load_datasets,
    standard_library,
    text_column,
    tokenize_into_blocks,
    train_tokenizer,
)
from common.training import (
    OptimizerArguments,
    PretrainingArguments,
    make_optimizers,
    save_description,
    write_training_card,
)
from modeling_peer import PeerConfig, PeerForCausalLM, PeerForSequenceClassification, add_experts
from modeling_peer.checkpoint_card import is_written_card
from modeling_peer.library_releases import is_at_least


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
STDLIB = sysconfig.get_paths()["stdlib"]


SMALL = "vocab_size=300,hidden_size=32,intermediate_size=48,num_experts=64,num_experts_per_head=4,query_size=16"
RUN = ("--block_size", "32", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--logging_steps", "4")


def run(script, *flags, environment=None, code=0):
    """
    Runs an example and returns what it printed; it must end with the given code. With an environment, it is in a process
    that imports the libraries itself.
    """
    done = subprocess.run(
        [python() if environment is None else sys.executable, EXAMPLES / script, *map(str, flags)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == code, done.stdout
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
    """
    Folder of a model trained on numbers for twelve steps, with a checkpoint after six. `printed` is beside it, with what
    imports print.
    """
    folder = tmp_path_factory.mktemp("run_clm") / "model"
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder.parent / "cache")}
    printed = run("run_clm.py", *clm_flags(folder, text_file), environment=environment)
    (folder.parent / "printed").write_text(printed)
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
        assert len(eval_losses) == 3
        metrics = results(checkpoint)
        assert metrics["eval_loss"] == pytest.approx(eval_losses[-1], abs=1e-3)
        assert eval_losses[-1] < eval_losses[0] - 1
        assert metrics["perplexity"] == pytest.approx(torch.tensor(metrics["eval_loss"]).exp().item())
        assert metrics["train_samples"] > 10 * metrics["eval_samples"] > 0
        assert 0 < metrics["eval_expert_usage/layer_1"] <= 1
        assert any("expert_unevenness/layer_1" in entry for entry in history if "loss" in entry)

    @pytest.mark.parametrize("bits", [8, 4])
    def test_quantized(self, checkpoint, text_file, bits, tmp_path, monkeypatch, capsys):
        flags = ("--model_name_or_path", checkpoint, "--train_file", text_file, "--block_size", 32)
        flags += ("--bits", bits, "--output_dir", tmp_path)
        monkeypatch.setattr(sys, "argv", ["quantize.py", *map(str, flags)])
        quantize.main()
        figures = results(tmp_path, "quantization.json")
        assert figures["perplexity_before"] == pytest.approx(results(checkpoint)["perplexity"], rel=1e-4)
        assert figures["perplexity_after"] == pytest.approx(figures["perplexity_before"], rel=1e-2)
        assert figures["perplexity_after"] != figures["perplexity_before"]
        assert figures["table_bytes_before"] == 2 * 64 * 32 * 4
        assert figures["table_bytes_after"] == 2 * 64 * (32 * bits // 8 + 2)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.quantization_config.bits == bits
        printed = capsys.readouterr()
        assert f"{figures['table_bytes_after']:,} bytes" in printed.out and "Warning" not in printed.err

    def test_prints_what_a_user_needs(self, checkpoint):
        """Progress, metrics, and when it will end; neither arguments nor configurations, and nothing deprecated."""
        printed = (checkpoint.parent / "printed").read_text()
        assert len(printed.splitlines()) < 130
        assert len(re.findall("'loss': '", printed)) == 4  # of the first step too
        assert re.search(r"seconds per step: the remaining 1 steps take 0:00:0\d.*GB of memory were in use", printed)
        assert printed.index("'loss'") < printed.index("seconds per step") < printed.index("train metrics")
        assert "perplexity" in printed.split("eval metrics")[1]
        assert "log N if one gets all" in printed.split("eval metrics")[1]  # what usage and unevenness are
        assert not re.search("deprecat|TrainingArguments|PeerConfig|Loading weights|Warning", printed)

    def test_new_models_train_at_the_rates_of_the_study(self, tmp_path):
        args = PretrainingArguments(output_dir=str(tmp_path))
        assert (args.lr_scheduler_type, args.warmup_steps, args.logging_first_step) == ("cosine", 0.1, True)
        for hidden_size, is_new, rate in ((64, True, 4e-3), (128, True, 2e-3), (32, True, 4e-3), (32, False, 5e-5)):
            args.learning_rate = None
            args.set_learning_rate(PeerConfig(hidden_size=hidden_size, num_attention_heads=4), is_new)
            assert args.learning_rate == rate
        args.learning_rate = 0.5
        args.set_learning_rate(PeerConfig(), True)
        assert args.learning_rate == 0.5

    def test_estimate(self):
        found = estimate(0.25, 14400, {"memory": 1_240_000_000, "GPU memory": 40_000_000_000})
        assert found.startswith("0.25 seconds per step: the remaining 14,400 steps take 1:00:00 without evaluations")
        assert found.endswith("At most 1.2 GB of memory, 40.0 GB of GPU memory were in use.")

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--do_train"], "error: There is no folder to save to: --output_dir runs/NAME."),
            (
                ["--do_train", "--output_dir", "here", "--train_file", "no.md"],
                "error: There is no file or folder no.md.",
            ),
            (
                ["--output_dir", "here", "--train_file", "a.md"],
                "There is nothing to do: add --do_train, --do_eval or both.",
            ),
            (["--do_train", "--output_dir", "here", "--train_file", "a.md", "--streaming"], "say how long to train"),
        ],
    )
    def test_wrong_flags_end_with_one_line(self, flags, message, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        (tmp_path / "a.md").write_text("".join(counting_lines(100)))
        monkeypatch.setattr(run_clm, "setup_logging", lambda training_args: None)  # would outlast the test
        monkeypatch.setattr(sys, "argv", ["run_clm.py", *flags])
        with pytest.raises(SystemExit) as end:
            run_clm.main()
        assert end.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]

    def test_help_shows_the_main_flags_first(self, monkeypatch, capsys):
        shown = {}
        for flag in ("--help", "--help_all"):
            monkeypatch.setattr(sys, "argv", ["run_clm.py", flag])
            with pytest.raises(SystemExit):
                run_clm.main()
            shown[flag] = re.findall(r"^  --(\w+)", capsys.readouterr().out, flags=re.M)
        assert shown["--help"] == list(run_clm.MAIN_FLAGS)
        assert 15 < len(shown["--help"]) < 26
        assert {*shown["--help"], "adam_beta2", "ep_size", "encoding"} < set(shown["--help_all"])

    def test_checkpoint_loads(self, checkpoint):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        config = model.config
        assert (config.hidden_size, config.num_experts, config.feed_forward_types[1]) == (32, 64, "peer")
        assert len(tokenizer) <= config.vocab_size == 300
        generated = model.generation_config.eos_token_id
        if not is_at_least("Transformers", "5.18"):  # makes a list of one
            (generated,) = generated
        assert config.eos_token_id == tokenizer.eos_token_id == generated
        assert config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
        text = "any text: \t\n  été 漢字"
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    def test_resumes_from_the_last_checkpoint(self, checkpoint, text_file, tmp_path):
        """Training resumed after the sixth step ends bit-identical."""
        shutil.copytree(checkpoint / "checkpoint-6", tmp_path / "checkpoint-6")
        assert f"Resuming training from {tmp_path / 'checkpoint-6'}" in run(
            "run_clm.py", *clm_flags(tmp_path, text_file)
        )
        assert_close(weights(tmp_path), weights(checkpoint), rtol=0, atol=0)
        assert results(tmp_path)["perplexity"] == results(checkpoint)["perplexity"]

    def test_makes_no_step_after_the_last(self, checkpoint, text_file, tmp_path):
        shutil.copytree(checkpoint / "checkpoint-12", tmp_path / "checkpoint-12")
        assert "is the end of this training" in run("run_clm.py", *clm_flags(tmp_path, text_file))
        assert json.loads((tmp_path / "training.json").read_text())["settings"]["optimizer"] == "RowAdamW"
        assert_close(weights(tmp_path), weights(checkpoint), rtol=0, atol=0)
        assert results(tmp_path)["perplexity"] == results(checkpoint)["perplexity"]
        assert not (tmp_path / "checkpoint-13").exists()

    def test_goes_on_from_a_model_with_other_text(self, checkpoint, tmp_path):
        """
        A stream of documents in JSON, by the name of their column, with fewer heads than the model was trained with.
        """
        rows = [json.dumps({"id": i, "body": line * 3}) for i, line in enumerate(counting_lines(400))]
        (tmp_path / "rows.jsonl").write_text("\n".join(rows))
        run(
            "run_clm.py",
            *("--model_name_or_path", checkpoint, "--config_overrides", "num_retrieval_heads=2"),
            *("--train_file", tmp_path / "rows.jsonl", "--text_column_name", "body", "--streaming", *RUN),
            *("--do_train", "--do_eval", "--output_dir", tmp_path / "model", "--max_steps", "4"),
            *("--max_eval_samples", "8", "--save_strategy", "no"),
        )
        assert results(tmp_path / "model")["perplexity"] < 1.5 * results(checkpoint)["perplexity"]
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.num_retrieval_heads == 2
        assert (tmp_path / "model/tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()

    def test_row_adamw(self, checkpoint, text_file, tmp_path):
        """
        A table's state says which of its experts were trained, and its own learning rate is in the optimizer's. A
        command of an earlier release asks for sparse gradients, which is ignored.
        """
        flags = clm_flags(tmp_path, text_file)
        overrides = flags.index(SMALL)
        flags = (*flags[:overrides], f"{SMALL},sparse_expert_gradients=true", *flags[overrides + 1 :])
        multipliers = ("--expert_lr_multiplier", "2", "--down_proj_lr_multiplier", "1")
        run("run_clm.py", *flags, "--second_moment", "row", *multipliers)
        assert results(tmp_path)["perplexity"] == pytest.approx(results(checkpoint)["perplexity"], rel=0.3)
        optimizer = torch.load(tmp_path / "checkpoint-6/optimizer.pt")
        groups = {group["rows"]: group for group in optimizer["param_groups"]}
        assert groups[True]["initial_lr"] == 2 * groups[False]["initial_lr"] == 2e-2
        for table in groups[True]["params"]:
            assert optimizer["state"][table]["exp_avg_sq"].shape == (64, 1)
            assert 0 < optimizer["state"][table]["row_steps"].max() <= 6

    def test_flags_of_row_adamw_need_it(self):
        for name in ("expert_lr_multiplier", "down_proj_lr_multiplier"):
            with pytest.raises(ValueError, match=f"--{name}.*leave out --no_row_adamw"):
                OptimizerArguments(row_adamw=False, **{name: 2.0})

    def test_multipliers_reach_the_optimizer(self, tmp_path):
        args = OptimizerArguments(row_adamw=True, expert_lr_multiplier=2.0, down_proj_lr_multiplier=4.0)
        model = AutoModelForCausalLM.from_config(load_config(ModelArguments(config_overrides=SMALL)))
        training_args = TrainingArguments(output_dir=str(tmp_path), learning_rate=0.5)
        optimizer, _ = make_optimizers(args, training_args, model, is_new=True)
        assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5, 1.0, 4.0]

    def test_rates_of_the_scaling_study_are_for_new_models(self, tmp_path):
        model = AutoModelForCausalLM.from_config(load_config(ModelArguments(config_overrides=SMALL)))
        training_args = TrainingArguments(output_dir=str(tmp_path), learning_rate=0.5)
        of_new, _ = make_optimizers(OptimizerArguments(), training_args, model, is_new=True)
        assert [group["lr"] for group in of_new.param_groups] == [0.5, 0.5, 0.125, 24.0]
        of_checkpoint, _ = make_optimizers(OptimizerArguments(), training_args, model, is_new=False)
        assert [group["lr"] for group in of_checkpoint.param_groups] == [0.5, 0.5, 0.5]

    def test_memory_groups_that_cannot_be_are_refused(self, tmp_path):
        training_args = TrainingArguments(output_dir=str(tmp_path))
        config = load_config(ModelArguments(config_overrides=SMALL))
        assert DistributedArguments().make_config(training_args, config) is None
        for size in (2, 0):
            with pytest.raises(UsageError, match=f"--ep_size must divide the number of processes, 1, got {size}"):
                DistributedArguments(ep_size=size).make_config(training_args, config)
        with pytest.raises(UsageError, match="--ep_size 2 needs a PEER model, not one of PreTrainedConfig"):
            DistributedArguments(ep_size=2).make_config(training_args, PreTrainedConfig())
        training_args.fsdp = True
        with pytest.raises(UsageError, match="--ep_size 2 applies FSDP2 itself: leave out --fsdp"):
            DistributedArguments(ep_size=2).make_config(training_args, config)

    def test_fsdp_leaves_the_optimizer_to_the_trainer(self, tmp_path):
        model = AutoModelForCausalLM.from_config(load_config(ModelArguments(config_overrides=SMALL)))
        training_args = TrainingArguments(output_dir=str(tmp_path))
        assert make_optimizers(OptimizerArguments(row_adamw=False), training_args, model, True) == (None, None)
        training_args.fsdp = True
        assert make_optimizers(OptimizerArguments(), training_args, model, True) == (None, None)


class TestText:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def test_standard_library(self):
        splits = standard_library()
        train, held_out = (set(splits[name]["file"]) for name in ("train", "validation"))
        assert "json/decoder.py" in train | held_out
        assert not train & held_out
        assert 0.02 < len(held_out) / len(train) < 0.1
        assert not any("test" in name.split("/") or "site-packages" in name for name in train | held_out)
        again = standard_library()
        assert all(again[name]["file"] == splits[name]["file"] for name in splits)
        first = splits["train"][0]
        with tokenize.open(Path(STDLIB, first["file"])) as file:
            assert first["text"] == file.read()

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("source", ["train_file", "dataset_name"])
    def test_rows_are_held_out(self, tmp_path, source, streaming):
        rows = tmp_path / "rows" / "train.csv"
        rows.parent.mkdir()
        rows.write_text("text\n" + "\n".join(f"row {i}" for i in range(200)))
        args = DataTrainingArguments(
            **{source: str(rows if source == "train_file" else rows.parent)}, validation_split_percentage=10
        )
        splits = load_datasets(args, streaming)
        train, held_out = ([row["text"] for row in splits[name]] for name in ("train", "validation"))
        assert (len(train), len(held_out)) == (180, 20)
        assert sorted(train + held_out) == sorted(f"row {i}" for i in range(200))
        assert "row 100" in held_out

    def test_blocks_hold_the_text_and_its_ends(self, tmp_path):
        (tmp_path / "rows.csv").write_text("id,body\n" + "\n".join(f"{i},text {i}" for i in range(40)))
        args = DataTrainingArguments(train_file=str(tmp_path / "rows.csv"), text_column_name="body")
        dataset = load_datasets(args)["train"]
        tokenizer = train_tokenizer(dataset, "body", 300, 64)
        blocks = tokenize_into_blocks(dataset, tokenizer, 16, args)
        assert all(len(block["input_ids"]) == 16 and block["labels"] == block["input_ids"] for block in blocks)
        text = tokenizer.decode(list(chain.from_iterable(blocks["input_ids"])))
        assert "<|endoftext|>".join(dataset["body"]).startswith(text)
        assert len(blocks) == sum(len(ids) + 1 for ids in tokenizer(dataset["body"][:]).input_ids) // 16

    def test_tokenizer_is_deterministic(self, text_file):
        dataset = load_datasets(DataTrainingArguments(train_file=str(text_file)))["train"]
        first, second = (train_tokenizer(dataset, "text", 280, 64) for _ in range(2))
        assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
        assert len(first) == 280

    def test_errors_say_what_to_do(self, text_file):
        with pytest.raises(ValueError, match="Choose one source of data"):
            DataTrainingArguments(dataset_name="somewhere", train_file="here.txt")
        dataset = load_datasets(DataTrainingArguments(train_file=str(text_file)))["train"]
        with pytest.raises(ValueError, match=r"'body' does not exist.*another --text_column_name of \['text'\]"):
            text_column(dataset, DataTrainingArguments(text_column_name="body"))
        with pytest.raises(ValueError, match="at least 258 tokens"):
            train_tokenizer(dataset, "text", 64, 64)


class TestGeneration:
    def test_prints_text_and_experts(self, checkpoint):
        printed = run(
            *("run_generation.py", "--model_name_or_path", checkpoint, "--prompt", "7 and 8 are"),
            *("--do_sample", "--temperature", "0.7", "--max_new_tokens", "12", "--num_shown_experts", "3"),
        )
        assert "7 and 8 are" in printed
        (line,) = (line for line in printed.splitlines() if line.startswith("layer 1: "))
        assert "of 64 experts used over" in line
        assert line.count("%") == 3

    @pytest.mark.parametrize("mode", ["protected", "open"])
    def test_added_experts_are_counted(self, checkpoint, tmp_path, mode):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        add_experts(model, 36, mode=mode)
        model.save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path)
        printed = run("run_generation.py", "--model_name_or_path", tmp_path, "--max_new_tokens", "3")
        assert re.search(r"^layer 1: .* of 100 experts used over", printed, re.MULTILINE)

    def test_a_pool_of_several_layers_has_one_line(self):
        config = load_config(
            ModelArguments(config_name="peer-tiny", config_overrides=SMALL),
            feed_forward_types=["dense", "peer", "dense", "peer"],
            share_experts_across_layers=True,
        )
        model = AutoModelForCausalLM.from_config(config).eval()
        described = describe_experts(model, torch.arange(20)[None], num_shown=1)
        assert re.fullmatch(r"layers 1, 3: \d+ of 64 experts used over 20 tokens, most: .*", described)

    def test_each_merged_graft_has_a_line(self):
        lines = describe_experts(merged_in_turn(64, 36), torch.arange(20)[None], num_shown=1).splitlines()
        assert [re.sub(" [0-9]+ of", " of", line.partition(" experts")[0]) for line in lines] == [
            "layer 1 graft_0: of 64",
            "layer 1 graft_1: of 36",
        ]

    def test_each_layer_with_experts_has_a_line(self):
        config = load_config(
            ModelArguments(config_name="peer-tiny", config_overrides=SMALL),
            feed_forward_types=["moe", "peer", "dense", "moe"],
            moe_num_experts=3,
        )
        model = AutoModelForCausalLM.from_config(config).eval()
        add_experts(model, 36)
        lines = describe_experts(model, torch.arange(20)[None], num_shown=1).splitlines()
        assert [re.sub(" [0-9]+ of", " of", line.partition(" experts")[0]) for line in lines] == [
            "layer 0: of 3",
            "layer 1: of 100",
            "layer 3: of 3",
        ]

    def test_beams_of_a_model_without_experts(self, tmp_path, checkpoint):
        config = load_config(ModelArguments(config_name="dense-tiny", config_overrides="vocab_size=300"))
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path)
        printed = run(
            "run_generation.py", "--model_name_or_path", tmp_path, "--num_beams", "2", "--max_new_tokens", "3"
        )
        assert "No layer of this model has experts." in printed


class TestClassification:
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
        assert metrics["eval_samples"] == 160
        assert metrics["eval_accuracy"] > 0.9
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
        assert isinstance(model, PeerForSequenceClassification)
        assert model.config.id2label == {0: "even", 1: "odd"}

    def test_default_task(self, checkpoint, tmp_path):
        run(
            *("run_classification.py", "--model_name_or_path", checkpoint, "--output_dir", tmp_path),
            *("--do_train", "--do_eval", "--max_steps", "2", "--max_eval_samples", "16", "--max_train_samples", "64"),
        )
        assert 0 <= results(tmp_path)["eval_accuracy"] <= 1
        assert set(results(tmp_path, "config.json")["label2id"]) >= {"asyncio", "email"}


class TestHub:
    @slow
    def test_pushed_comes_back(self, checkpoint, tmp_path):
        with HubServer() as hub:
            printed = run(
                *("push_to_hub.py", "--model_name_or_path", checkpoint, "--repo_id", "counting", "--pull"),
                *("--license", "apache-2.0", "--tags", "numbers", "--prompt", "7 and"),
                environment=hub.environment(tmp_path),
            )
            files = hub.files("user/counting")
            again = run(
                *("push_to_hub.py", "--repo_id", "user/counting", "--pull", "--prompt", "7 and"),
                environment=hub.environment(tmp_path / "other"),
            )
        assert "user/counting continues:\n7 and" in printed
        assert f"So does {checkpoint}" in printed
        assert "user/counting continues:\n7 and" in again
        assert {"config.json", "generation_config.json", "tokenizer.json", "modeling_peer.py"} <= set(files)
        assert not any("checkpoint" in name and not name.endswith(".py") for name in files)
        assert "training_args.bin" not in files
        assert files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
        card = ModelCard(files["README.md"].decode())
        assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
        assert (card.data.license, card.data.tags) == ("apache-2.0", ["peer", "numbers"])
        values = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert values["perplexity"] == pytest.approx(results(checkpoint)["perplexity"])
        assert 'from_pretrained("user/counting")' in card.text and "# counting\n" in card.text
        assert 'from_pretrained("user/counting", trust_remote_code=False)' in card.text
        assert "h = 4 heads retrieve k = 4 of N = 64 experts" in card.text and "pip install .\n" in card.text
        assert "Data: files of numbers.txt." in card.text and "| `learning_rate` | 0.01 |" in card.text
        assert "| `optimizer` | RowAdamW |" in card.text and "## Limitations" in card.text
        assert "](expert_usage.png)" in card.text and "log N if one gets all" in card.text
        assert files["expert_usage.png"].startswith(b"\x89PNG")
        assert "training.json" not in files and "chat_template.jinja" in files

    def test_card_of_a_trained_model(self, checkpoint):
        """In its folder, until somebody writes another or a push names the repository: what its training was."""
        text = (checkpoint / "README.md").read_text()
        assert is_written_card(text) and "# model\n" in text and "h = 4 heads retrieve k = 4 of N = 64" in text
        for said in (
            "Data: files of numbers.txt.",
            "| `learning_rate` | 0.01 |",
            "](expert_usage.png)",
            "Limitations",
        ):
            assert said in text
        assert 'from_pretrained("path/to/this/folder", trust_remote_code=False)' in text
        assert (checkpoint / "expert_usage.png").read_bytes().startswith(b"\x89PNG")

    def test_card_of_a_model_that_its_trainer_pushes(self, tmp_path):
        """Nothing is known of the usage of its experts."""
        model = PeerForCausalLM(load_config(ModelArguments(config_overrides=SMALL)))
        model.name_or_path = "user/before"
        trainer = Trainer(model, TrainingArguments(output_dir=str(tmp_path), report_to="none"))
        (tmp_path / "README.md").write_text("Mine.")
        write_training_card(trainer)
        assert (tmp_path / "README.md").read_text() == "Mine."
        trainer.hub_model_id = "user/numbers"
        save_description(trainer, "numbers")
        write_training_card(trainer, dataset="user/digits", license="mit", finetuned_from="user/before")
        card = ModelCard.load(tmp_path / "README.md")
        assert "# numbers\n" in card.text and "h = 2 heads retrieve k = 4 of N = 64 experts each" in card.text
        assert (card.data.base_model, card.data.license, card.data.datasets) == ("user/before", "mit", "user/digits")
        assert 'from_pretrained("user/numbers", trust_remote_code=False)' in card.text
        assert "expert_usage.png" not in card.text and not is_written_card(card.text)

    def test_a_dataset_in_a_folder_is_none_of_the_hub(self, tmp_path, monkeypatch):
        """Nor does the card say where it is."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "my" / "texts").mkdir(parents=True)
        config = load_config(ModelArguments(config_overrides=SMALL))
        for name, shown in (("my/texts", None), (str(tmp_path), None), ("user/texts", "user/texts"), ("imdb", "imdb")):
            data = DataTrainingArguments(dataset_name=name).description
            assert data == (shown or Path(name).name)
            options = {"prompt": "a", "max_new_tokens": 1, "training": {"data": data}}
            card = make_card("user/model", config, {"perplexity": 2.0}, dataset_name=name, **options)
            assert card.data.datasets == shown
            (result,) = card.data.eval_results
            assert (result.dataset_type, result.dataset_name) == (shown or "text", shown or "held-out text")
            assert shown or name not in str(card)

    def test_says_who_is_not_logged_in(self, checkpoint, tmp_path):
        with HubServer() as hub:
            environment = hub.environment(tmp_path) | {"HF_TOKEN": ""}
            flags = ("push_to_hub.py", "--model_name_or_path", checkpoint, "--repo_id", "counting")
            assert "You are not logged in" in run(*flags, environment=environment, code=1)

    def test_refuses_half_a_checkpoint(self, checkpoint, tmp_path):
        shutil.copy(checkpoint / "config.json", tmp_path)
        flags = ("push_to_hub.py", "--model_name_or_path", tmp_path, "--repo_id", "counting")
        assert "it lacks a generation configuration, a tokenizer, weights" in run(*flags, code=1)
