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
"""The model that the examples train, from their flags: configurations, overrides, and checkpoints that are not there."""

import contextlib
import json
import sys

import convert_peer_pytorch
import datasets
import huggingface_hub
import make_explorer_page
import push_to_hub
import pytest
import quantize
import quickstart
import run_clm
import run_generation
import teach_domain
from huggingface_hub import HfApi

from common.command_line import UsageError, command_to_share
from common.model_arguments import ModelArguments, check_output_dir, load_config


def test_overrides():
    config = load_config(ModelArguments(config_overrides="hidden_size=64,query_norm=none,expert_act=relu"))
    assert (config.hidden_size, config.head_dim, config.query_norm, config.expert_act) == (64, 16, None, "relu")
    overrides = '{"num_hidden_layers": 2, "feed_forward_types": ["peer", "pkm"]}'
    config = load_config(ModelArguments(config_name="dense-tiny", config_overrides=overrides))
    assert config.feed_forward_types == ["peer", "pkm"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"config_name": "peer-tinny"}, "no configuration 'peer-tinny': it is neither one of .*'peer-tiny'"),
        (
            {"model_name_or_path": "runs/none"},
            "No checkpoint can be loaded from 'runs/none', which must be a folder .* Hub: .",
        ),
        ({"model_name_or_path": "peer-toy"}, "no checkpoint 'peer-toy', .* a new model takes it by --config_name"),
        ({"config_overrides": '{"num_experts": 64'}, "--config_overrides begins like a JSON object, but is none:"),
        ({"config_overrides": "num_expert=64"}, "no field 'num_expert'"),
        ({"config_overrides": "num_experts"}, "name=value"),
        ({"config_overrides": "num_experts=60"}, "perfect square"),
        ({"config_name": "peer-tiny", "model_name_or_path": "here"}, "Choose either"),
    ],
)
def test_errors_say_what_to_do(monkeypatch, flags, message):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=message):
        load_config(ModelArguments(**flags))


@pytest.fixture
def usage_error(monkeypatch, capsys):
    """The last line that a script prints, of which wrong flags are the end; it is offline."""

    def run(module, *flags):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        for scripts in (run_clm, quantize, teach_domain):
            monkeypatch.setattr(scripts, "setup_logging", lambda training_args: None)  # would outlast the test
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            module.main()
        assert end.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (run_generation, ()),
        (make_explorer_page, ("--text", "one")),
        (convert_peer_pytorch, ("--peer_pytorch_checkpoint", "a.pt", "--layer", "1", "--output_dir", "b")),
        (quantize, ("--output_dir", "b")),
        (teach_domain, ("--train_file", "a.md", "--output_dir", "b")),
        (run_clm, ("--do_train", "--output_dir", "b")),
    ],
)
def test_a_missing_checkpoint_is_named(usage_error, module, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = usage_error(module, "--model_name_or_path", "runs/none", *flags)
    assert "error: No checkpoint can be loaded from 'runs/none', which must be" in error


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (quickstart, ("--train_file", "no.txt"), "There is no file or folder no.txt."),
        (quantize, ("--output_dir", "b"), "--model_name_or_path must name the checkpoint to quantize."),
        (push_to_hub, ("--repo_id", "user/none", "--pull"), "No checkpoint can be loaded from 'user/none'"),
        (run_clm, ("--do_train", "--output_dir", "b", "--config_name", "none"), "There is no configuration 'none'"),
        (
            run_clm,
            ("--do_train", "--output_dir", "b", "--config_overrides", "num_experts=60"),
            "`num_experts` must be a perfect square",
        ),
        (
            run_clm,
            ("--do_train", "--output_dir", "b", "--tokenizer_name", "none", "--train_file", "a.md"),
            "No checkpoint can be loaded from 'none'",
        ),
        (
            run_clm,
            ("--do_train", "--output_dir", "b", "--config_overrides", "vocab_size=9", "--train_file", "a.md"),
            "A byte-level tokenizer has at least 258 tokens",
        ),
    ],
)
def test_mistakes_end_with_one_line(usage_error, module, flags, message, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.md").write_text("one and two\n" * 100)
    assert f"error: {message}" in usage_error(module, *flags)


def test_commands_are_shown_without_the_places_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.md").write_text("one")
    (tmp_path / "ids").mkdir()
    (tmp_path / "ids" / "here").mkdir()
    for value, shown in (
        ("data/a.md", "a.md"),
        (str(tmp_path / "data"), "data"),
        ("/none/a.md", "a.md"),
        ("~/a.md", "a.md"),
        ("../a.md", "a.md"),
        ("data/*.md", "'*.md'"),
        ("runs/new/model", "model"),
        ("ids/here", "here"),
        ("user/model", "user/model"),
        ("0.5", "0.5"),
        ("hf_secret", "TOKEN"),
    ):
        assert command_to_share(["examples/script.py", "--flag", value], "hf_secret") == f"script.py --flag {shown}"
        assert command_to_share(["script.py", f"--flag={value}"], "hf_secret").endswith(
            shown.strip("'") + "'" * ("*" in shown)
        )


def test_a_hub_that_cannot_be_reached_is_named():
    with pytest.raises(SystemExit, match="http://127.0.0.1:9 cannot be reached, so nothing was pushed: "):
        push_to_hub._logged_in_user(HfApi(endpoint="http://127.0.0.1:9", token="hf_x"))


@pytest.mark.parametrize(
    ("model_type", "shown"), [({}, "None"), ({"model_type": "no_such"}, "'no_such'"), ({"model_type": "peer"}, None)]
)
def test_unknown_types_of_models_are_refused(model_type, shown, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(model_type))
    with pytest.raises(UsageError, match=f"`model_type` {shown}, which") if shown else contextlib.nullcontext():
        load_config(ModelArguments(model_name_or_path=str(tmp_path)))


def test_no_model_is_saved_over_the_one_that_it_was_made_from(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    for output_dir in ("base", "base/", "./other/../base", str(tmp_path / "base"), "link"):
        with pytest.raises(UsageError, match=f"--output_dir {output_dir} is the folder of --model_name_or_path"):
            check_output_dir(output_dir, "base")
    for output_dir, model in (("other", "base"), ("new", "base"), ("user/model", "user/model"), ("base", None)):
        check_output_dir(output_dir, model)  # `user/model` is one of the Hub: there is no such folder


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (quantize, ()),
        (convert_peer_pytorch, ("--peer_pytorch_checkpoint", "a.pt", "--layer", "1")),
        (teach_domain, ("--train_file", "a.md")),
    ],
)
def test_scripts_that_change_a_model_refuse_its_folder(usage_error, module, flags, tmp_path):
    error = usage_error(module, "--model_name_or_path", tmp_path, "--output_dir", tmp_path, *flags)
    assert "is the folder of --model_name_or_path" in error
    assert not list(tmp_path.iterdir())
