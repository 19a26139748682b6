# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Random inputs, which are never zeros: a memory that compresses zeros would look faster than it is."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from benchmark.contenders import OURS, Task, build
from gpu.device import Device
from gpu.settings import Settings
from modeling_peer import PeerConfig, RowAdamW, expert_parameter_groups
from modeling_peer.router import ProductKeyRouter, QueryBatchNorm


# Values that are drawn; larger tensors repeat them, because drawing gigabytes takes long.
DRAWN = 2**24

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def repeated_randn(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A tensor of random values, of which large ones repeat."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    values = torch.randn(min(tensor.numel(), DRAWN), device=device).to(dtype)
    for piece in tensor.view(-1).split(len(values)):
        piece.copy_(values[: len(piece)])
    return tensor


def draw_rows(kind: str, num_tokens: int, num_active: int, num_rows: int, device: str) -> torch.Tensor:
    """
    Rows of a table for each token, `(num_tokens, num_active)`: `"unique"`, each at most once, or `"zipf"`, by Zipf's
    law.
    """
    order = torch.randperm(num_rows, device=device)
    if kind == "unique":
        return order[: num_tokens * num_active].view(num_tokens, num_active)
    share = torch.arange(1, num_rows + 1, dtype=torch.float64, device=device).reciprocal().cumsum(0)
    drawn = torch.rand(num_tokens, num_active, dtype=torch.float64, device=device) * share[-1]
    return order[torch.searchsorted(share, drawn).clamp_(max=num_rows - 1)]


class Latest:
    """
    Makes something for some arguments and keeps it until other arguments come: it is released before the next is made,
    because two of them would not fit into memory.
    """

    def __init__(self, make: Callable[..., Any], device: Device):
        self.make, self.device = make, device
        self.arguments: tuple | None = None
        self.made: Any = None

    def __call__(self, *arguments: Any) -> Any:
        if self.arguments != arguments:
            self.release()
            self.made, self.arguments = self.make(*arguments), arguments
        return self.made

    def release(self) -> None:
        """Forget what was made."""
        self.made = self.arguments = None
        gc.collect()
        self.device.free()


@dataclass
class Experts:
    """Tokens, the rows that they name, router weights and a table."""

    hidden: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor
    table: torch.Tensor


def draw_experts(sizes: list[int], width: int, dtype: torch.dtype, device: str) -> Experts:
    """
    Random experts for a check, of which a row is named by half of all assignments, and some by none.

    Args:
        sizes (`list[int]`): Numbers of tokens, of active experts and of experts.
    """
    num_tokens, num_active, num_rows = sizes
    indices = torch.randint(max(num_rows - 2, 1), (num_tokens, num_active), device=device)
    indices.masked_fill_(torch.rand(indices.shape, device=device) < 0.5, num_rows // 2)
    return Experts(
        torch.randn(num_tokens, width, device=device).to(dtype),
        indices,
        torch.randn(num_tokens, num_active, device=device).to(dtype),
        torch.randn(num_rows, width, device=device).to(dtype),
    )


def layer_task(settings: Settings, contender: str, operation: str, width: int, num_tokens: int) -> Task:
    """A task of the benchmark, whose contenders are measured here too."""
    return Task(
        contender,
        operation,
        hidden_size=width,
        num_experts=settings.num_experts,
        num_tokens=num_tokens,
        num_retrieval_heads=settings.num_heads,
        num_experts_per_head=settings.num_experts_per_head,
        query_size=settings.query_size,
        dtype=settings.dtype,
    )


def build_layer(settings: Settings, task: Task) -> nn.Module:
    """
    The contender of a task with random weights, on the kernels of the settings and no others. Layers of this package
    have a BatchNorm of queries, as models have by default.
    """
    module = build(task, settings.device)
    for part in list(module.modules()):
        if isinstance(part, ProductKeyRouter):
            part.norm_type = "batch"
            part.query_norm = QueryBatchNorm(part.num_heads * part.query_size).to(settings.device)
        if isinstance(getattr(part, "config", None), PeerConfig):
            part.config.expert_kernels = settings.kernels
    return module


def make_optimizer(module: nn.Module, task: Task) -> torch.optim.Optimizer:
    """[`RowAdamW`] for layers of this package, torch's fused AdamW for others."""
    if task.contender in OURS:
        return RowAdamW(expert_parameter_groups(module, 1e-4, weight_decay=0.01))
    return torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)


def layer_inputs(task: Task, device: Device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that need a gradient, as in every layer but the first, and the gradient of the output."""
    shape = (1, task.num_tokens, task.hidden_size)
    tokens = torch.randn(shape, device=device.name).to(task.torch_dtype).requires_grad_()
    return tokens, torch.randn(shape, device=device.name).to(task.torch_dtype)


def in_pieces(task: Task, pieces: int) -> Task:
    """The task of one of some equal parts of the tokens."""
    return replace(task, num_tokens=task.num_tokens // pieces)
