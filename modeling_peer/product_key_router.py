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
"""The router of PEER and PKM: query network, query norm, product keys, and scores turned into router weights."""

from functools import partial

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from .expert_kernels import resolve_kernels
from .product_keys import grid_size, retrieve
from .query_norm import QueryBatchNorm, QueryRMSNorm


SCORING_FUNCTIONS = {
    "softmax": partial(torch.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
}


class ProductKeyRouter(nn.Module):
    """
    Retrieves, for every token and head, the k experts whose keys score best and weighs them (paper, Algorithm 1,
    lines 2 to 8). The key of expert (i, j) is the pair of sub-keys [c_i ; c'_j].

    All heads share the sub-keys unless `config.sub_keys_per_head`. Scores are computed in float32: in bfloat16 the
    retrieved set would flip between padded and packed batches.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_heads = config.num_retrieval_heads
        self.num_experts_per_head = config.num_experts_per_head
        self.query_size = config.query_size
        self.scoring_function = SCORING_FUNCTIONS[config.scoring_func]
        self.query_proj = nn.Linear(config.hidden_size, self.num_heads * self.query_size, bias=False)
        self.norm_type = config.query_norm  # a norm may be wrapped, by PEFT's `modules_to_save` for one
        self.query_norm = self.key_norm = None
        if config.query_norm == "batch":
            self.query_norm = QueryBatchNorm(self.num_heads * self.query_size, eps=config.rms_norm_eps)
        elif config.query_norm == "rms":
            self.query_norm = QueryRMSNorm(self.query_size // 2, eps=config.rms_norm_eps)
            self.key_norm = QueryRMSNorm(self.query_size // 2, eps=config.rms_norm_eps)
        # [heads or 1, rows C and columns C', √N, d_k / 2]
        self.sub_keys = nn.Parameter(
            torch.empty(
                self.num_heads if config.sub_keys_per_head else 1,
                2,
                grid_size(config.num_experts),
                self.query_size // 2,
            )
        )

    @classmethod
    def tp_plan(cls, config) -> dict[str, str]:
        return {"query_norm": "query_norm"} if config.query_norm == "batch" else {}

    def init_own_weights(self) -> None:
        # Scores of normalised queries start with unit variance.
        init.normal_(self.sub_keys, std=self.query_size**-0.5)

    def forward(
        self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`)
            padding_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                True where there is a token; the query BatchNorm leaves the rest out of its statistics.

        Returns:
            `tuple(torch.Tensor)`: expert numbers (int64) and router weights, each of shape
            `(batch_size, sequence_length, num_retrieval_heads, num_experts_per_head)`, best first.
        """
        queries = self.query_proj(hidden_states)
        # Autocast would take the products back to bfloat16.
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            queries, sub_keys = self._normalised(queries, padding_mask)
            kernels = resolve_kernels(self.config.expert_kernels, sub_keys)
            indices, scores = retrieve(queries.flatten(0, -4), sub_keys, self.num_experts_per_head, kernels)
            weights = self.scoring_function(scores)
        shape = (*hidden_states.shape[:-1], self.num_heads, self.num_experts_per_head)
        return indices.view(shape), weights.view(shape).to(hidden_states.dtype)

    def _normalised(self, queries, padding_mask):
        """Queries `(..., heads, 2, d_k / 2)` and sub-keys, normalised as configured, at least in float32."""
        dtype = torch.promote_types(queries.dtype, torch.float32)
        sub_keys = self.sub_keys.to(dtype)
        halves = (*queries.shape[:-1], self.num_heads, 2, self.query_size // 2)
        if self.norm_type == "batch":
            return self.query_norm(queries, padding_mask).view(halves), sub_keys
        queries = queries.to(dtype).view(halves)
        if self.query_norm is not None:
            # As in attention, a product of two unit-size vectors is scaled to unit variance.
            queries = self.query_norm(queries) * self.query_size**-0.5
            sub_keys = self.key_norm(sub_keys)
        return queries, sub_keys
