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
"""
Checkpoints of a `Trainer` whose model is split over processes.

`Trainer` saves the state of an optimizer in its first process, which has a part of it alone, and refuses to do so for
models that Transformers has split. Here all processes save their parts, by torch's distributed checkpoint, which any
number of processes reads.
"""

import json
import random
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import ParallelMode

from ..library_releases import require_transformers
from ..split_checkpoints import has_parts_alone, whole_state_dict
from .row_adamw import RowAdamW


# The folder of a checkpoint that has the parts. If its name had "optimizer" in it, `Trainer` would look for more.
PARTS = "training_state"
# What torch writes last.
LAST_FILE = ".metadata"


class SplitCheckpointCallback(TrainerCallback):
    """
    Lets a `Trainer` save and resume a model that is split over processes, by memory groups or by FSDP2 of Transformers
    alone, or of which [`shard_experts`] split the tables. The training arguments need `save_only_model=True`: what is
    not the model is saved here.

    ```python
    >>> args = TrainingArguments(output_dir, save_only_model=True, save_steps=1000)
    >>> optimizers = make_optimizer(model, args), None
    >>> callbacks = [SplitCheckpointCallback()]
    >>> trainer = Trainer(model, args, train_dataset=dataset, optimizers=optimizers, callbacks=callbacks)
    >>> trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))
    ```

    Each process saves its part of the optimizer's state into the folder `training_state` of a checkpoint, with the
    state of the schedule and random states, before `Trainer` saves the model and `trainer_state.json`. A training that
    has this callback resumes from it on any number of processes, in groups of any size, or in one process; random
    states are those of the saved processes as far as there are as many. Without the callback the optimizer starts
    afresh, as always with `save_only_model=True`. The state of a gradient scaler (`fp16`) is not saved.

    Give it to `Trainer` after callbacks that decide when a checkpoint is saved. Where that is decided later, as by
    `save_strategy="best"`, `Trainer` writes `trainer_state.json` before the optimizer's state, and after
    [`shard_experts`] it cannot save.

    Args:
        resume_from_checkpoint (`str` or `Path`, *optional*):
            The checkpoint to resume from, if it is not in the `output_dir` of the training arguments.

    Raises:
        `RuntimeError`: when the training begins, if Transformers is older than 5.24, or if it resumes from a
            checkpoint that is elsewhere or has no state of an optimizer.
        `ValueError`: when the training begins, if `save_only_model` is `False`.
    """

    def __init__(self, resume_from_checkpoint: str | Path | None = None):
        self.resume_from_checkpoint = resume_from_checkpoint
        self._saved_step = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        require_transformers("5.24", "SplitCheckpointCallback")
        if not args.save_only_model:
            raise ValueError(
                "`SplitCheckpointCallback` needs `save_only_model` = `True` in the training arguments, found `False`: "
                "it saves what is not the model, which `Trainer` saves in one process."
            )
        self._saved_step = None
        if state.global_step:
            folder = self._checkpoint(args, state) / PARTS
            if not (folder / LAST_FILE).exists():
                raise RuntimeError(
                    f"The optimizer's state cannot be resumed: {folder} has no `{LAST_FILE}`. Resume from a "
                    "checkpoint that was saved to its end by a `Trainer` with `SplitCheckpointCallback`."
                )
            _load(folder, model, _bare(optimizer), lr_scheduler)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        # Gathered for a save that another callback called off: later saves must not write it.
        if getattr(model, "gathered_state_dict", None) is not None:
            model.gathered_state_dict = None

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            self._save(args, state, **kwargs)

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_save:
            self._save(args, state, **kwargs)

    def on_save(self, args, state, control, model=None, **kwargs):
        if getattr(model, "gathered_state_dict", None) is not None:
            model.gathered_state_dict = None
        elif self._saved_step != state.global_step:
            self._save(args, state, model=model, **kwargs)

    def _save(self, args, state, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        """Save what all processes have to save, before `Trainer` saves the model in one of them."""
        folder = _folder(args, state)
        _save(folder / PARTS, model, _bare(optimizer), lr_scheduler, args.should_save)
        # Where `Trainer` finds it.
        name = "rng_state.pth" if args.world_size <= 1 else f"rng_state_{args.process_index}.pth"
        torch.save(_random_state(args), folder / name)
        if has_parts_alone(model):
            model.gathered_state_dict = whole_state_dict(model, folder)
        self._saved_step = state.global_step

    def _checkpoint(self, args, state):
        """The folder that `Trainer` resumes from, which it does not tell."""
        if self.resume_from_checkpoint is not None:
            return Path(self.resume_from_checkpoint)
        folder = _folder(args, state)
        try:
            log_history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        except (OSError, ValueError, KeyError):
            log_history = None
        if log_history != state.log_history:
            raise RuntimeError(
                f"The training resumes from a checkpoint that is not {folder}: tell "
                "`SplitCheckpointCallback(resume_from_checkpoint=…)` which it is."
            )
        return folder


def _bare(optimizer):
    """An optimizer without what accelerate puts around it."""
    return getattr(optimizer, "optimizer", optimizer)


def _folder(args, state):
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _save(folder, model, optimizer, lr_scheduler, is_first):
    from transformers.distributed import save_optimizer_distributed

    _make_state(optimizer)
    save_optimizer_distributed(model, optimizer, str(folder))
    if is_first:
        torch.save(lr_scheduler.state_dict(), folder / "scheduler.pt")


def _load(folder, model, optimizer, lr_scheduler):
    from transformers.distributed import load_optimizer_distributed

    _make_state(optimizer)
    load_optimizer_distributed(model, optimizer, str(folder))
    lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))


def _make_state(optimizer):
    # torch would make it by a step with dense gradients, and what has none yet is not in a checkpoint.
    if isinstance(optimizer, RowAdamW):
        optimizer.make_state()


def _random_state(args):
    """As `Trainer` saves it."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        of_all = args.parallel_mode == ParallelMode.DISTRIBUTED
        states["cuda"] = torch.cuda.random.get_rng_state_all() if of_all else torch.cuda.random.get_rng_state()
    return states


__all__ = ["SplitCheckpointCallback"]
