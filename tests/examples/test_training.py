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
"""What example scripts train, resume and evaluate, and what they refuse before they load anything."""

import json
import shutil
import sys

import datasets
import pytest
import run_classification
import run_clm
import teach_domain
import torch
from safetensors.torch import load_file
from trainer_worker import counting_sequences, small_model, trainer_of

from common.training import last_checkpoint, train
from modeling_peer import SplitCheckpointCallback
from modeling_peer.library_releases import is_at_least


@pytest.fixture
def ends(monkeypatch, capsys):
    """Runs a script that ends with the exit code of wrong flags before it reads data; returns its last line."""

    def main(script, *flags):
        monkeypatch.setattr(script, "setup_logging", lambda training_args: None)  # would outlast the test
        for name in ("load_text", "load_labeled_datasets", "prepare"):
            monkeypatch.setattr(script, name, lambda *_: pytest.fail("data was loaded"), raising=False)
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            script.main()
        assert end.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return main


SCRIPTS = [run_clm, run_classification]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_new_model_is_not_evaluated_untrained(script, ends, tmp_path):
    """Its figures would be written into the card of the model that is in the folder."""
    message = "There is no trained model to evaluate: name it by --model_name_or_path, or add --do_train."
    assert message in ends(script, "--do_eval", "--output_dir", tmp_path)


@pytest.mark.parametrize("script", [*SCRIPTS, teach_domain])
def test_a_checkpoint_that_is_none_is_not_resumed(script, ends, tmp_path):
    """Whatever is not there is not looked for on the Hub."""
    flags = ("--do_train", "--train_file", "a.md", "--output_dir", tmp_path)
    for folder, found in ((tmp_path, "has no trainer_state.json"), (tmp_path / "none", "is no folder")):
        printed = ends(script, *flags, "--resume_from_checkpoint", folder)
        assert "error: --resume_from_checkpoint must be a folder" in printed
        assert printed.endswith(f"but {folder} {found}.")


def test_a_finished_training_is_described_by_the_flags_that_it_had(tmp_path):
    """Not by those of a later start that trained no step, unless nothing was said before."""

    def description(learning_rate, data, max_steps=2):
        options = {"learning_rate": learning_rate, "max_steps": max_steps, "do_train": True}
        options |= {"save_strategy": "steps", "save_steps": 1}
        trainer = trainer_of(small_model(), tmp_path, counting_sequences(8), **options)
        train(trainer, last_checkpoint(trainer.args), data)
        said = json.loads((tmp_path / "training.json").read_text())
        return said["settings"]["learning_rate"], said["data"]

    assert description(0.01, "numbers") == (0.01, "numbers")
    assert description(0.5, "letters") == (0.01, "numbers")
    assert description(0.5, "letters", max_steps=3) == (0.5, "letters")
    (tmp_path / "training.json").unlink()
    assert description(0.25, "words", max_steps=3) == (0.25, "words")


@pytest.mark.skipif(not is_at_least("Transformers", "5.24"), reason="memory groups need Transformers 5.24")
def test_one_process_resumes_the_optimizer_of_a_split_model(tmp_path, monkeypatch):
    """To the bit, which without the state of optimizer and schedule it does not."""
    (tmp_path / "numbers.txt").write_text("".join(f"{i} and {i + 1} are {2 * i + 1}\n" for i in range(400)))
    sizes = "vocab_size=300,hidden_size=32,num_experts=64,num_experts_per_head=4"
    flags = ("--config_name", "peer-tiny", "--config_overrides", sizes)
    flags += ("--train_file", tmp_path / "numbers.txt", "--block_size", 32, "--per_device_train_batch_size", 4)
    flags += ("--do_train", "--output_dir", tmp_path / "model", "--max_steps", 6, "--save_steps", 3, "--use_cpu")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(run_clm, "setup_logging", lambda training_args: None)
    monkeypatch.setattr(sys, "argv", ["run_clm.py", *map(str, flags), "--report_to", "none"])

    def save_in_parts(trainer):
        trainer.args.save_only_model = True
        trainer.add_callback(SplitCheckpointCallback())

    run_clm.main(change=save_in_parts)
    expected = load_file(tmp_path / "model" / "model.safetensors")
    shutil.rmtree(tmp_path / "model" / "checkpoint-6")
    run_clm.main()
    assert (tmp_path / "model" / "checkpoint-6" / "training_state").is_dir()
    for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name
