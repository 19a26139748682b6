# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Splits tiny models of every variant over two processes by tensor or pipeline parallelism of Transformers, and runs them
whole.

    torchrun --nproc_per_node 2 model_parallel.py OUTPUT tensor
    torchrun --nproc_per_node 2 model_parallel.py OUTPUT pipeline
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from cases import MODELS, hand_over, outputs, padded_batch, random_rows, tiny_config, tiny_model
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.distributed import DistributedConfig

from modeling_peer import PeerForCausalLM, RowAdamW, expert_parameter_groups
from modeling_peer.ops.factored_gradient import FactoredGradient


RANK = int(os.environ["RANK"])

# Every kind of table, of a width that does not divide by two processes.
TRAINED_BY_ROWS = tiny_config("peer", "pkm", gated_experts=True, hidden_size=49)


def run(model: PeerForCausalLM) -> dict[str, torch.Tensor]:
    """What the model computes in evaluation, then its loss, gradients and statistics after one step in training."""
    tensors = outputs(model)
    model.train()
    loss = model(**padded_batch(random_rows(9, 4, 12), "right")).loss
    loss.backward()
    tensors["loss"] = loss
    for name, parameter in model.named_parameters():
        tensors[f"gradient.{name}"] = held_gradient(parameter)
    for name, buffer in model.named_buffers():
        if "running" in name:
            tensors[f"statistic.{name}"] = buffer
    return tensors


def held_gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The gradient of what this process holds of a parameter, as an optimizer would take it."""
    if not isinstance(parameter, DTensor):
        return parameter.grad
    return parameter.grad.redistribute(placements=parameter.placements).to_local()


def placements(model: PeerForCausalLM) -> dict[str, dict]:
    """For each sharded parameter: along which dimension, of how many packed blocks, and the shape that is held here."""
    facts = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            (placement,) = parameter.placements
            facts[name] = {
                "dim": placement.dim % parameter.ndim,
                "blocks": getattr(placement, "split_factor", 1),
                "shape": list(parameter.to_local().shape),
            }
    return facts


def train_by_rows(model: PeerForCausalLM, second_moment: str) -> tuple[dict[str, torch.Tensor], dict]:
    """The weights after some clipped steps of [`RowAdamW`]; the norms, and how many gradients came in factors."""
    groups = expert_parameter_groups(model.train(), learning_rate=1e-2, weight_decay=0.1)
    # With a small eps, Adam turns the rounding of a vanishing gradient into a step of full size.
    optimizer = RowAdamW(groups, second_moment=second_moment, eps=1e-2)
    norms = []
    for lengths in ((9, 4, 12), (5, 8, 7), (3, 11, 6)):
        optimizer.zero_grad()
        model(**padded_batch(random_rows(*lengths), "right")).loss.backward()
        gradients = [held_gradient(parameter) for parameter in model.parameters()]
        in_factors = sum(isinstance(gradient, FactoredGradient) for gradient in gradients)
        # As `Trainer` clips where some parameters are split and others are not.
        norms.append(Trainer._mixed_mesh_grad_norm(None, model, 0.5).item())
        optimizer.step()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    whole = {name: weight.full_tensor() if isinstance(weight, DTensor) else weight for name, weight in weights.items()}
    return whole, {"norms": norms, "in_factors": in_factors}


def split_by_tensors(output: Path) -> None:
    # Whole models first: while there is no process group, nothing can lean on the other process.
    for name, config in MODELS.items():
        model = tiny_model(config)
        model.save_pretrained(output / f"start-{RANK}" / name)
        hand_over(output, f"{name}-whole-{RANK}", run(model))
    for second_moment in ("full", "row"):
        model = tiny_model(TRAINED_BY_ROWS)
        model.save_pretrained(output / f"start-{RANK}" / "rows")
        hand_over(output, f"rows-{second_moment}-whole-{RANK}", *train_by_rows(model, second_moment))
    for second_moment in ("full", "row"):
        distributed = DistributedConfig(tp_plan="auto")
        model = PeerForCausalLM.from_pretrained(output / f"start-{RANK}" / "rows", distributed_config=distributed)
        hand_over(output, f"rows-{second_moment}-{RANK}", *train_by_rows(model, second_moment))
    for name in MODELS:
        distributed = DistributedConfig(tp_plan="auto")
        model = PeerForCausalLM.from_pretrained(output / f"start-{RANK}" / name, distributed_config=distributed)
        hand_over(output, f"{name}-{RANK}", run(model), placements(model))
        model.save_pretrained(output / "saved" / name)


def split_by_layers(output: Path) -> None:
    # A stage without the first layer takes its cache for empty and forgets the padding: so does Llama in Transformers.
    for name, config in MODELS.items():
        model = tiny_model(config)
        model.save_pretrained(output / f"start-{RANK}" / name)
        hand_over(output, f"{name}-whole-{RANK}", outputs(model, padded_cache=False))
    for name in MODELS:
        model, loading = PeerForCausalLM.from_pretrained(
            output / f"start-{RANK}" / name, distributed_config=DistributedConfig(pp_size=2), output_loading_info=True
        )
        facts = {
            "parameters": [name for name, _ in model.named_parameters()],
            "unloaded": sorted(loading["missing_keys"] | loading["unexpected_keys"]),
        }
        hand_over(output, f"{name}-{RANK}", outputs(model, padded_cache=False), facts)


if __name__ == "__main__":
    (split_by_tensors if sys.argv[2] == "tensor" else split_by_layers)(Path(sys.argv[1]))
    dist.destroy_process_group()
