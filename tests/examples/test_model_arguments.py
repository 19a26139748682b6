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

import sys

import convert_peer_pytorch
import huggingface_hub
import make_explorer_page
import pytest
import quantize
import run_generation
import teach_domain
from huggingface_hub.errors import StrictDataclassError

from common.command_line import UsageError
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
    with pytest.raises((OSError, ValueError, StrictDataclassError), match=message):
        load_config(ModelArguments(**flags))


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (run_generation, ()),
        (make_explorer_page, ("--text", "one")),
        (
            convert_peer_pytorch,
            (
                "--peer_pytorch_checkpoint",
                "a.pt",
                "--layer",
                "1",
                "--output_dir",
                "b",
                "--num_experts_per_head",
                "4",
            ),
        ),
    ],
)
def test_a_missing_checkpoint_is_named(monkeypatch, module, flags):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", ["script.py", "--model_name_or_path", "runs/none", *flags])
    with pytest.raises(OSError, match="No checkpoint can be loaded from 'runs/none'"):
        module.main()


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
def test_scripts_that_change_a_model_refuse_its_folder(module, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(teach_domain, "setup_logging", lambda training_args: None)  # would outlast the test
    folder = str(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py", "--model_name_or_path", folder, "--output_dir", folder, *flags])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 2
    assert "is the folder of --model_name_or_path" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
