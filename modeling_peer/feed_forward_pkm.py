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
"""Product-key memory (Lample et al., arXiv 1907.05242), a baseline of the paper: values without neurons."""

import torch
from torch import nn

from .configuration_peer import PeerConfig
from .expert_generations import first_generation
from .expert_table import ExpertDownProjection
from .forward_pass import ForwardPass
from .initial_scale import expert_std, router_weight_power
from .product_key_router import ProductKeyRouter


class PkmFeedForward(nn.Module):
    """
    Memory of `config.num_experts` values: `Σ g_i(x) v_i` over the best k keys of each head. Retrieval is that of
    [`PeerFeedForward`], but what a value contributes depends on the token through its router weight alone.

    Args:
        config (`PeerConfig`)
        layer_idx (`int`): Index of the layer.
    """

    def __init__(self, config: PeerConfig, layer_idx: int):
        super().__init__()
        self.router = ProductKeyRouter(config, first_generation(config))
        std = expert_std(config, router_weight_power(config))
        self.values = ExpertDownProjection(config, config.num_experts, std)

    @classmethod
    def tp_plan(cls, config: PeerConfig) -> dict[str, str]:
        router = {f"router.{name}": style for name, style in ProductKeyRouter.tp_plan(config).items()}
        return router | {"values": "expert_down_projection"}

    @classmethod
    def ep_plan(cls, config: PeerConfig) -> dict[str, str]:
        return {"values": "expert_values_exchange"}

    def forward(
        self,
        hidden_states: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        forward_pass: ForwardPass | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`)
            padding_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                True where there is a token, see [`QueryBatchNorm`].
            forward_pass (`ForwardPass`, *optional*):
                The forward pass of the model, see [`QueryBatchNorm`].

        Returns:
            `torch.Tensor` of the shape of `hidden_states`.
        """
        if self.router.is_off:
            return torch.zeros_like(hidden_states)
        indices, weights = self.router(hidden_states, padding_mask, forward_pass)
        output = self.values(weights.flatten(-2).flatten(0, -2), indices.flatten(-2).flatten(0, -2))
        return output.view_as(hidden_states)
