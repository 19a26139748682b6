# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The model that examples train, from their flags, and mistakes that end a script before it works for hours."""

import sys

import convert_peer_pytorch
import datasets
import huggingface_hub
import make_explorer_page
import push_to_hub
import pytest
import quantize
import quickstart
import run_classification
import run_clm
import run_generation
import teach_domain
from release_names import is_at_least
from tiny_models import tiny_config

from common.command_line import UsageError, command_to_share
from common.model_arguments import DistributedArguments, ModelArguments, check_output_dir, load_config
from common.text_data import DataTrainingArguments
from common.training import OptimizerArguments
from modeling_peer import PeerQuantizationConfig


def test_overrides():
    config = load_config(ModelArguments(config_overrides="hidden_size=64,query_norm=none,expert_act=relu"))
    assert (config.hidden_size, config.head_dim, config.query_norm, config.expert_act) == (64, 16, None, "relu")
    overrides = '{"num_hidden_layers": 2, "feed_forward_types": ["peer", "pkm"]}'
    config = load_config(ModelArguments(config_name="dense-tiny", config_overrides=overrides))
    assert config.feed_forward_types == ["peer", "pkm"]


MODEL = ("--model_name_or_path", "runs/none")
DATA = ("--train_file", "a.md", "--output_dir", "out")
TRAIN = ("--do_train", *DATA)
LAYER = ("--peer_pytorch_checkpoint", "a.pt", "--layer", "1", "--output_dir", "out")


@pytest.mark.parametrize(
    ("script", "flags", "named"),
    [
        (run_generation, MODEL, "runs/none"),
        (make_explorer_page, (*MODEL, "--text", "one"), "runs/none"),
        (convert_peer_pytorch, (*MODEL, *LAYER), "runs/none"),
        (push_to_hub, ("--repo_id", "user/none", "--pull"), "user/none"),
        (quickstart, ("--train_file", "no.txt"), "no.txt"),
        (quantize, ("--output_dir", "out"), "--model_name_or_path"),
        (quantize, (*MODEL, "--output_dir", "out"), "runs/none"),
        (quantize, (*MODEL, "--bits", "3", "--output_dir", "out"), "bits"),
        (quantize, ("--model_name_or_path", "quantized", *DATA), "quantized"),
        (run_clm, (*MODEL, *TRAIN), "runs/none"),
        (run_clm, ("--do_train",), "--output_dir"),
        (run_clm, ("--do_train", "--output_dir", "out", "--train_file", "no.md"), "no.md"),
        (run_clm, (*TRAIN, "--config_overrides", "num_experts=60"), "num_experts"),
        (run_clm, (*TRAIN, "--tokenizer_name", "none"), "'none'"),
        (run_clm, (*TRAIN, "--config_overrides", "vocab_size=9"), "258"),
        (run_clm, DATA, "--do_train"),
        (run_clm, (*TRAIN, "--streaming"), "--max_steps"),
        # The figures of an untrained model would be written into the card of the model that is in the folder.
        (run_clm, ("--do_eval", "--output_dir", "out"), "--model_name_or_path"),
        (run_classification, ("--do_eval", "--output_dir", "out"), "--model_name_or_path"),
        *((each, (*TRAIN, "--resume_from_checkpoint", "no"), "resume") for each in (run_clm, run_classification)),
        (teach_domain, (*TRAIN, "--resume_from_checkpoint", "no"), "resume"),
        (teach_domain, (*MODEL, *DATA), "runs/none"),
        (teach_domain, DATA, "--model_name_or_path"),
        (teach_domain, ("--model_name_or_path", "here", "--output_dir", "out"), "--train_file"),
        (teach_domain, ("--model_name_or_path", "here", *DATA, "--streaming"), "--streaming"),
        (teach_domain, (*MODEL, *DATA, "--validation_split_percentage", "0"), "--validation_file"),
        # Scripts that change a model refuse its folder.
        (quantize, ("--model_name_or_path", "out", "--output_dir", "out"), "--output_dir"),
        (convert_peer_pytorch, ("--model_name_or_path", "out", *LAYER), "--output_dir"),
        (teach_domain, ("--model_name_or_path", "out", *DATA), "--output_dir"),
    ],
)
def test_mistakes_end_with_one_line(script, flags, named, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(script, "setup_logging", lambda _: None, raising=False)  # would outlast the test
    monkeypatch.setattr(sys, "argv", ["script.py", *flags])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.md").write_text("one and two\n" * 100)
    (tmp_path / "out").mkdir()
    tiny_config(quantization_config=PeerQuantizationConfig()).save_pretrained("quantized")
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in error and named in error
    assert not list((tmp_path / "out").iterdir())


def test_options_that_do_not_go_together(tmp_path):
    for name in ("expert_lr_multiplier", "down_proj_lr_multiplier"):
        with pytest.raises(ValueError, match=f"--{name}"):
            OptimizerArguments(row_adamw=False, **{name: 2.0})
    with pytest.raises(ValueError, match="one source"):
        DataTrainingArguments(dataset_name="somewhere", train_file="here.txt")
    if is_at_least("5.24"):
        training_args = run_clm.PretrainingArguments(output_dir=str(tmp_path))
        training_args.fsdp = True
        with pytest.raises(UsageError, match="--fsdp"):
            DistributedArguments(ep_size=2).make_config(training_args, tiny_config())


def test_commands_are_shown_without_the_places_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.md").write_text("one")
    for value, shown in (
        ("data/a.md", "a.md"),
        (str(tmp_path / "data"), "data"),
        ("/none/a.md", "a.md"),
        ("~/a.md", "a.md"),
        ("runs/new/model", "model"),
        ("user/model", "user/model"),
        ("0.5", "0.5"),
        ("hf_secret", "TOKEN"),
    ):
        for words in (["--flag", value], [f"--flag={value}"]):
            assert command_to_share(["examples/script.py", *words], "hf_secret").endswith(shown)


def test_no_model_is_saved_over_the_one_that_it_was_made_from(tmp_path, monkeypatch):
    for name in ("base", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    for output_dir in ("base", "base/", "./other/../base", str(tmp_path / "base"), "link"):
        with pytest.raises(UsageError, match="--output_dir"):
            check_output_dir(output_dir, "base")
    for output_dir, model in (("other", "base"), ("new", "base"), ("user/model", "user/model"), ("base", None)):
        check_output_dir(output_dir, model)  # `user/model` is one of the Hub: there is no such folder
