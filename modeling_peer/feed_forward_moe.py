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
"""Mixture of large experts, a baseline of the paper: a router selects a few of many dense feed-forwards."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .configuration_peer import PeerConfig
from .forward_pass import ForwardPass
from .initial_scale import activation_power, matched_std


class MoeRouter(nn.Module):
    """Linear router over `config.moe_num_experts` experts. Its probabilities are a float32 softmax over all."""

    def __init__(self, config: PeerConfig):
        super().__init__()
        self.num_experts_per_tok = config.moe_num_experts_per_tok
        self.init_std = config.initializer_range
        self.weight = nn.Parameter(torch.empty(config.moe_num_experts, config.hidden_size))

    def init_own_weights(self) -> None:
        init.normal_(self.weight, std=self.init_std)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`)

        Returns:
            `tuple(torch.Tensor)`: expert indices and router weights, which sum to one for each token, both of shape
            `(num_tokens, moe_num_experts_per_tok)`, and router logits of shape `(num_tokens, moe_num_experts)`.
        """
        router_logits = F.linear(hidden_states, self.weight)
        probabilities = router_logits.softmax(dim=-1, dtype=torch.float32)
        weights, indices = probabilities.topk(self.num_experts_per_tok, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return indices, weights.to(hidden_states.dtype), router_logits


@use_experts_implementation
class MoeExperts(nn.Module):
    """All experts as 3D tensors, computed by the experts interface of Transformers (`experts_implementation`)."""

    def __init__(self, config: PeerConfig):
        super().__init__()
        self.num_experts = config.moe_num_experts
        self.act_fn = ACT2FN[config.hidden_act]
        width, hidden_size = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden_size, width))
        power = width * activation_power(self.act_fn, config, gated=True) / config.moe_num_experts_per_tok
        self.up_init_std, self.down_init_std = config.initializer_range, matched_std(config, power)

    def init_own_weights(self) -> None:
        init.normal_(self.gate_up_proj, std=self.up_init_std)
        init.normal_(self.down_proj, std=self.down_init_std)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`)
            top_k_index (`torch.Tensor` of shape `(num_tokens, k)`): Expert indices.
            top_k_weights (`torch.Tensor` of shape `(num_tokens, k)`): Their router weights.

        Returns:
            `torch.Tensor` of the shape of `hidden_states`.
        """
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique():
            token, position = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output.index_add_(0, token, (expert_output * top_k_weights[token, position, None]).to(output.dtype))
        return output


class MoeFeedForward(nn.Module):
    """
    Mixture of experts of width `config.moe_intermediate_size`.

    With `moe_routing="token_choice"` each token takes its best `moe_num_experts_per_tok` experts.

    With `"expert_choice"` (Zhou et al., arXiv 2202.09368, the baseline of the paper) each expert takes, in training,
    its best tokens of the micro-batch: as many as give every position `moe_num_experts_per_tok` experts on average.
    Padding counts as positions, so that shapes do not depend on a mask, and its output is zero. That choice depends on
    other tokens, later ones and other sequences included, so evaluation and generation route by token choice: training
    and evaluation losses are those of different functions.

    Args:
        config (`PeerConfig`)
        layer_idx (`int`): Index of the layer.
    """

    def __init__(self, config: PeerConfig, layer_idx: int):
        super().__init__()
        self.expert_choice = config.moe_routing == "expert_choice"
        self.gate = MoeRouter(config)
        self.experts = MoeExperts(config)

    @classmethod
    def tp_plan(cls, config: PeerConfig) -> dict[str, str]:
        return {
            "experts": "moe_tp_experts",
            "experts.gate_up_proj": "packed_colwise",
            "experts.down_proj": "rowwise",
        }

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
                True where there is a token. By expert choice the output of padding is zero.
            forward_pass (`ForwardPass`, *optional*):
                The forward pass of the model. If `None`, this call is one by itself, which learns if gradients are
                enabled.

        Returns:
            `torch.Tensor` of the shape of `hidden_states`.
        """
        learns = torch.is_grad_enabled() if forward_pass is None else forward_pass.learns
        tokens = hidden_states.flatten(0, -2)
        indices, weights, router_logits = self.gate(tokens)
        if self.expert_choice and self.training and learns:
            output = self._chosen_by_experts(tokens, router_logits, padding_mask)
        else:
            output = self.experts(tokens, indices, weights)
        return output.view_as(hidden_states)

    def _chosen_by_experts(self, tokens, router_logits, padding_mask):
        num_tokens, num_experts = router_logits.shape
        capacity = min(num_tokens, max(1, num_tokens * self.gate.num_experts_per_tok // num_experts))
        probabilities = router_logits.softmax(dim=-1, dtype=torch.float32)
        if padding_mask is not None:
            probabilities = probabilities * padding_mask.reshape(-1, 1)
        weights, chosen = probabilities.t().topk(capacity, dim=-1)  # [num_experts, capacity]
        # The weights of a token sum to one over the experts that chose it, in evaluation over those that it chooses.
        weights, chosen = weights.flatten(), chosen.flatten()
        total = weights.new_zeros(num_tokens).index_add(0, chosen, weights)
        weights = (weights / total[chosen].clamp(min=1e-9)).to(tokens.dtype)
        experts = torch.arange(num_experts, device=tokens.device).repeat_interleave(capacity)
        outputs = self.experts(tokens[chosen], experts[:, None], weights[:, None])
        return torch.zeros_like(tokens).index_add(0, chosen, outputs)
