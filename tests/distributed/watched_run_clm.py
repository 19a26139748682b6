# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Runs `examples/run_clm.py` with the flags that follow, and hands over what it trained.

    python watched_run_clm.py OUTPUT --config_name peer-tiny --do_train ...

With `--resumes` after OUTPUT the same command is given twice more: where its last checkpoint is gone, and where it has
come to its end.
"""

import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import run_clm
import torch.distributed as dist
from cases import hand_over
from train import RANK, WORLD_SIZE, log_of, whole_state


def main() -> None:
    output = Path(sys.argv.pop(1))
    resumes = sys.argv[1] == "--resumes"
    if resumes:
        del sys.argv[1]
    trainer = run_and_hand_over(output, "run")
    if resumes:
        last = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        if RANK == 0:
            shutil.rmtree(last)
        if WORLD_SIZE > 1:
            dist.barrier()
        run_and_hand_over(output, "resumed")
        run_and_hand_over(output, "finished")
    if dist.is_initialized():
        dist.destroy_process_group()


def run_and_hand_over(output: Path, name: str) -> run_clm.Trainer:
    trainers, starts, make_trainer = [], [], run_clm.make_trainer

    def watched_make_trainer(*arguments):
        trainers.append(make_trainer(*arguments))
        starts.append({f"start.{key}": tensor.clone() for key, tensor in whole_state(trainers[0].model).items()})
        return trainers[-1]

    with mock.patch.object(run_clm, "make_trainer", watched_make_trainer):
        run_clm.main()
    (trainer,), (start,) = trainers, starts
    group = getattr(trainer.model.base_model, "memory_group", None)
    facts = {
        "node": int(os.environ.get("GROUP_RANK", "0")),
        "group": None if group is None else dist.get_process_group_ranks(group.columns),
        "shapes": {name: list(parameter.shape) for name, parameter in trainer.model.named_parameters()},
    }
    hand_over(output, f"{name}-{RANK}", whole_state(trainer.model) | start, log_of(trainer) | facts)
    return trainer


if __name__ == "__main__":
    main()
