# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Saves and resumes tiny models with the stock `Trainer` on however many processes it is launched in.

    python saves.py OUTPUT '{"name": …}' …                          one process
    torchrun --nproc_per_node 2 saves.py OUTPUT '{"name": …}' …     memory groups

Each job is the arguments of `train`, or those of `measure` if it has the name "memory".
"""

import argparse
import json
import os
import signal
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from cases import VOCAB_SIZE, hand_over, tiny_config
from graft_models import base_model_of, grafted
from safetensors.torch import load_file
from train import RANK, WORLD_SIZE, log_of, trainer_of, whole, whole_state
from transformers import LlamaForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig

from common.machine import OwnMemory
from modeling_peer import (
    PeerForCausalLM,
    RowAdamW,
    SplitCheckpointCallback,
    expert_parameter_groups,
    last_complete_checkpoint,
    shard_experts,
    whole_state_dict,
)
from modeling_peer.parallel import split_checkpoints
from modeling_peer.parallel.split_initialization import make_split_model


CONFIG = tiny_config("peer", "pkm", "dense")
SAVED_AT = 3  # of eight steps, in the midst of an epoch
ROUNDING_SEED = 7

# The base model of a graft has biases, so that its tables have a width that does not divide.
BASE_MODEL = {"vocab_size": VOCAB_SIZE, "mlp_bias": True}
GRAFT = {"placement": "in_place", "num_experts": 10**2}

# With tables of 52 MB in bfloat16, beside which all else is small.
LARGE = tiny_config("peer", "dense", hidden_size=64, num_experts=640**2, query_size=16)


class Watch(TrainerCallback):
    """Hands over the optimizer's state where it is saved, and where a training starts from it."""

    def __init__(self, output: Path, name: str, killed: bool):
        self.output, self.name, self.killed = output, name, killed

    def hand_over(self, event: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        tensors = {
            f"{name}.{key}": whole(value)
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        hand_over(self.output, f"{self.name}-{event}-{RANK}", tensors, {"groups": groups})

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step:
            self.hand_over("resumed", model, optimizer)

    def on_save(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == SAVED_AT:
            self.hand_over("saved", model, optimizer)

    def on_step_end(self, args, state, control, **kwargs):
        if self.killed and RANK == 1 and state.global_step == 2 * SAVED_AT - 1:
            (self.output / "killed_at").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


def new_model(config, group_size: int, beside_replicas: bool = False, dtype=torch.float32) -> torch.nn.Module:
    arguments = {"dtype": dtype}
    if WORLD_SIZE > 1 and not beside_replicas:
        arguments["distributed_config"] = DistributedConfig(fsdp_size=WORLD_SIZE, ep_size=group_size)
    model = make_split_model(PeerForCausalLM, config, **arguments)
    return shard_experts(model, group_size) if beside_replicas else model


def base_folder(output: Path) -> Path:
    """Where this process keeps the base model that grafts are added to."""
    return output / f"base-{WORLD_SIZE}-{RANK}"


def new_graft(output: Path, group_size: int, beside_replicas: bool = False) -> torch.nn.Module:
    """A graft with biases in a base model, which FSDP2 splits unless it is in replicas."""
    arguments = {}
    if WORLD_SIZE > 1 and not beside_replicas:
        arguments["distributed_config"] = DistributedConfig(fsdp_size=WORLD_SIZE)
    base_model = LlamaForCausalLM.from_pretrained(base_folder(output), **arguments)
    model = grafted(base_model, seed=torch.initial_seed(), **GRAFT).train()
    return shard_experts(model, group_size) if WORLD_SIZE > 1 else model


def checkpoint_of(output: Path, resumes: str | None) -> str | None:
    """That of the step at which all are saved, of another training."""
    return str(output / resumes / f"checkpoint-{SAVED_AT}") if resumes else None


def train(
    output: Path,
    name: str,
    group_size: int = 1,
    beside_replicas: bool = False,
    resumes: str | None = None,
    continues: bool = False,
    killed: bool = False,
    is_graft: bool = False,
) -> None:
    """
    Trains eight steps and saves under `name`, from the checkpoint of the training that it `resumes`, or from its own
    last one if it `continues`. The second process may be `killed` before the second checkpoint.
    """
    checkpoint = last_complete_checkpoint(output / name) if continues else checkpoint_of(output, resumes)
    # What is resumed starts with other weights, and with another seed of the rounding.
    torch.manual_seed(4 if checkpoint is None else 5)
    model = (
        new_graft(output, group_size, beside_replicas) if is_graft else new_model(CONFIG, group_size, beside_replicas)
    )
    # With a small eps, Adam turns the rounding of a vanishing gradient into a step of full size.
    optimizer = RowAdamW(
        expert_parameter_groups(model, learning_rate=1e-2, weight_decay=0.1),
        eps=1e-2,
        second_moment="row" if "row" in name or is_graft else "full",
        rounding_seed=ROUNDING_SEED if checkpoint is None else 0,
    )
    trainer = trainer_of(
        model,
        "right",
        optimizer,
        [SplitCheckpointCallback(checkpoint_of(output, resumes)), Watch(output, name, killed)],
        output_dir=output / name,
        max_grad_norm=0.1 if is_graft else 0.5,
        save_steps=SAVED_AT,
        save_only_model=True,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    facts = log_of(trainer) | {"resumed_from": checkpoint}
    hand_over(output, f"{name}-{RANK}", whole_state(trainer.model), facts)


def measure(output: Path, name: str, group_size: int) -> None:
    """Hands over the memory that it takes to save, load and resume a model with large tables."""
    folder = output / name
    torch.manual_seed(4)
    model = new_model(LARGE, group_size, dtype=torch.bfloat16)
    peaks = {}
    # Chunks as small beside these tables as they are beside large ones.
    with mock.patch.object(split_checkpoints, "CHUNK_ELEMENTS", 2**16):
        with OwnMemory(0.0005) as peaks["save"]:
            model.save_pretrained(folder)
        with OwnMemory(0.0005) as peaks["resume"]:
            model.load_state_dict(load_file(folder / "model.safetensors"))
        table = "model.layers.0.mlp.expert_pool.up_proj.weight"
        expected = whole(model.state_dict()[table]).clone()
        del model
        with OwnMemory(0.0005) as peaks["load"]:
            config = DistributedConfig(fsdp_size=WORLD_SIZE, ep_size=group_size)
            model = PeerForCausalLM.from_pretrained(folder, distributed_config=config)
        is_same = torch.equal(whole(model.state_dict()[table]), expected)
        del model
        model = new_model(LARGE, group_size, beside_replicas=True, dtype=torch.bfloat16)
        with OwnMemory(0.0005) as peaks["save_beside_replicas"]:
            state_dict = whole_state_dict(model, output)
            if RANK == 0:
                model.save_pretrained(folder, True, state_dict)
        del model
        model = shard_experts(grafted(base_model_of("llama", hidden_size=64), num_experts=480**2), group_size)
        with OwnMemory(0.0005) as peaks["save_graft"]:
            state_dict = whole_state_dict(model, output)
            if RANK == 0:
                model.save_pretrained(folder, state_dict=state_dict)
    facts = {
        "table": expected.nbytes,
        "is_same": is_same,
        **{key: each.peak - each.start for key, each in peaks.items()},
    }
    hand_over(output, f"{name}-{RANK}", {}, facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("jobs", type=json.loads, nargs="+")
    arguments = parser.parse_args()
    if any(job.get("is_graft") for job in arguments.jobs):
        # Before there is a process group: afterward only the first process would write.
        base_model_of("llama", **BASE_MODEL).save_pretrained(base_folder(arguments.output))
    for job in arguments.jobs:
        (measure if job["name"] == "memory" else train)(arguments.output, **job)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
