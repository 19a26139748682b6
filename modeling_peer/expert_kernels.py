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
What runs the two linear halves of a pool of experts: a registry of implementations, and the operators in front of them.

    up:   (hidden [T, d],  indices [T, A], table [N, d]) -> [T, A],   hidden[t] · table[indices[t, a]]
    down: (weights [T, A], indices [T, A], table [N, d]) -> [T, d],   Σ_a weights[t, a] table[indices[t, a]]

They are each other's backward, next to one gradient of rows: with `coefficients [T, A]` and `tokens [T, d]`, row n of
a table gets `Σ coefficients[t, a] tokens[t]` over all `indices[t, a] = n`. Activation, gating and router weights act on
`[T, A]` in between, in plain torch.

| `config.expert_kernels` | | where |
|---|---|---|
| `"eager"` | Algorithm 1 as printed, the reference | `expert_kernels_torch.py` |
| `"torch"` | torch operations on any device, `[T, A, d]` only piece by piece | `expert_kernels_torch.py` |
| `"cpu"` | C, compiled for this processor on first use | `expert_kernels_cpu.py` |
| `"triton"` | for a GPU | `expert_kernels_triton.py` |
| `"auto"` | the fastest of them that can run where the table is | |

One's own is a class with the static methods of [`TorchKernels`], and if it knows a faster way to retrieve experts than a
product and top-k, `retrieve` and `retrieval_gradients` of [`CpuKernels`], registered before the model is built:

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


class ExpertKernelsInterface(GeneralInterface):
    """Mapping from the names in `PeerConfig.expert_kernels` to implementations. See the module's docstring."""

    _global_mapping = {
        "eager": EagerKernels,
        "torch": TorchKernels,
        "cpu": CpuKernels,
        "triton": TritonKernels,
    }


ALL_EXPERT_KERNELS = ExpertKernelsInterface()


def check_expert_kernels(name: str) -> None:
    """Raise `ValueError` if `PeerConfig.expert_kernels` is neither `"auto"` nor a registered name."""
    if name != "auto" and name not in ALL_EXPERT_KERNELS:
        raise ValueError(
            f"`expert_kernels` is {name!r}, neither 'auto' nor one of {sorted(ALL_EXPERT_KERNELS)}. "
            "Register others with `ExpertKernelsInterface.register(name, class)` before the model is built."
        )


# Decided once where a model is compiled: what it looks at are compilers and devices.
@torch.compiler.assume_constant_result
def resolve_kernels(name: str, table: torch.Tensor) -> str:
    """
    The implementation that runs on a table where `config.expert_kernels` says `name`.

    Args:
        name (`str`): A name in the registry, or `"auto"`.
        table (`torch.Tensor`): Whose device and dtype decide.

    Raises:
        `RuntimeError`: if the named implementation cannot run here.
    """
    if name == "auto":
        fastest = {"cpu": "cpu", "cuda": "triton"}.get(table.device.type, "torch")
        return fastest if ALL_EXPERT_KERNELS[fastest].unavailable_reason(table) is None else "torch"
    reason = ALL_EXPERT_KERNELS[name].unavailable_reason(table)
    if reason is not None:
        raise RuntimeError(f'`expert_kernels="{name}"` cannot run here: {reason} `"auto"` takes what can.')
    return name


def needs_operator(tokens: torch.Tensor, table: torch.Tensor) -> bool:
    """
    Whether something has to see an operator: autograd, a compiler, tensors of another kind. If not, what it runs may be
    called itself; for a single token that is half of the time.
    """
    observed = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    return observed or type(tokens) is not torch.Tensor or type(table) not in (torch.Tensor, torch.nn.Parameter)


# The package and the code that a checkpoint brought along may live in one process: to each its own operators.
NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".")[0] or __name__)


@torch.library.custom_op(f"{NAMESPACE}::expert_up", mutates_args=())
def expert_up(
    hidden_states: torch.Tensor, indices: torch.Tensor, table: torch.Tensor, kernels: str, sparse_gradient: bool
) -> torch.Tensor:
    """
    `hidden[t] · table[indices[t, a]]`, accumulated in float32.

    Args:
        hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`)
        indices (`torch.Tensor` of shape `(num_tokens, num_active)`): rows of the table, int64.
        table (`torch.Tensor` of shape `(num_experts, hidden_size)`)
        kernels (`str`): See [`resolve_kernels`].
        sparse_gradient (`bool`): Whether the table's gradient is a coalesced sparse tensor of the rows in `indices`.

    Returns:
        `torch.Tensor` of shape `(num_tokens, num_active)`, in the dtype of `hidden_states`.
    """
    return ALL_EXPERT_KERNELS[kernels].up(hidden_states, indices, table)


