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

An input x, the hidden state of a token, is turned into a query, the query retrieves experts, and the layer returns
their weighted sum:

    f(x) = Σ over h heads, Σ over the k experts i that the head retrieves:  g_i(x) · σ(u_i · x) · v_i

| symbol | meaning | in the code |
|---|---|---|
| N | number of experts | `config.num_experts` |
| u_i, v_i | up- and down-projection vectors of expert i | row i of `ExpertPool.up_proj` and `ExpertPool.down_proj` |
| σ | activation of the experts | `config.expert_act` |
| h | number of heads, each with its own queries | `config.num_retrieval_heads` |
| k | number of experts that each head retrieves | `config.num_experts_per_head` |
| q(x), d_k | query of a head, and its size | `ProductKeyRouter.query_proj`, `config.query_size` |
| C, C' | two sets of √N sub-keys of size d_k / 2; their pairs are the N keys | `ProductKeyRouter.sub_keys` |
| g_i(x) | router weight: softmax over the k retrieved scores of a head | second output of `ProductKeyRouter` |
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_peer import PeerConfig
from .expert_generations import Generation, generations_of, has_protected_additions
from .expert_kernels import needs_operator, resolve_kernels
from .expert_operators import run_expert_pool
from .expert_table import ExpertDownProjection, ExpertTable, ExpertUpProjection
from .feed_forward_dense import DenseFeedForward
from .forward_pass import ForwardPass
from .initial_scale import activation_power, expert_std, router_weight_power
from .library_releases import active_transforms
from .product_key_router import AddedRouter, ProductKeyRouter
from .token_exchange import TokenExchange


