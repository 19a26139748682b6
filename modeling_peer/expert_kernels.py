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
The two linear halves of a pool of experts, and a registry of their implementations.

    up:   (hidden [T, d],  indices [T, A], table [N, d]) -> [T, A],   hidden[t] · table[indices[t, a]]
    down: (weights [T, A], indices [T, A], table [N, d]) -> [T, d],   Σ_a weights[t, a] table[indices[t, a]]

Each is the backward of the other, together with one gradient of rows: with `coefficients [T, A]` and `tokens [T, d]`,
row n of a table gets `Σ coefficients[t, a] tokens[t]` over all `indices[t, a] = n` (see `gradient_factors.py`).
Activation, gating and router weights act on `[T, A]` in between, in plain PyTorch (see `expert_operators.py`).

| `config.expert_kernels` | | where |
|---|---|---|
| `"eager"` | Algorithm 1 as printed, the reference | `expert_kernels_torch.py` |
| `"torch"` | PyTorch operations on any device, `[T, A, d]` in pieces | `expert_kernels_torch.py` |
| `"cpu"` | C, compiled for this processor on first use, or taken from a package | `expert_kernels_cpu.py` |
| `"triton"` | Triton, on a GPU | `expert_kernels_triton.py` |
| `"auto"` | the fastest of them that can run where the table is; `"eager"` while `torch.export` traces a model | |

A custom implementation is a subclass of [`TorchKernels`] with static methods of its own and, if it retrieves experts
faster than a matrix product and top-k, `retrieve` and `retrieval_gradients` of [`CpuKernels`]. Register it before the
model is built:

```python
>>> from modeling_peer import ExpertKernelsInterface

>>> ExpertKernelsInterface.register("my_kernels", MyKernels)
>>> config = PeerConfig(expert_kernels="my_kernels")
```
"""

import re

import torch
from transformers.utils.generic import GeneralInterface

from .expert_kernels_cpu import CpuKernels
from .expert_kernels_torch import EagerKernels, TorchKernels
from .expert_kernels_triton import TritonKernels
from .library_releases import active_transforms, in_forward_mode, is_exporting, num_dispatch_modes


class ExpertKernelsInterface(GeneralInterface):
    """Mapping from the names in `PeerConfig.expert_kernels` to implementations. See the module's docstring."""

    _global_mapping = {
        "eager": EagerKernels,
        "torch": TorchKernels,
        "cpu": CpuKernels,
        "triton": TritonKernels,
    }


ALL_EXPERT_KERNELS = ExpertKernelsInterface()

FASTEST_KERNELS = {"cpu": "cpu", "cuda": "triton"}  # by type of device

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)

DIFFERENTIATING = {"Grad", "Jvp"}  # transforms of `torch.func`


def check_expert_kernels(name: str) -> None:
    """Raise `ValueError` if `PeerConfig.expert_kernels` is neither `"auto"` nor a registered name."""
    if name != "auto" and name not in ALL_EXPERT_KERNELS:
        raise ValueError(
            f"`expert_kernels` is {name!r}, neither 'auto' nor one of {sorted(ALL_EXPERT_KERNELS)}. "
            "Register others with `ExpertKernelsInterface.register(name, class)` before the model is built."
        )


# Decided once where a model is compiled: it depends on compilers and devices only.
@torch.compiler.assume_constant_result
def resolve_kernels(name: str, table: torch.Tensor) -> str:
    """
    Return the name of the implementation that runs on a table with `config.expert_kernels` = `name`.

    Where `torch.export` traces a model, `"auto"` is the literal algorithm: its operations are torch's own, which ONNX,
    ExecuTorch and any machine without this package know. A name keeps that implementation, behind an operator.

    Args:
        name (`str`): A name in the registry, or `"auto"`.
        table (`torch.Tensor`): Its device and dtype decide.

    Raises:
        `ValueError`: see [`check_expert_kernels`].
        `RuntimeError`: if the named implementation cannot run here.
    """
    check_expert_kernels(name)
    if name == "auto":
        if is_exporting():
            return "eager"
        fastest = FASTEST_KERNELS.get(table.device.type, "torch")
        return fastest if ALL_EXPERT_KERNELS[fastest].unavailable_reason(table) is None else "torch"
    reason = ALL_EXPERT_KERNELS[name].unavailable_reason(table)
    if reason is not None:
        raise RuntimeError(f'`expert_kernels="{name}"` cannot run here: {reason} `"auto"` selects what can.')
    return name


def needs_operator(tokens: torch.Tensor, table: torch.Tensor) -> bool:
    """
    Whether an operator must be called: for autograd, or where operators are observed. Otherwise its implementation may
    be called directly; for a single token that halves the time.

    Raises:
        `RuntimeError`: see [`are_operators_observed`].
    """
    return are_operators_observed(tokens, table) or torch.is_grad_enabled()


def are_operators_observed(tokens: torch.Tensor, table: torch.Tensor) -> bool:
    """
    Whether something other than autograd must see operators: a compiler, `torch.vmap`, a mode that dispatches them, or
    tensors of another kind.

    Raises:
        `RuntimeError`: in forward-mode differentiation and in transforms of `torch.func` that differentiate.
    """
    if torch.compiler.is_compiling():
        return True
    # Tensors under a transform look like plain ones.
    transforms, forward_mode = active_transforms(), in_forward_mode()
    if forward_mode or not DIFFERENTIATING.isdisjoint(transforms):
        # The gradient of the operators is for reverse mode: `torch.func` cannot use it, and forward mode would take it
        # for zero.
        raise RuntimeError(
            "Forward-mode differentiation (`torch.func.jvp`, `torch.autograd.forward_ad`) and the transforms of "
            '`torch.func` that differentiate need `expert_kernels="eager"` in the configuration.'
        )
    if transforms or torch.jit.is_tracing() or num_dispatch_modes():
        return True
    return type(tokens) is not torch.Tensor or type(table) not in PLAIN_TENSORS


# The package, and the code that a checkpoint brought along, may be loaded in one process; each has its own operators.
NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".")[0] or __name__)


def refuse_double_backward() -> None:
    """Raise `RuntimeError` in a backward that autograd records for a second one (`create_graph=True`)."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            'Experts have a second derivative (`create_graph=True`) only with `expert_kernels="eager"` in the '
            "configuration."
        )
