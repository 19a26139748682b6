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

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from .configuration_peer import PeerConfig
from .expert_generations import Generation
from .expert_kernels import resolve_kernels
from .forward_pass import ForwardPass
from .key_grid import grid_size
from .product_key_retrieval import ExpertMask, retrieve, retrieve_unmasked
from .query_norm import QueryBatchNorm, QueryRMSNorm


GATE_WIDTH = 64

SHUT = 0.01  # a gate that is less open counts as shut

OPEN = 32.0  # a logit whose sigmoid is 1 in float32

SCORING_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": partial(torch.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
}


class ProductKeyRouter(nn.Module):
    """
    Retrieves, for every token and head, the k experts whose keys score best, and computes their router weights (paper,
    Algorithm 1, lines 2 to 8). The key of expert (i, j) is the pair of sub-keys [c_i ; c'_j].

    All heads share the sub-keys unless `config.sub_keys_per_head`. Scores are computed in float32: in bfloat16 the
    retrieved set would differ between padded and packed batches.

    Args:
        config (`PeerConfig`): Its `expert_kernels` and, for the first generation, its `num_experts_per_head` may be
            changed on a model's configuration at any time.
        generation (`Generation`): The experts to retrieve.

    Attributes:
        expert_mask (`ExpertMask`, *optional*): Which experts take part; `None` if all do. See [`masked_experts`].
    """

    def __init__(self, config: PeerConfig, generation: Generation):
        super().__init__()
        self.config = config
        self.generation = generation
        self.num_heads = generation.num_heads
        self.expert_mask: ExpertMask | None = None
        self.query_size = config.query_size
        self.scoring_function = SCORING_FUNCTIONS[config.scoring_func]
        self.query_proj = nn.Linear(config.hidden_size, self.num_heads * self.query_size, bias=False)
        self.norm_type = config.query_norm  # a norm may be wrapped, for instance by PEFT's `modules_to_save`
        self.query_norm: QueryBatchNorm | QueryRMSNorm | None = None
        self.key_norm: QueryRMSNorm | None = None
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
                grid_size(generation.num_experts),
                self.query_size // 2,
            )
        )

    @property
    def num_experts_per_head(self) -> int:
        """Number k of experts that each head retrieves, as the configuration says now."""
        return self.config.num_experts_per_head

    @num_experts_per_head.setter
    def num_experts_per_head(self, value: int) -> None:
        """Refuse: the configuration decides, for all layers."""
        raise ValueError(
            f"`num_experts_per_head` of a router cannot be set, got {value}: set that of the model's configuration, "
            "which applies to all layers."
        )

    @property
    def is_off(self) -> bool:
        """Whether no expert takes part; the layer then skips this router."""
        return self.expert_mask is not None and not self.expert_mask.num_experts

    @classmethod
    def tp_plan(cls, config: PeerConfig) -> dict[str, str]:
        return {"query_norm": "query_norm"} if config.query_norm == "batch" else {}

    def init_own_weights(self) -> None:
        # Scores of normalized queries start with unit variance.
        init.normal_(self.sub_keys, std=self.query_size**-0.5)

    @torch.no_grad()
    def enlarge(self, generation: Generation) -> None:
        """Append sub-keys for the experts of a larger `generation`, with the root mean square of the present ones."""
        old = self.sub_keys
        size = grid_size(generation.num_experts)
        sub_keys = torch.empty(old.shape[0], 2, size, old.shape[-1], dtype=old.dtype, device=old.device)
        init.normal_(sub_keys, std=old.square().mean().sqrt().item())
        sub_keys[:, :, : old.shape[2]] = old
        self.sub_keys = nn.Parameter(sub_keys, requires_grad=old.requires_grad)
        self.generation = generation

    def restore_keys(self, sub_keys: nn.Parameter, generation: Generation) -> None:
        """Undo [`enlarge`]."""
        self.sub_keys, self.generation = sub_keys, generation

    def forward(
        self,
        hidden_states: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        forward_pass: ForwardPass | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`)
            padding_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                True where there is a token; the query BatchNorm excludes the rest from its statistics.
            forward_pass (`ForwardPass`, *optional*):
                The forward pass of the model, see [`QueryBatchNorm`].

        Returns:
            `tuple(torch.Tensor)`: expert indices (int64) and router weights, each of shape
            `(batch_size, sequence_length, num_retrieval_heads, num_experts_per_head)`, best first.

        Raises:
            `ValueError`: if `num_experts_per_head` is not between 1 and √N, or is more than the experts that take
            part.
        """
        k = self.num_experts_per_head
        queries = self.query_proj(hidden_states)
        # Autocast would cast the products back to bfloat16.
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            queries, sub_keys = self._normalized(queries, padding_mask, forward_pass)
            kernels = resolve_kernels(self.config.expert_kernels, sub_keys)
            arguments = (queries.flatten(0, -4), sub_keys, k, kernels)
            if self.expert_mask is None:
                indices, scores = retrieve(*arguments)
            else:
                indices, scores = retrieve_unmasked(*arguments, self.expert_mask)
            weights = self.scoring_function(scores)
        shape = (*hidden_states.shape[:-1], self.num_heads, k)
        return indices.view(shape), weights.view(shape).to(hidden_states.dtype)

    def _normalized(self, queries, padding_mask, forward_pass):
        """Queries `(..., heads, 2, d_k / 2)` and sub-keys, normalized as configured, at least in float32."""
        dtype = torch.promote_types(queries.dtype, torch.float32)
        sub_keys = self.sub_keys.to(dtype)
        halves = (*queries.shape[:-1], self.num_heads, 2, self.query_size // 2)
        if self.norm_type == "batch":
            return self.query_norm(queries, padding_mask, forward_pass).view(halves), sub_keys
        queries = queries.to(dtype).view(halves)
        if self.query_norm is not None:
            # As in attention, a product of two unit-size vectors is scaled to unit variance.
            queries = self.query_norm(queries) * self.query_size**-0.5
            sub_keys = self.key_norm(sub_keys)
        return queries, sub_keys


class DotProduct(nn.Linear):
    """
    A linear layer with one output. The rounding of a matrix-vector product may depend on how the vector is aligned in
    memory, so the weight is copied to a new tensor: a loaded model computes bit for bit what the saved one did.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states, self.weight.clone(), self.bias)


class ExpertGate(nn.Module):
    """
    A gate that decides which inputs use the added experts: a small classifier of hidden states,
    `sigmoid(w · gelu(W x + b) + c)`, that multiplies their output. It starts open for every input, and is exactly zero
    where it would be less than one percent open.
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
        """Compute the logits, `(..., 1)`, whose sigmoid is the gate."""
        return self.down_proj(F.gelu(self.up_proj(hidden_states)))


class AddedRouter(ProductKeyRouter):
    """
    The router of a protected generation. Its expert indices start at `generation.first_expert`, and its weights are
    multiplied with a gate between 0 and 1, which is open until [`fit_gates`] trains it.
    """

    def __init__(self, config: PeerConfig, generation: Generation):
        super().__init__(config, generation)
        self.gate = ExpertGate(config.hidden_size)

    @property
    def num_experts_per_head(self) -> int:
        """Number k of experts that each head retrieves, which is fixed when they are added."""
        return self.generation.num_experts_per_head

    @num_experts_per_head.setter
    def num_experts_per_head(self, value: int) -> None:
        """Refuse: the addition decides."""
        raise ValueError(
            f"`num_experts_per_head` of added experts cannot be set, got {value}: it is fixed when `add_experts` adds "
            f"them, here to {self.num_experts_per_head}."
        )

    @torch.no_grad()
    def copy_query_network(self, router: ProductKeyRouter) -> None:
        """Initialize the queries with the first heads of another router, which were trained to distinguish tokens."""
        size = self.num_heads * self.query_size
        self.query_proj.weight.copy_(router.query_proj.weight[:size])
        for norm, trained in ((self.query_norm, router.query_norm), (self.key_norm, router.key_norm)):
            if norm is not None:
                for name, tensor in norm.state_dict(keep_vars=True).items():
                    source = trained.state_dict()[name]
                    tensor.copy_(source[:size] if tensor.ndim else source)

    def forward(
        self,
        hidden_states: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        forward_pass: ForwardPass | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`ProductKeyRouter.forward`]."""
        indices, weights = super().forward(hidden_states, padding_mask, forward_pass)
        return indices + self.generation.first_expert, weights * self.gate(hidden_states)[..., None]
