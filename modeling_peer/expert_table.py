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
"""The two tables of a pool of one-neuron experts, each with its linear half of the work."""

import torch
from torch import nn
from transformers import initialization as init

from .configuration_peer import PeerConfig
from .expert_kernels import ALL_EXPERT_KERNELS, expert_down, expert_up, needs_operator, resolve_kernels
from .expert_kernels_torch import EagerKernels
from .memory_advice import advise_huge_pages, advise_whole_access


class ExpertTable(nn.Embedding):
    """
    One row of `hidden_size` numbers per expert.

    An `nn.Embedding` whose own forward does its half of the work, so that whatever works by module forwards (disk
    offload, tensor parallelism) works; nothing else reads its weight.

    Args:
        config (`PeerConfig`): Its `hidden_size`, and its `expert_kernels` and `sparse_expert_gradients`, which may be
            changed on a model's configuration at any time.
        num_experts (`int`): Number of rows.
        init_std (`float`): Standard deviation of the rows at initialization.
    """

    def __init__(self, config: PeerConfig, num_experts: int, init_std: float):
        super().__init__(num_experts, config.hidden_size)
        self.config = config
        self.init_std = init_std

    @property
    def sparse(self) -> bool:
        """Under the name by which DDP asks an embedding whether its gradients are sparse."""
        return self.config.sparse_expert_gradients

    @sparse.setter
    def sparse(self, value: bool) -> None:
        """Leaves it to the configuration: `nn.Embedding` sets what it is constructed with."""

    def reset_parameters(self) -> None:
        """Leaves the rows as allocated: the model's `_init_weights` fills them, once."""
        advise_huge_pages(self.weight.data)

    def _apply(self, fn, recurse=True):
        # What casts or moves the table reads all of it.
        advise_whole_access(self.weight)
        return super()._apply(fn, recurse)

    def init_own_weights(self) -> None:
        init.normal_(self.weight, std=self.init_std)

    @torch.no_grad()
    def append_rows(self, rows: torch.Tensor) -> None:
        """Makes the table longer by `rows`, of shape `(num_added, hidden_size)`. Its `weight` is another parameter then."""
        weight = self.weight.new_empty(self.num_embeddings + len(rows), self.embedding_dim)
        advise_huge_pages(weight)
        weight[: self.num_embeddings] = self.weight
        weight[self.num_embeddings :] = rows
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        self.num_embeddings = len(weight)

    def keep_rows(self, number: int) -> None:
        """Leaves the first rows, where they are. Its `weight` is another parameter then."""
        self.weight = nn.Parameter(self.weight.detach()[:number], requires_grad=self.weight.requires_grad)
        self.num_embeddings = number

    @property
    def kernels(self) -> str:
        """The implementation that runs on this table here and now. Raises `RuntimeError` if the configured one cannot."""
        return resolve_kernels(self.config.expert_kernels, self.weight)

    def _run(self, half, operator, tokens, indices):
        weight = self.weight  # once: an adapter may compute it
        kernels = resolve_kernels(self.config.expert_kernels, weight)
        if kernels == "eager":
            return getattr(EagerKernels, half)(tokens, indices, weight, self.sparse)
        if needs_operator(tokens, weight):
            return operator(tokens, indices, weight, kernels, self.sparse)
        return getattr(ALL_EXPERT_KERNELS[kernels], half)(tokens, indices, weight)


class ExpertUpProjection(ExpertTable):
    """The rows u_i that go into the experts' neurons: `(hidden [T, d], indices [T, A]) -> hidden · u [T, A]`."""

    def forward(self, hidden_states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`)
            indices (`torch.Tensor` of shape `(num_tokens, num_active)`): expert numbers, int64.

        Returns:
            `torch.Tensor` of shape `(num_tokens, num_active)`.
        """
        return self._run("up", expert_up, hidden_states, indices)


class ExpertDownProjection(ExpertTable):
    """The rows v_i that come out of the experts' neurons: `(weights [T, A], indices [T, A]) -> Σ weights · v [T, d]`."""

    def forward(self, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """
        Args:
            weights (`torch.Tensor` of shape `(num_tokens, num_active)`)
            indices (`torch.Tensor` of shape `(num_tokens, num_active)`): expert numbers, int64.

        Returns:
            `torch.Tensor` of shape `(num_tokens, hidden_size)`.
        """
        return self._run("down", expert_down, weights, indices)
