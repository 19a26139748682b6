# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
The feed-forward variants of a decoder layer, and their registry: dense, mixture of large experts (MoE), product-key
memory (PKM), and PEER (Xu Owen He, "Mixture of A Million Experts", arXiv 2407.04153, section 2 and Algorithm 1).

A PEER layer turns an input x, the hidden state of a token, into a query, retrieves experts by it, and returns their
weighted sum:

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

A variant is a module class. It is constructed as `variant(config, layer_idx)`, called as [`PeerFeedForward.forward`]
is, and returns a tensor of the shape of `hidden_states`. It must accept `**kwargs`, as more arguments may come. After
`FeedForwardInterface.register("mine", MyFeedForward)`, `PeerConfig.feed_forward_types` may name it.

Transformers initializes `nn.Linear`, `nn.Embedding` and norm modules. For other parameters give the module a method
`init_own_weights()` that uses the functions of `transformers.initialization`, which do not change loaded weights. A
checkpoint does not carry the code of a custom variant: it must be registered wherever the checkpoint is loaded.
"""

import inspect

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.utils.generic import GeneralInterface, maybe_autocast

from .configuration_peer import PeerConfig, generations_of
from .experts import (
    ALL_EXPERTS_FUNCTIONS,
    ExpertPool,
    activation_power,
    find_function,
    make_table,
    matched_std,
    router_weight_power,
)
from .router import AddedRouter, ForwardPass, ProductKeyRouter


class DenseFeedForward(nn.Module):
    """
    Gated MLP as in Llama: `down_proj(act(gate_proj(x)) * up_proj(x))`.

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

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class PeerFeedForward(nn.Module):
    """
    Parameter Efficient Expert Retrieval: each head retrieves the best k of N experts of one neuron by product keys,
    and multiplies their activations by the router weights. The outputs of the heads are summed. The compute grows with
    h (k d + √N d_k), the number of parameters with N d.

    With k = 1 it is a feed-forward of h neurons chosen for each token. A softmax over one score is always 1, so the
    router then learns only with `scoring_func="sigmoid"` or `"relu"`. The outputs of a dense branch
    (`config.shared_expert_intermediate_size`) and of protected generations, each with its own router, are added.

    Args:
        config (`PeerConfig`)
        layer_idx (`int`): Index of the layer.
    """

    def __init__(self, config: PeerConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        first, *added = generations = generations_of(config, layer_idx)
        self.router = ProductKeyRouter(config, first)
        self.added_routers = nn.ModuleList([AddedRouter(config, generation) for generation in added])
        self.expert_pool = None if config.share_experts_across_layers else ExpertPool(config, generations)
        self.shared_expert = None
        if config.shared_expert_intermediate_size is not None:
            self.shared_expert = DenseFeedForward(config, layer_idx, config.shared_expert_intermediate_size)

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
            expert_pool (`ExpertPool`, *optional*): The pool of the base model, if layers share one.
            forward_pass (`ForwardPass`, *optional*): The forward pass of the model, see [`QueryBatchNorm`].

        Returns:
            `torch.Tensor` of the shape of `hidden_states`.
        """
        pool = expert_pool if self.expert_pool is None else self.expert_pool
        tokens, outputs = hidden_states.flatten(0, -2), []
        for router, experts in zip([self.router, *self.added_routers], [pool, *pool.added], strict=True):
            indices, weights = router(hidden_states, padding_mask, forward_pass)
            output = experts(tokens, indices.flatten(-2).flatten(0, -2), weights.flatten(-2).flatten(0, -2))
            outputs.append(output.to(hidden_states.device).view_as(hidden_states))  # a shared pool may be elsewhere
        if self.shared_expert is not None:
            outputs.append(self.shared_expert(hidden_states))
        return sum(outputs[1:], outputs[0])


class PkmFeedForward(nn.Module):
    """
    Product-key memory, a baseline of the paper: `Σ g_i(x) v_i` over the best k of `config.num_experts` keys of each
    head. A token influences the contribution of a value only through the router weight.

    Args:
        config (`PeerConfig`)
        layer_idx (`int`): Index of the layer.
    """

    expert_table_names = ("values",)

    def __init__(self, config: PeerConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.router = ProductKeyRouter(config, generations_of(config, layer_idx)[0])
        std = config.expert_initializer_range or matched_std(config, router_weight_power(config))
        self.values = make_table(config.num_experts, config.hidden_size, std)

    def forward(
        self,
        hidden_states: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        forward_pass: ForwardPass | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """See [`PeerFeedForward.forward`]."""
        indices, weights = self.router(hidden_states, padding_mask, forward_pass)
        rows, weights = indices.flatten(-2).flatten(0, -2), weights.flatten(-2).flatten(0, -2)
        return self.sum_values(hidden_states.flatten(0, -2), rows, weights).view_as(hidden_states)

    def sum_values(self, hidden_states: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`(hidden [T, d], rows [T, A], weights [T, A]) -> [T, d]`, the weighted sum of the values."""
        run = find_function(ALL_EXPERTS_FUNCTIONS, self.config.expert_kernels, hidden_states.device.type)
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            return run(hidden_states, rows, weights, None, None, self.values, nn.Identity())


class MoeRouter(nn.Module):
    """Linear router over `config.moe_num_experts` experts. Its probabilities are a float32 softmax over all."""

    def __init__(self, config: PeerConfig):
        super().__init__()
        self.num_experts_per_tok = config.moe_num_experts_per_tok
        self.init_std = config.initializer_range
        self.weight = nn.Parameter(torch.empty(config.moe_num_experts, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`hidden [T, d] -> indices [T, k], router weights [T, k] that sum to one, router logits [T, experts]`"""
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
        """`(hidden [T, d], indices [T, k], router weights [T, k]) -> [T, d]`"""
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique():
            token, position = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output.index_add_(0, token, (expert_output * top_k_weights[token, position, None]).to(output.dtype))
        return output


class MoeFeedForward(nn.Module):
    """
    Mixture of experts of width `config.moe_intermediate_size`, a baseline of the paper.

    With `moe_routing="token_choice"` each token takes its best `moe_num_experts_per_tok` experts.

    With `"expert_choice"` (Zhou et al., arXiv 2202.09368, the baseline of the paper) each expert takes its best tokens
    of the micro-batch in training. It takes so many that positions, padding included, get `moe_num_experts_per_tok`
    experts on average. The output of padding is zero. As this choice depends on later tokens, evaluation and
    generation use token choice: training and evaluation losses are those of different functions.

    Args:
        config (`PeerConfig`)
        layer_idx (`int`): Index of the layer.
    """

    def __init__(self, config: PeerConfig, layer_idx: int):
        super().__init__()
        self.expert_choice = config.moe_routing == "expert_choice"
        self.gate = MoeRouter(config)
        self.experts = MoeExperts(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        forward_pass: ForwardPass | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """See [`PeerFeedForward.forward`]."""
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
            probabilities = torch.where(padding_mask.reshape(-1, 1).bool(), probabilities, 0.0)
        weights, chosen = probabilities.t().topk(capacity, dim=-1)  # [num_experts, capacity]
        # A token's weights sum to one over the experts that chose it; in evaluation, over those that it chooses.
        weights, chosen = weights.flatten(), chosen.flatten()
        total = weights.new_zeros(num_tokens).index_add(0, chosen, weights)
        weights = (weights / total[chosen].clamp(min=1e-9)).to(tokens.dtype)
        experts = torch.arange(num_experts, device=tokens.device).repeat_interleave(capacity)
        outputs = self.experts(tokens[chosen], experts[:, None], weights[:, None])
        return torch.zeros_like(tokens).index_add(0, chosen, outputs)


class FeedForwardInterface(GeneralInterface):
    """Mapping from the names in `PeerConfig.feed_forward_types` to module classes. See the module's docstring."""

    _global_mapping = {
        "dense": DenseFeedForward,
        "moe": MoeFeedForward,
        "pkm": PkmFeedForward,
        "peer": PeerFeedForward,
    }

    @classmethod
    def register(cls, key: str, value: type[nn.Module]) -> None:
        """Register a variant. Raises `ValueError` for another's name, or a `forward` without keyword arguments."""
        if not any(each.kind is each.VAR_KEYWORD for each in inspect.signature(value.forward).parameters.values()):
            raise ValueError(f"`forward` of {value.__name__} must take `**kwargs`: layers pass `padding_mask`.")
        if (known := cls._global_mapping.get(key, value)).__qualname__ != value.__qualname__:
            raise ValueError(f"{key!r} is the name of {known.__name__} already, give {value.__name__} another.")
        super().register(key, value)


ALL_FEED_FORWARDS = FeedForwardInterface()
