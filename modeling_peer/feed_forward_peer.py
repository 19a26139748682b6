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
The PEER layer (Xu Owen He, "Mixture of A Million Experts", arXiv 2407.04153, section 2 and Algorithm 1).

| paper | here |
|---|---|
| N experts | `config.num_experts` |
| u_i, v_i | row i of `ExpertPool.up_proj`, of `ExpertPool.down_proj` |
| σ | `config.expert_act` |
| h heads, k experts of each | `config.num_retrieval_heads`, `config.num_experts_per_head` |
| query q(x) of size d_k | `ProductKeyRouter.query_proj`, `config.query_size` |
| sub-keys C, C' | `ProductKeyRouter.sub_keys` |
| router scores g_i(x) | router weights |
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .expert_table import ExpertDownProjection, ExpertUpProjection
from .feed_forward_dense import DenseFeedForward
from .initial_scale import activation_power, matched_std, router_weight_power
from .product_key_router import ProductKeyRouter


class ExpertPool(nn.Module):
    """
    N experts of one neuron each, `e_i(x) = σ(u_i · x) v_i`, or `σ(g_i · x) (u_i · x) v_i` with `config.gated_experts`.

    A layer owns its pool, or the base model owns one for all its PEER layers (`config.share_experts_across_layers`).
    """

    def __init__(self, config):
        super().__init__()
        self.act_fn = nn.Identity() if config.expert_act is None else ACT2FN[config.expert_act]
        power = router_weight_power(config) * activation_power(self.act_fn, config, config.gated_experts)
        self.gate_proj = ExpertUpProjection(config, config.initializer_range) if config.gated_experts else None
        self.up_proj = ExpertUpProjection(config, config.initializer_range)
        self.down_proj = ExpertDownProjection(config, matched_std(config, power))

    @classmethod
    def tp_plan(cls, config) -> dict[str, str]:
        plan = {"up_proj": "expert_up_projection", "down_proj": "expert_down_projection"}
        return plan | {"gate_proj": "expert_up_projection"} if config.gated_experts else plan

    def forward(self, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`)
            indices (`torch.Tensor` of shape `(num_tokens, num_active)`): the experts each token runs.
            weights (`torch.Tensor` of shape `(num_tokens, num_active)`): their router weights.

        Returns:
            `torch.Tensor` of shape `(num_tokens, hidden_size)`: `Σ weights · e_i(x)`.
        """
        neurons = self.up_proj(hidden_states, indices)
        if self.gate_proj is None:
            neurons = self.act_fn(neurons)
        else:
            neurons = self.act_fn(self.gate_proj(hidden_states, indices)) * neurons
        return self.down_proj(weights * neurons, indices)


class PeerFeedForward(nn.Module):
    """
    Parameter Efficient Expert Retrieval: each head retrieves its k best of N one-neuron experts by product keys and
    weighs them after the activation; heads are summed. Cost follows h and k, capacity N.

    With k = 1 it is a feed-forward of h neurons picked for each token. With `config.shared_expert_intermediate_size`
    a dense branch stands beside the experts.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.router = ProductKeyRouter(config)
        self.expert_pool = None if config.share_experts_across_layers else ExpertPool(config)
        self.shared_expert = None
        if config.shared_expert_intermediate_size is not None:
            self.shared_expert = DenseFeedForward(config, layer_idx, config.shared_expert_intermediate_size)

    @classmethod
    def tp_plan(cls, config) -> dict[str, str]:
        parts = {"router": ProductKeyRouter.tp_plan(config)}
        if not config.share_experts_across_layers:
            parts["expert_pool"] = ExpertPool.tp_plan(config)
        if config.shared_expert_intermediate_size is not None:
            parts["shared_expert"] = DenseFeedForward.tp_plan(config)
        return {f"{part}.{name}": style for part, plan in parts.items() for name, style in plan.items()}

    def forward(
        self,
        hidden_states: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        expert_pool: ExpertPool | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`)
            padding_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                True where there is a token; see `QueryBatchNorm`.
            expert_pool (`ExpertPool`, *optional*):
                The base model's pool, where layers share one.

        Returns:
            `torch.Tensor` of the shape of `hidden_states`.
        """
        indices, weights = self.router(hidden_states, padding_mask)
        experts = self.expert_pool if self.expert_pool is not None else expert_pool
        output = experts(
            hidden_states.flatten(0, -2), indices.flatten(-2).flatten(0, -2), weights.flatten(-2).flatten(0, -2)
        )
        output = output.to(hidden_states.device).view_as(hidden_states)  # a shared pool may live elsewhere
        if self.shared_expert is not None:
            output = output + self.shared_expert(hidden_states)
        return output
