# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints of a `Trainer` whose model is split over processes.

`Trainer` saves the state of an optimizer in its first process, which has only a part of it, and refuses to do so for
models that Transformers has split. Here all processes save their parts as a distributed checkpoint of torch, which any
number of processes can read.
"""

import json
import random
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import ParallelMode

from ..arguments.check_types import check_types
from ..optim.row_adamw import RowAdamW
from .split_checkpoints import has_parts_alone, whole_state_dict


# The folder in a checkpoint with the parts of everything but the model. If its name contained "optimizer", `Trainer`
# would look for more.
PARTS = "training_state"


class SplitCheckpointCallback(TrainerCallback):
    """
    Lets a `Trainer` save and resume a model that is split over processes by memory groups, by FSDP2 of Transformers
    alone, or by [`shard_experts`]. The training arguments need `save_only_model=True`: the callback saves everything
    else.

    ```python
    >>> args = TrainingArguments(output_dir, save_only_model=True, save_steps=1000)
    >>> optimizers = make_optimizer(model, args), None
    >>> callbacks = [SplitCheckpointCallback()]
    >>> trainer = Trainer(model, args, train_dataset=dataset, optimizers=optimizers, callbacks=callbacks)
    >>> trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))
    ```

    Each process saves its part of the optimizer's state into the folder `training_state` of a checkpoint, with the
    state of the schedule and random states, before `Trainer` saves the model and `trainer_state.json`. A training with
    this callback can resume from it on any number of processes and in groups of any size. Random states are restored
    in as many processes as were saved. The state of a gradient scaler (`fp16`) is not saved. Pass the callback to
    `Trainer` after callbacks that decide when a checkpoint is saved. `save_strategy="best"`, which decides later, does
    not work with [`shard_experts`].

    Args:
        resume_from_checkpoint (`str` or `Path`, *optional*):
            The checkpoint to resume from, if it is not in the `output_dir` of the training arguments.

    Raises:
        `RuntimeError`: when the training begins, if it resumes from a checkpoint that is elsewhere or has no state of
            an optimizer.
        `ValueError`: when the training begins, if `save_only_model` is `False`, or the training resumes from nothing.
    """

    @check_types
    def __init__(self, resume_from_checkpoint: str | Path | None = None):
        self.resume_from_checkpoint = resume_from_checkpoint
        self._saved_step = None

    # Not all supported releases of Transformers have the functions that are imported here.
    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        from transformers.distributed import load_optimizer_distributed

        if not args.save_only_model:
            raise ValueError("`SplitCheckpointCallback` needs `save_only_model=True`: it saves what is not the model.")
        self._saved_step = None
        if self.resume_from_checkpoint is not None and not state.global_step:
            raise ValueError("`Trainer.train` must get the `resume_from_checkpoint` of `SplitCheckpointCallback` too.")
        if state.global_step:
            folder = self._checkpoint(args, state) / PARTS
            if not (folder / ".metadata").exists():  # what torch writes last
                raise RuntimeError(f"The optimizer's state cannot be resumed: {folder} was not saved to its end.")
            load_optimizer_distributed(model, _with_state(optimizer), str(folder))
            lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        # Gathered for a save that another callback canceled: later saves must not write it.
        model.gathered_state_dict = None

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            self._save(args, state, **kwargs)

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, model=None, **kwargs):
        if getattr(model, "gathered_state_dict", None) is not None:
            model.gathered_state_dict = None
        elif self._saved_step != state.global_step:
            self._save(args, state, model=model, **kwargs)

    def _save(self, args, state, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        """Save the parts of all processes, before `Trainer` saves the model in one of them."""
        from transformers.distributed import save_optimizer_distributed

        folder = _folder(args, state)
        save_optimizer_distributed(model, _with_state(optimizer), str(folder / PARTS))
        if args.should_save:
            torch.save(lr_scheduler.state_dict(), folder / PARTS / "scheduler.pt")
        # Where `Trainer` finds it, and as it saves it.
        states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
        if torch.cuda.is_available():
            of_all = args.parallel_mode == ParallelMode.DISTRIBUTED
            states["cuda"] = torch.cuda.random.get_rng_state_all() if of_all else torch.cuda.random.get_rng_state()
        torch.save(states, folder / f"rng_state{f'_{args.process_index}' if args.world_size > 1 else ''}.pth")
        if has_parts_alone(model):
            model.gathered_state_dict = whole_state_dict(model, folder)
        self._saved_step = state.global_step

    def _checkpoint(self, args, state):
        """Find the folder that `Trainer` resumes from, which it does not pass to callbacks."""
        if self.resume_from_checkpoint is not None:
            return Path(self.resume_from_checkpoint)
        file = _folder(args, state) / "trainer_state.json"
        log_history = json.loads(file.read_text(encoding="utf-8"))["log_history"] if file.exists() else None
        if log_history != state.log_history:
            raise RuntimeError(f"The training does not resume from {file.parent}: tell `resume_from_checkpoint`.")
        return file.parent


def _folder(args, state):
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _with_state(optimizer):
    """Return an optimizer without accelerate's wrapper, with state even before its first step."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    # torch would make it by a step with dense gradients, and a checkpoint lacks parameters without state.
    if isinstance(optimizer, RowAdamW):
        optimizer.make_state()
    return optimizer
