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
"""Experts as the paper prints them (Algorithm 1, lines 9 to 11): the reference of every other implementation."""

import torch
from torch.nn import functional as F


class EagerKernels:
    """
    Gathers the rows of all active experts, `[T, A, d]`, and multiplies. Differentiable any number of times.

    Signatures as in [`TorchKernels`], and whether the table's gradient is sparse.
    """

    @staticmethod
    def why_not(table: torch.Tensor) -> str | None:
        return None

    @staticmethod
    def up(
        hidden_states: torch.Tensor, indices: torch.Tensor, table: torch.Tensor, sparse_gradient: bool = False
    ) -> torch.Tensor:
        rows = F.embedding(indices, table, sparse=sparse_gradient).to(hidden_states.dtype)
        return torch.einsum("td,tad->ta", hidden_states, rows)

    @staticmethod
    def down(
        weights: torch.Tensor, indices: torch.Tensor, table: torch.Tensor, sparse_gradient: bool = False
    ) -> torch.Tensor:
        rows = F.embedding(indices, table, sparse=sparse_gradient).to(weights.dtype)
        return torch.einsum("ta,tad->td", weights, rows)
