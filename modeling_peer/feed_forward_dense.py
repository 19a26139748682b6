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
"""The dense feed-forward: a gated MLP as in Llama, all of which every token uses."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_peer import PeerConfig


class DenseFeedForward(nn.Module):
    """
    Gated MLP: `down_proj(act(gate_proj(x)) * up_proj(x))`.

    Args:
        config (`PeerConfig`)
        layer_idx (`int`): Index of the layer.
        intermediate_size (`int`, *optional*): Width, `config.intermediate_size` if `None`.
    """

    def __init__(self, config: PeerConfig, layer_idx: int, intermediate_size: int | None = None):
        super().__init__()
        intermediate_size = intermediate_size or config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    @classmethod
    def tp_plan(cls, config: PeerConfig) -> dict[str, str]:
        return {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
