# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A training that was killed, also in the midst of a save, goes on from the last checkpoint that is complete."""

import os
import signal
from pathlib import Path

import preloaded
import pytest
import torch
from safetensors import SafetensorError
from trainer_worker import counting_sequences, logged, small_model, trainer_of
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from modeling_peer import PeerPreTrainedModel, last_complete_checkpoint


# When the process is killed in its second save: in the midst of the weights or of the trainer state, and after it.
MOMENTS = ["weights", "trainer state", "complete"]


def resumable_trainer(folder, seed=0):
    """Epochs have five steps, so that the second save is in the midst of the second epoch."""
    model = small_model("dense", "peer", "pkm", attention_dropout=0.1, seed=seed)
    options = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
    return trainer_of(model, folder, counting_sequences(40), max_steps=9, **options)


def killed_at(moment, method):
    """A method in whose second call the process is killed."""
    calls = []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) < 2:
            return method(*args, **kwargs)
        method(*args, **kwargs)
        if moment in ("weights", "trainer state"):
            path = Path(args[1])
            path = path / "model.safetensors" if moment == "weights" else path
            os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    return call


def train_until_killed(folder, moment):
    """For a process of its own, which does not outlive it."""
    saves_weights = moment == "weights"
    owner, name = (PeerPreTrainedModel, "save_pretrained") if saves_weights else (TrainerState, "save_to_json")
    setattr(owner, name, killed_at(moment, getattr(owner, name)))
    torch.set_num_threads(1)
    resumable_trainer(folder).train()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    trainer = resumable_trainer(tmp_path_factory.mktemp("unbroken"))
    trainer.train()
    return trainer


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_training_killed_while_it_saves_resumes_to_the_bit(moment, tmp_path, unbroken):
    process = preloaded.context().Process(target=train_until_killed, args=(str(tmp_path), moment))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    step = 6 if moment == "complete" else 3
    checkpoint = last_complete_checkpoint(str(tmp_path))
    assert checkpoint == str(tmp_path / f"checkpoint-{step}") == last_complete_checkpoint(tmp_path)
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-6")
    if moment != "complete":
        with pytest.raises((OSError, ValueError, SafetensorError)):
            resumable_trainer(tmp_path, seed=1).train(resume_from_checkpoint=True)
    resumed = resumable_trainer(tmp_path, seed=1)
    resumed.train(resume_from_checkpoint=checkpoint)
    for name in ("loss", "grad_norm", "learning_rate"):
        assert len(logged(resumed, name)) == 9 and logged(resumed, name) == logged(unbroken, name)
    for name, tensor in unbroken.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")


def write(folder, state="{}"):
    folder.mkdir(parents=True)
    (folder / TRAINER_STATE_NAME).write_text(state)


def test_that_of_the_latest_step_is_found_if_there_is_any(tmp_path):
    assert last_complete_checkpoint(tmp_path / "not there") is None
    assert last_complete_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-2").write_text("a file")
    write(tmp_path / "checkpoint-3", "")
    write(tmp_path / "checkpoint-4", "[1, 2]")
    assert last_complete_checkpoint(tmp_path) is None
    for name in ("checkpoint-5", "checkpoint-10", "checkpoint-9", "checkpoint-best", "old-checkpoint-99"):
        write(tmp_path / name)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
