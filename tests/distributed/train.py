# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Trains tiny models with the stock `Trainer` on however many processes it is launched in.

    python train.py OUTPUT                                     one process, the joint batch
    accelerate launch --num_processes 2 train.py OUTPUT        DDP, half of the batch in each process
    torchrun --nproc_per_node 2 train.py OUTPUT --fsdp         FSDP2, likewise
    torchrun --nproc_per_node 2 train.py OUTPUT --fsdp --group-size 2
                                                               … with expert tables split over memory groups
"""

import argparse
import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from cases import hand_over, padded_batch, random_rows, tiny_config, tiny_model
from release_names import CHECKPOINTING
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

from modeling_peer import PeerForCausalLM, RowAdamW, expert_parameter_groups, shard_experts
from modeling_peer.ops.factored_gradient import FactoredGradient


WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))
ROWS_PER_STEP = 4
# In every step of four rows the first process gets the short ones, so that unpadded counts differ between processes.
ROWS = random_rows(3, 5, 11, 8, 2, 4, 7, 13, 6, 3, 9, 12, 5, 2, 10, 14)

LAYERS = tiny_config("peer", "pkm")
SHARED_POOL = tiny_config("peer", "dense", "peer", share_experts_across_layers=True)
# What is trained, how rows are padded, and arguments of the Trainer.
CASES = {
    "right": (LAYERS, "right", {}),
    "left": (LAYERS, "left", {}),
    "accumulated": (LAYERS, "right", {"gradient_accumulation_steps": 2}),
    "shared_pool": (SHARED_POOL, "right", {}),
    "checkpointed": (SHARED_POOL, "left", {CHECKPOINTING: True}),
    "moe": (tiny_config("moe", "dense"), "right", {}),
    "rows": (SHARED_POOL, "right", {"gradient_accumulation_steps": 2}),
}


def train(name: str, output: Path, fsdp: bool, group_size: int = 1) -> None:
    """Trains a case for two epochs and hands over its log, how it was distributed, and what came of it."""
    trainer = trainer_of_case(name, output, fsdp, group_size)
    in_factors = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            gradients = [local(parameter.grad) for parameter in trainer.model.parameters()]
            in_factors.append(sum(isinstance(gradient, FactoredGradient) for gradient in gradients))

    trainer.add_callback(Watch())
    trainer.train()
    facts = log_of(trainer)
    facts |= {"in_factors": in_factors}
    if fsdp or group_size == 1:
        # Every process takes part in gathering what is sharded, the first writes.
        trainer.save_model()
    tensors = {} if fsdp else whole_state(trainer.model)
    hand_over(output, f"{name}-{RANK}", tensors, facts)


def trainer_of_case(name: str, output: Path, fsdp: bool, group_size: int) -> Trainer:
    config, side, changes = CASES[name]
    if fsdp:
        groups = {} if group_size == 1 else {"ep_size": group_size}
        distributed = DistributedConfig(fsdp_size=WORLD_SIZE, **groups)
        model = PeerForCausalLM.from_pretrained(start_folder(output, name), distributed_config=distributed)
    else:
        model = tiny_model(config)
        if group_size > 1:
            shard_experts(model, group_size)
    optimizer = None
    if name == "rows" and (not fsdp or group_size > 1):
        # Under FSDP alone, `Trainer` makes its own optimizer.
        groups = expert_parameter_groups(model, learning_rate=1e-2)
        optimizer = RowAdamW(groups, eps=1e-2)  # large, or the rounding of a vanishing gradient would be a full step
    # Adam would turn the rounding of a vanishing gradient into a step of full size.
    sgd = {"optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant"}
    return trainer_of(model, side, optimizer, output_dir=output / name, save_strategy="no", **sgd, **changes)


def trainer_of(
    model: torch.nn.Module,
    side: str,
    optimizer: torch.optim.Optimizer | None,
    callbacks: list[TrainerCallback] | None = None,
    **arguments,
) -> Trainer:
    """The stock trainer of two epochs, which logs every step; `arguments` are its own beside these."""
    arguments = TrainingArguments(
        use_cpu=True,
        per_device_train_batch_size=ROWS_PER_STEP // WORLD_SIZE,
        num_train_epochs=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **arguments,
    )
    rows, collator = [{"input_ids": row} for row in ROWS], partial(collate, side=side)
    return Trainer(
        model,
        arguments,
        data_collator=collator,
        train_dataset=rows,
        optimizers=(optimizer, None),
        callbacks=callbacks,
    )


def log_of(trainer: Trainer) -> dict:
    """Of each step the loss and the norm, and how the model is distributed."""
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {
        "losses": [entry["loss"] for entry in steps],
        "gradient_norms": [entry["grad_norm"] for entry in steps],
        "wrapper": type(trainer.model_wrapped).__name__,
        "processes": trainer.accelerator.num_processes,
        "layout": layout(trainer.model),
    }


def start_folder(output: Path, name: str) -> Path:
    """Where this process keeps the checkpoint that it loads sharded."""
    return output / f"{name}-start-{RANK}"


def collate(examples: list[dict], side: str) -> dict[str, torch.Tensor]:
    return padded_batch([example["input_ids"] for example in examples], side)


def local(gradient: torch.Tensor) -> torch.Tensor:
    """What this process holds of a gradient."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, of which each process may hold a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def layout(model: torch.nn.Module) -> dict[str, list]:
    """Of each split parameter, the names of the mesh that it is split over and the shape that is held here."""
    return {
        name: [list(parameter.device_mesh.mesh_dim_names or ()), list(parameter.to_local().shape)]
        for name, parameter in model.named_parameters()
        if isinstance(parameter, DTensor)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--group-size", type=int, default=1)
    arguments = parser.parse_args()
    # A model without expert tables has no memory group.
    names = [name for name in CASES if name != "moe" or arguments.group_size == 1]
    if arguments.fsdp:
        # Before there is a process group: afterward only the first process would write.
        for name in names:
            tiny_model(CASES[name][0]).save_pretrained(start_folder(arguments.output, name))
    for name in names:
        train(name, arguments.output, arguments.fsdp, arguments.group_size)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