@torch.library.custom_op(f"{NAMESPACE}::expert_down", mutates_args=())
def expert_down(
    weights: torch.Tensor, indices: torch.Tensor, table: torch.Tensor, kernels: str, sparse_gradient: bool
) -> torch.Tensor:
    """
    `Σ_a weights[t, a] table[indices[t, a]]`, accumulated in float32.

    Args:
        weights (`torch.Tensor` of shape `(num_tokens, num_active)`)
        indices, table, kernels, sparse_gradient: See [`expert_up`].

    Returns:
        `torch.Tensor` of shape `(num_tokens, hidden_size)`, in the dtype of `weights`.
    """
    return ALL_EXPERT_KERNELS[kernels].down(weights, indices, table)


@torch.library.custom_op(f"{NAMESPACE}::expert_row_gradient", mutates_args=())
def expert_row_gradient(
    coefficients: torch.Tensor,
    tokens: torch.Tensor,
    indices: torch.Tensor,
    num_rows: int,
    dtype: torch.dtype,
    kernels: str,
) -> torch.Tensor:
    """
    The gradient of a table, with its untouched rows: `Σ coefficients[t, a] tokens[t]` over `indices[t, a] = n` in row n.

    Args:
        coefficients (`torch.Tensor` of shape `(num_tokens, num_active)`)
        tokens (`torch.Tensor` of shape `(num_tokens, hidden_size)`)
        indices (`torch.Tensor` of shape `(num_tokens, num_active)`): rows of the table, int64.
        num_rows (`int`): Rows of the table.
        dtype (`torch.dtype`): Of the table.
        kernels (`str`): See [`resolve_kernels`].

    Returns:
        `torch.Tensor` of shape `(num_rows, hidden_size)`.
    """
    gradient = tokens.new_zeros(num_rows, tokens.shape[1], dtype=dtype)
    ALL_EXPERT_KERNELS[kernels].row_gradient(coefficients, tokens, indices, dtype, out=gradient)
    return gradient


@expert_up.register_fake
def _(hidden_states, indices, table, kernels, sparse_gradient):
    return hidden_states.new_empty(indices.shape)


@expert_down.register_fake
def _(weights, indices, table, kernels, sparse_gradient):
    return weights.new_empty(weights.shape[0], table.shape[1])


@expert_row_gradient.register_fake
def _(coefficients, tokens, indices, num_rows, dtype, kernels):
    return tokens.new_empty(num_rows, tokens.shape[1], dtype=dtype)


def _save_for_backward(ctx, inputs, output):
    first, indices, table, ctx.kernels, ctx.sparse_gradient = inputs
    ctx.save_for_backward(first, indices, table)


def _table_gradient(ctx, coefficients, tokens, indices, table):
    if not ctx.sparse_gradient:
        return expert_row_gradient(coefficients, tokens, indices, table.shape[0], table.dtype, ctx.kernels)
    rows, values = ALL_EXPERT_KERNELS[ctx.kernels].row_gradient(coefficients, tokens, indices, table.dtype)
    return torch.sparse_coo_tensor(rows[None], values, table.shape, is_coalesced=True, check_invariants=False)


def refuse_double_backward() -> None:
    """Raises `RuntimeError` in a backward whose gradients are recorded, which they are where a second one is to come."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            'Experts have no second derivative (`create_graph=True`) but with `expert_kernels="eager"` in the '
            "configuration."
        )


def _up_backward(ctx, gradient):
    refuse_double_backward()
    hidden_states, indices, table = ctx.saved_tensors
    of_hidden_states = of_table = None
    if ctx.needs_input_grad[0]:
        of_hidden_states = expert_down(gradient.contiguous(), indices, table, ctx.kernels, False)
        of_hidden_states = of_hidden_states.to(hidden_states.dtype)
    if ctx.needs_input_grad[2]:
        of_table = _table_gradient(ctx, gradient.contiguous(), hidden_states, indices, table)
    return of_hidden_states, None, of_table, None, None


def _down_backward(ctx, gradient):
    refuse_double_backward()
    weights, indices, table = ctx.saved_tensors
    of_weights = of_table = None
    if ctx.needs_input_grad[0]:
        of_weights = expert_up(gradient.contiguous(), indices, table, ctx.kernels, False).to(weights.dtype)
    if ctx.needs_input_grad[2]:
        of_table = _table_gradient(ctx, weights, gradient.contiguous(), indices, table)
    return of_weights, None, of_table, None, None


expert_up.register_autograd(_up_backward, setup_context=_save_for_backward)
expert_down.register_autograd(_down_backward, setup_context=_save_for_backward)
