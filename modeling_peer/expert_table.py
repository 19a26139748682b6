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
from torch.nn import functional as F
from transformers import initialization as init


class ExpertTable(nn.Embedding):
    """
    One row of `hidden_size` numbers per expert.

    An `nn.Embedding` whose own forward does its half of the work, so that whatever works by module forwards (disk
    offload, tensor parallelism) works; nothing else reads its weight.

    Args:
        num_experts (`int`): Number of rows N.
        hidden_size (`int`): Width d of a row.
        init_std (`float`): Standard deviation of the rows at initialisation.
    """

    def __init__(self, num_experts: int, hidden_size: int, init_std: float):
        super().__init__(num_experts, hidden_size)
        self.init_std = init_std

    def reset_parameters(self) -> None:
        """Leaves the rows as allocated: the model's `_init_weights` fills them, once."""

    def init_own_weights(self) -> None:
        init.normal_(self.weight, std=self.init_std)


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
        return torch.einsum("td,tad->ta", hidden_states, F.embedding(indices, self.weight))


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
        return torch.einsum("ta,tad->td", weights, F.embedding(indices, self.weight))