class ExpertPool(nn.Module):
    """
    N experts of one neuron each: `e_i(x) = σ(u_i · x) v_i`. With `config.gated_experts` there is a gate vector w_i, a
    row of `gate_proj`, and `e_i(x) = σ(w_i · x) (u_i · x) v_i`.

    Each layer has its own pool, or the base model has one for all PEER layers (`config.share_experts_across_layers`).
    Every generation that was added in protected mode is a pool of its own in `added`. Its v_i are zero at first, so
    that adding experts does not change the output.

    Args:
        config (`PeerConfig`)
        generations (`list[Generation]`): The generation of this pool, followed by those of `added`.
    """

    def __init__(self, config: PeerConfig, generations: list[Generation]):
        super().__init__()
        generation, *added = generations
        self.first_expert = generation.first_expert
        self.act_fn = nn.Identity() if config.expert_act is None else ACT2FN[config.expert_act]
        self.act_has_parameters = isinstance(self.act_fn, nn.Module) and any(True for _ in self.act_fn.parameters())
        self.gate_proj = None
        if config.gated_experts:
            self.gate_proj = ExpertUpProjection(config, generation.num_experts, config.initializer_range)
        self.up_proj = ExpertUpProjection(config, generation.num_experts, config.initializer_range)
        std = 0.0
        if self.first_expert == 0:
            power = router_weight_power(config) * activation_power(self.act_fn, config, config.gated_experts)
            std = expert_std(config, power)
        self.down_proj = ExpertDownProjection(config, generation.num_experts, std)
        self.added = nn.ModuleList([ExpertPool(config, [each]) for each in added])

    @classmethod
    def tp_plan(cls, config: PeerConfig) -> dict[str, str]:
        plan = {"up_proj": "expert_up_projection", "down_proj": "expert_down_projection"}
        if config.gated_experts:
            plan["gate_proj"] = "expert_up_projection"
        if has_protected_additions(config):
            plan |= {f"added.*.{name}": style for name, style in plan.items()}
        return plan

    @classmethod
    def ep_plan(cls, config: PeerConfig) -> dict[str, str]:
        """The plan of a pool and its tables, by names in the module that has it as `expert_pool`."""
        plan = {"expert_pool": "expert_pool_exchange"}
        if has_protected_additions(config):
            plan["expert_pool.added.*"] = "expert_pool_exchange"
        return plan | {f"expert_pool.{table}": "expert_columns" for table in cls.tp_plan(config)}

    def start_exchange(
        self, hidden_states: torch.Tensor, forward_pass: ForwardPass | None = None
    ) -> TokenExchange | None:
        """
        Start, before retrieval, what a pool that is split over processes does with its input: see `memory_group.py`. A
        pool that is whole does nothing.

        Args:
            hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`): The input of the next forward.
            forward_pass (`ForwardPass`, *optional*): The forward pass of the model.

        Returns:
            [`TokenExchange`], *optional*: what `forward` takes as `exchange`.
        """
        return None

    def forward(
        self,
        hidden_states: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        exchange: TokenExchange | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(num_tokens, hidden_size)`)
            indices (`torch.Tensor` of shape `(num_tokens, num_active)`):
                Indices of the experts of each token, all of them in this pool and not in `added`.
            weights (`torch.Tensor` of shape `(num_tokens, num_active)`): Their router weights g_i(x).
            exchange ([`TokenExchange`], *optional*): What `start_exchange` gave for these hidden states.

        Returns:
            `torch.Tensor` of shape `(num_tokens, hidden_size)`: `Σ g_i(x) e_i(x)`.
        """
        rows = indices - self.first_expert if self.first_expert else indices
        if self._runs_as_one(hidden_states):
            up, gate, down = (None if table is None else table.weight for table in self._tables)
            kernels = resolve_kernels(self.up_proj.config.expert_kernels, up)
            return run_expert_pool(hidden_states, rows, weights, up, gate, down, self.act_fn, kernels)
        neurons = self.up_proj(hidden_states, rows)
        if self.gate_proj is None:
            neurons = self.act_fn(neurons)
        else:
            neurons = self.act_fn(self.gate_proj(hidden_states, rows)) * neurons
        return self.down_proj(weights * neurons, rows)

    @property
    def _tables(self):
        return self.up_proj, self.gate_proj, self.down_proj

    def _runs_as_one(self, hidden_states):
        """Whether the tables run together. Otherwise each runs on its own, for an adapter or a hook."""
        tables = [table for table in self._tables if table is not None]
        if not torch.is_grad_enabled() or not all(isinstance(table, ExpertTable) for table in tables):
            return False
        if type(hidden_states) is not torch.Tensor or self.act_has_parameters:
            return False
        # Before kernels are asked for: a table that a hook loads from disk is nowhere before its forward.
        if not all(table.is_plain for table in tables) or hidden_states.device != self.up_proj.weight.device:
            return False
        if self.up_proj.kernels == "eager":
            return False
        return torch.compiler.is_compiling() or (
            needs_operator(hidden_states, self.up_proj.weight)
            and not active_transforms()
            and not torch.jit.is_tracing()
        )


class PeerFeedForward(nn.Module):
    """
    Parameter Efficient Expert Retrieval: each head retrieves the best k of N experts of one neuron by product keys,
    and multiplies their activations by the router weights; the outputs of the heads are summed. The compute grows with
    h · k, the number of parameters with N.

    With k = 1 it is a feed-forward of h neurons that are chosen for each token. With
    `config.shared_expert_intermediate_size` the output of a dense branch is added. Each generation of experts that was
    added in protected mode has its own router, and its output is added as well.

    Args:
        config (`PeerConfig`)
        layer_idx (`int`): Index of the layer.
    """

    def __init__(self, config: PeerConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        generations = generations_of(config, layer_idx)
        self.router = ProductKeyRouter(config, generations[0])
        self.added_routers = nn.ModuleList([AddedRouter(config, generation) for generation in generations[1:]])
        self.expert_pool = None if config.share_experts_across_layers else ExpertPool(config, generations)
        self.shared_expert = None
        if config.shared_expert_intermediate_size is not None:
            self.shared_expert = DenseFeedForward(config, layer_idx, config.shared_expert_intermediate_size)

    @classmethod
    def tp_plan(cls, config: PeerConfig) -> dict[str, str]:
        parts = {"router": ProductKeyRouter.tp_plan(config)}
        if has_protected_additions(config):
            parts["added_routers.*"] = parts["router"]
        if not config.share_experts_across_layers:
            parts["expert_pool"] = ExpertPool.tp_plan(config)
        if config.shared_expert_intermediate_size is not None:
            parts["shared_expert"] = DenseFeedForward.tp_plan(config)
        return {f"{part}.{name}": style for part, plan in parts.items() for name, style in plan.items()}

    @classmethod
    def ep_plan(cls, config: PeerConfig) -> dict[str, str]:
        return {} if config.share_experts_across_layers else ExpertPool.ep_plan(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        expert_pool: ExpertPool | None = None,
        forward_pass: ForwardPass | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`)
            padding_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                True where there is a token, see [`QueryBatchNorm`].
            expert_pool (`ExpertPool`, *optional*):
                The pool of the base model, if layers share one.
            forward_pass (`ForwardPass`, *optional*):
                The forward pass of the model, see [`QueryBatchNorm`].

        Returns:
            `torch.Tensor` of the shape of `hidden_states`.

        Raises:
            `ValueError`: without `expert_pool` where layers share one.
        """
        pool = self.expert_pool if self.expert_pool is not None else expert_pool
        if pool is None:
            raise ValueError(
                "`expert_pool` must be the pool of the base model where layers share one "
                "(`share_experts_across_layers`), got None."
            )
        output = self._retrieve_and_run(self.router, pool, hidden_states, padding_mask, forward_pass)
        for router, added_pool in zip(self.added_routers, pool.added, strict=True):
            output = output + self._retrieve_and_run(router, added_pool, hidden_states, padding_mask, forward_pass)
        if self.shared_expert is not None:
            output = output + self.shared_expert(hidden_states)
        return output

    def _retrieve_and_run(self, router, pool, hidden_states, padding_mask, forward_pass):
        if router.is_off:
            return torch.zeros_like(hidden_states)
        tokens = hidden_states.flatten(0, -2)
        exchange = pool.start_exchange(tokens, forward_pass)
        indices, weights = router(hidden_states, padding_mask, forward_pass)
        output = pool(tokens, indices.flatten(-2).flatten(0, -2), weights.flatten(-2).flatten(0, -2), exchange)
        return output.to(hidden_states.device).view_as(hidden_states)  # a shared pool may be on another device
