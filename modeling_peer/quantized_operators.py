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
The operators of experts whose tables are quantized: what autograd, compilers and exporters see of one. Each is the
backward of the other; a table has no gradient.
"""

import torch

from .expert_kernels import ALL_EXPERT_KERNELS, NAMESPACE, refuse_double_backward
from .quantized_rows import QuantizedRows


@torch.library.custom_op(f"{NAMESPACE}::quantized_up", mutates_args=())
def quantized_up(
    hidden_states: torch.Tensor,
    indices: torch.Tensor,
    integers: torch.Tensor,
    scales: torch.Tensor,
    width: int,
    bytes_per_scale: int,
    kernels: str,
) -> torch.Tensor:
    """
    `hidden[t] · table[indices[t, a]]`.

    Args:
        hidden_states (`torch.Tensor` of shape `(num_tokens, width)`)
        indices (`torch.Tensor` of shape `(num_tokens, num_active)`): rows of the table, int64.
        integers, scales, width, bytes_per_scale: See [`QuantizedRows`].
        kernels (`str`): See [`resolve_kernels`].

    Returns:
        `torch.Tensor` of shape `(num_tokens, num_active)`, in the dtype of `hidden_states`.
    """
    table = QuantizedRows(integers, scales, width, bytes_per_scale)
    return ALL_EXPERT_KERNELS[kernels].quantized_up(hidden_states, indices, table)


@torch.library.custom_op(f"{NAMESPACE}::quantized_down", mutates_args=())
def quantized_down(
    weights: torch.Tensor,
    indices: torch.Tensor,
    integers: torch.Tensor,
    scales: torch.Tensor,
    width: int,
    bytes_per_scale: int,
    kernels: str,
) -> torch.Tensor:
    """
    `Σ_a weights[t, a] table[indices[t, a]]`.

    Args:
        weights (`torch.Tensor` of shape `(num_tokens, num_active)`)
        indices, integers, scales, width, bytes_per_scale, kernels: See [`quantized_up`].

    Returns:
        `torch.Tensor` of shape `(num_tokens, width)`, in the dtype of `weights`.
    """
    table = QuantizedRows(integers, scales, width, bytes_per_scale)
    return ALL_EXPERT_KERNELS[kernels].quantized_down(weights, indices, table)


@quantized_up.register_fake
def _(hidden_states, indices, integers, scales, width, bytes_per_scale, kernels):
    return hidden_states.new_empty(indices.shape)


@quantized_down.register_fake
def _(weights, indices, integers, scales, width, bytes_per_scale, kernels):
    return weights.new_empty(weights.shape[0], width)


def _save_for_backward(ctx, inputs, output):
    _, indices, integers, scales, *ctx.rest = inputs
    ctx.save_for_backward(indices, integers, scales)


def _backward_by(other_half):
    def backward(ctx, gradient):
        refuse_double_backward()
        of_tokens = None
        if ctx.needs_input_grad[0]:
            of_tokens = other_half(gradient.contiguous(), *ctx.saved_tensors, *ctx.rest)
        return of_tokens, None, None, None, None, None, None

    return backward


quantized_up.register_autograd(_backward_by(quantized_down), setup_context=_save_for_backward)
quantized_down.register_autograd(_backward_by(quantized_up), setup_context=_save_for_backward)
