# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Registry of implementations of the linear maps of a pool of experts, and of product-key retrieval.

    up:   (hidden [T, d],  rows [T, A], table [N, d]) -> [T, A],   hidden[t] · table[rows[t, a]]
    down: (weights [T, A], rows [T, A], table [N, d]) -> [T, d],   Σ_a weights[t, a] table[rows[t, a]]

Each is the backward of the other, together with the gradient of a table: with `coefficients [T, A]` and
`tokens [T, d]`, its row n is `Σ coefficients[t, a] tokens[t]` over all `rows[t, a] = n` (see `gradient_factors.py`).
A table is a tensor, or [`QuantizedRows`].

| name | implementation | file |
|---|---|---|
| `"torch"` | PyTorch operations on any device, `[T, A, d]` in pieces | `kernels_torch.py` |
| `"cpu"` | C, compiled for this processor on first use | `kernels_cpu.py` |
| `"triton"` | Triton, on a GPU | `kernels_triton.py` |
"""

from typing import Any

import torch

from .kernels_cpu import CpuKernels
from .kernels_torch import TorchKernels
from .kernels_triton import TritonKernels
from .triton_check import is_triton_right


KERNELS: dict[str, Any] = {"torch": TorchKernels, "cpu": CpuKernels, "triton": TritonKernels}

FASTEST_KERNELS = {"cpu": "cpu", "cuda": "triton"}  # by type of device


# Decided once when a model is compiled, as it depends only on compilers and devices.
@torch.compiler.assume_constant_result
def resolve_kernels(name: str | None, tensor: torch.Tensor) -> str:
    """
    Return the name of the kernels for tables with the dtype and device of `tensor`: `name`, or the fastest ones that
    are right here if `None`. Raises `RuntimeError` if the kernels `name` cannot run here.
    """
    if name is None:
        fastest = FASTEST_KERNELS.get(tensor.device.type, "torch")
        can_run = KERNELS[fastest].unavailable_reason(tensor) is None
        return fastest if can_run and (fastest != "triton" or is_triton_right(tensor)) else "torch"
    reason = KERNELS[name].unavailable_reason(tensor)
    if reason is not None:
        raise RuntimeError(f'`expert_kernels="{name}"` cannot run here: {reason} `"auto"` selects what can.')
    return name


def is_traced() -> bool:
    """Whether the caller is traced, so that it must run operators."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def needs_autograd() -> bool:
    """
    Whether autograd must see what runs. For a single token, autograd takes as long as the experts, so that it is
    avoided. Forward-mode differentiation ignores grad mode, and autograd must see it to raise an error.
    """
    return torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0
