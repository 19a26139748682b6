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
"""The gate of experts that were added: for which text they speak."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init


GATE_WIDTH = 64

SHUT = 0.01  # what opens less is shut

OPEN = 32.0  # a logit whose sigmoid is 1 in float32


class DotProduct(nn.Linear):
    """
    A linear layer of one output. A matrix library's product with a vector may round by where the vector lies in memory, so
    the weight is copied to where torch puts new tensors: a loaded model computes to the bit what the saved one did.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states, self.weight.clone(), self.bias)


class ExpertGate(nn.Module):
    """
    A small classifier of hidden states, `sigmoid(w · gelu(W x + b) + c)`, which multiplies what added experts put out. It
    starts open for everything, and is shut, exactly zero, where it would be less than one percent open.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, GATE_WIDTH)
        self.down_proj = DotProduct(GATE_WIDTH, 1)

    def init_own_weights(self) -> None:
        init.zeros_(self.down_proj.weight)
        init.constant_(self.down_proj.bias, OPEN)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(..., hidden_size)`)

        Returns:
            `torch.Tensor` of shape `(..., 1)`: between 0 and 1.
        """
        openness = torch.sigmoid(self.logits(hidden_states))
        return torch.where(openness < SHUT, 0.0, openness)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the sigmoid is of, to be fitted."""
        return self.down_proj(F.gelu(self.up_proj(hidden_states)))
