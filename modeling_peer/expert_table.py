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
"""The two tables of a pool of one-neuron experts: the up- and down-projection vectors, one row per expert."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import logging

from .configuration_peer import PeerConfig
from .expert_kernels import ALL_EXPERT_KERNELS, PLAIN_TENSORS, needs_operator, resolve_kernels
from .expert_operators import expert_down, expert_up, run_half
from .library_releases import is_traceable_wrapper_subclass
from .memory_advice import advise_huge_pages, advise_whole_access


if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor


logger = logging.get_logger(__name__)


class ExpertTable(nn.Embedding):
    """
    A table with a row of `hidden_size` elements per expert.

    It is an `nn.Embedding` whose own forward does its half of the work, and nothing else reads its weight: what relies
    on module forwards (disk offload, tensor parallelism) works.

    Args:
        config (`PeerConfig`): Its `hidden_size`, and its `expert_kernels`, which may be changed on a model's
            configuration at any time.
        num_experts (`int`): Number of rows.
        init_std (`float`): Standard deviation of the rows at initialization.
    """

    # Whether its rows are integers, see `quantized_table.py`.
    is_quantized = False

    def __init__(self, config: PeerConfig, num_experts: int, init_std: float):
        super().__init__(num_experts, config.hidden_size)
        self.config = config
        self.init_std = init_std
        # How many of the last columns are biases, as in a graft.
        self.num_biases = 0

    def reset_parameters(self) -> None:
        """Leave the rows as they were allocated: the model's `_init_weights` fills them, once."""
        advise_huge_pages(self.weight.data)

    def _apply(self, fn, recurse=True):
        # Casting or moving the table reads all of it.
        advise_whole_access(self.weight)
        return super()._apply(fn, recurse)

    def init_own_weights(self) -> None:
        init.normal_(self.weight, std=self.init_std)

    @torch.no_grad()
    def append_rows(self, rows: torch.Tensor) -> None:
        """Append `rows`, of shape `(num_added, hidden_size)`. `weight` becomes a new parameter."""
        weight = self.weight.new_empty(self.num_embeddings + len(rows), self.embedding_dim)
        advise_huge_pages(weight)
        weight[: self.num_embeddings] = self.weight
        weight[self.num_embeddings :] = rows
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        self.num_embeddings = len(weight)

    def keep_rows(self, num_rows: int) -> None:
        """Keep only the first rows, in the same memory. `weight` becomes a new parameter."""
        self.weight = nn.Parameter(self.weight.detach()[:num_rows], requires_grad=self.weight.requires_grad)
        self.num_embeddings = num_rows

    @property
    def kernels(self) -> str:
        """Name of the implementation that runs on this table. Raises `RuntimeError` if the configured one cannot."""
        return self.kernels_on(self.weight)

    def kernels_on(self, weight: torch.Tensor) -> str:
        """Name of the implementation that runs on `weight`, a part of the table. Raises as [`ExpertTable.kernels`]."""
        if self.config.expert_kernels == "auto" and is_of_another_library(weight):
            logger.warning_once(
                f"An expert table is a {type(weight).__name__}, which PyTorch operations alone can read: its experts "
                'run on the literal algorithm, `expert_kernels="eager"`, slower than on kernels that read tables. '
                "`quantize_experts` of modeling_peer makes tables of 8 or 4 bits that they read."
            )
            return "eager"
        return resolve_kernels(self.config.expert_kernels, weight)

    @property
    def has_hooks(self) -> bool:
        """Whether a call of the module has hooks."""
        hooks = self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks
        return any(hooks)

    @property
    def is_plain(self) -> bool:
        """Whether its forward is that of this class, with no adapter, hook or parallel style on the module."""
        has_own_forward = type(self) not in (ExpertUpProjection, ExpertDownProjection) or "forward" in self.__dict__
        return not (self.has_hooks or has_own_forward) and type(self._parameters.get("weight")) in PLAIN_TENSORS

    def _run(self, half, operator, tokens, indices):
        weight = self.weight  # once: an adapter may compute it
        if weight.is_cpu and tokens.device != weight.device:  # a table in host memory
            on_host = self._run(half, operator, tokens.to(weight.device), indices.to(weight.device))
            return on_host.to(tokens.device)
        kernels = self.kernels_on(weight)
        if kernels == "eager" or not needs_operator(tokens, weight):
            return getattr(ALL_EXPERT_KERNELS[kernels], half)(tokens, indices, weight)
        return run_half(operator, tokens, indices, weight, kernels)


class ExpertUpProjection(ExpertTable):
    """The up-projection vectors u_i of the experts: `(hidden [T, d], indices [T, A]) -> hidden · u [T, A]`."""

    def forward(self, hidden_states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`)
            indices (`torch.Tensor` of shape `(num_tokens, num_active)`): expert indices, int64.

        Returns:
            `torch.Tensor` of shape `(num_tokens, num_active)`.
        """
        return self._run("up", expert_up, hidden_states, indices)


class ExpertDownProjection(ExpertTable):
    """The down-projection vectors v_i of the experts: `(weights [T, A], indices [T, A]) -> Σ weights · v [T, d]`."""

    def forward(self, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """
        Args:
            weights (`torch.Tensor` of shape `(num_tokens, num_active)`)
            indices (`torch.Tensor` of shape `(num_tokens, num_active)`): expert indices, int64.

        Returns:
            `torch.Tensor` of shape `(num_tokens, hidden_size)`.
        """
        return self._run("down", expert_down, weights, indices)


def is_of_another_library(weight: torch.Tensor) -> bool:
    """
    Whether a table is a tensor subclass that has its elements in other tensors, as those have that quantize it. One
    that torch has split over processes is none.
    """
    if type(weight) in PLAIN_TENSORS or not is_traceable_wrapper_subclass(weight):
        return False
    return not (torch.distributed.is_available() and isinstance(weight, DTensor))


def refuse_quantized(model: nn.Module, purpose: str) -> None:
    """Raise `ValueError` if a model has expert tables that are quantized. `purpose` starts the message."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertTable) and module.is_quantized:
            raise ValueError(
                f"{purpose} needs expert tables in floating point, and {name or 'this one'} is quantized. "
                "`dequantize_experts` of modeling_peer undoes it."
            )
