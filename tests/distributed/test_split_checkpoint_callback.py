# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of one process; those of several are in `test_saves.py`."""

import shutil

import pytest
import torch
from trainer_worker import logged, small_model, trainer_of
from transformers import TrainerCallback

from modeling_peer import SplitCheckpointCallback, last_complete_checkpoint, make_optimizer
from modeling_peer.parallel.releases import HAS_PARALLEL_STYLES


pytestmark = pytest.mark.skipif(not HAS_PARALLEL_STYLES, reason="needs Transformers 5.24")


def resumable_trainer(folder, seed=0, resume_from_checkpoint=None, **arguments):
    model = small_model(attention_dropout=0.1, seed=seed)
    arguments = {"save_only_model": True, "save_strategy": "steps", "save_steps": 3, **arguments}
    trainer = trainer_of(model, folder, max_steps=6, **arguments)
    trainer.optimizer = make_optimizer(model, trainer.args)
    trainer.add_callback(SplitCheckpointCallback(resume_from_checkpoint))
    return trainer


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    trainer = resumable_trainer(folder)
    trainer.train()
    shutil.rmtree(folder / "checkpoint-6")
    return trainer


def assert_resumes(resumed, checkpoint, unbroken):
    resumed.train(resume_from_checkpoint=checkpoint)
    assert logged(resumed) == logged(unbroken)
    for name, tensor in unbroken.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_one_process_resumes_to_the_bit(unbroken, tmp_path):
    shutil.copytree(unbroken.args.output_dir, tmp_path, dirs_exist_ok=True)
    assert_resumes(resumable_trainer(tmp_path, seed=1), last_complete_checkpoint(tmp_path), unbroken)


def test_a_checkpoint_that_is_elsewhere_has_to_be_told(unbroken, tmp_path):
    checkpoint = f"{unbroken.args.output_dir}/checkpoint-3"
    with pytest.raises(RuntimeError, match="resume_from_checkpoint"):
        resumable_trainer(tmp_path, seed=1).train(resume_from_checkpoint=checkpoint)
    assert_resumes(resumable_trainer(tmp_path, seed=1, resume_from_checkpoint=checkpoint), checkpoint, unbroken)


def test_what_cannot_be_resumed_is_refused(unbroken, tmp_path):
    shutil.copytree(unbroken.args.output_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-3" / "training_state" / ".metadata").unlink()
    with pytest.raises(RuntimeError, match="optimizer"):
        resumable_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(ValueError, match="save_only_model"):
        resumable_trainer(tmp_path, save_only_model=False).train()
    with pytest.raises(ValueError, match="`Trainer.train` must get the `resume_from_checkpoint`"):
        resumable_trainer(tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-3").train()


class DecidesLate(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == 3


def test_what_is_decided_late_is_saved_too(tmp_path):
    trainer = resumable_trainer(tmp_path, save_strategy="no")
    trainer.add_callback(DecidesLate())
    trainer.train()
    assert (tmp_path / "checkpoint-3" / "training_state" / ".metadata").exists()


def test_what_was_gathered_for_a_save_that_was_called_off_is_not_saved_later():
    model = small_model()
    model.gathered_state_dict = {"old": torch.zeros(1)}
    SplitCheckpointCallback().on_step_begin(None, None, None, model=model)
    assert model.gathered_state_dict is None
