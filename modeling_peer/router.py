# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
The router of PEER and PKM: query network, query norm, product keys, and scores turned into router weights (Xu Owen He,
"Mixture of A Million Experts", arXiv 2407.04153, sections 2.1 to 2.3).
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from .configuration_peer import Generation, PeerConfig, grid_size
from .experts import ALL_RETRIEVAL_FUNCTIONS, find_function


SCORING_FUNCTIONS = {"softmax": partial(torch.softmax, dim=-1), "sigmoid": torch.sigmoid, "relu": torch.relu}

GATE_WIDTH = 64
SHUT_BELOW = 0.01  # a gate that is less open counts as shut
OPEN_LOGIT = 32.0  # a logit whose sigmoid is 1 in float32


class ForwardPass:
    """
    The state of one forward pass of a base model, which is passed to every layer and marked as ended after the last. A
    layer cannot find this out: activation checkpointing runs it without gradients, and again in the backward.

    Args:
        learns (`bool`): Whether the model is in training mode and gradients are enabled.
        has_ended (`bool`, *optional*, defaults to `False`): Whether the pass is over, so that a layer recomputes.
    """

    # Not a dataclass: FSDP2 would give each layer its own copy, which would not be marked as ended.
    def __init__(self, learns: bool, has_ended: bool = False):
        self.learns, self.has_ended = learns, has_ended


class SumOverRanks(torch.autograd.Function):
    """The sum of every rank's tensor. The gradient of each rank's tensor is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx, tensor):
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return SumOverRanks.apply(gradient)


class QueryRMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension, in the dtype of its input whatever the dtype of its weight."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, self.normalized_shape, self.weight.to(hidden_states.dtype), self.eps)


class QueryBatchNorm(nn.BatchNorm1d):
    """
    BatchNorm of queries over the tokens of a batch, padding excluded: one mean and variance per feature (section 2.3
    of the paper; its table 3 shows that it evens out how often experts are used).

    In training, a query is normalized by the moments of the whole micro-batch, later tokens and other sequences
    included. In evaluation and generation the running statistics are used, and a token depends on its past alone. For
    strictly causal training, choose `query_norm="rms"` or `None`. In training mode, the running statistics are used
    and left unchanged if the norm is frozen (its `weight` requires no gradient), or if gradients are disabled, as when
    a policy generates.

    Moments are computed in float32 (float64 for float64 queries). If `torch.distributed` is initialized, they are
    those of the joint batch of all ranks, with gradients: every rank must run equally many training forward passes.
    Each micro-batch updates the running statistics once, also with activation checkpointing: see [`ForwardPass`].

    Args:
        num_features (`int`): Elements of a query, of all heads together.
        eps (`float`, *optional*, defaults to 1e-5): Added to the variance.

    Attributes:
        num_replicas (`int`): Number of ranks that see the same batch: more than one under tensor parallelism.
    """

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__(num_features, eps=eps)
        # In float32 in whatever dtype the model is made (until it is cast): in bfloat16 a momentum of 0.1 is lost.
        self.running_mean = torch.zeros(num_features, dtype=torch.float32)
        self.running_var = torch.ones(num_features, dtype=torch.float32)
        self.num_replicas = 1

    def forward(
        self, queries: torch.Tensor, padding_mask: torch.Tensor | None = None, forward_pass: ForwardPass | None = None
    ) -> torch.Tensor:
        """
        Args:
            queries (`torch.Tensor` of shape `(..., num_features)`): The queries of all heads, concatenated.
            padding_mask (`torch.Tensor` of shape `(...)`, *optional*): True (or 1) where there is a token.
            forward_pass (`ForwardPass`, *optional*): If `None`, it learns if gradients are enabled.

        Returns:
            `torch.Tensor`: normalized queries, of the shape of `queries`, at least float32.
        """
        forward_pass = forward_pass or ForwardPass(learns=torch.is_grad_enabled())
        features = queries.to(torch.promote_types(queries.dtype, torch.float32)).reshape(-1, self.num_features)
        weight, bias = self.weight.to(features.dtype), self.bias.to(features.dtype)
        statistics = self.running_mean, self.running_var
        if not (self.training and forward_pass.learns and self.weight.requires_grad):
            # The backward pass needs copies: another forward pass before it may change the statistics.
            copies = (each.to(features.dtype, copy=torch.is_grad_enabled()) for each in statistics)
            normalized = F.batch_norm(features, *copies, weight, bias, eps=self.eps)
        elif self._is_plain(features, padding_mask):
            copies = [each.clone() for each in statistics]
            normalized = F.batch_norm(features, *copies, weight, bias, True, self.momentum, self.eps)
            if not forward_pass.has_ended:
                self.num_batches_tracked += 1
                for own, new in zip(statistics, copies, strict=True):
                    own.copy_(new)
        else:
            mean, variance, count = self._batch_moments(features, padding_mask)
            if not forward_pass.has_ended:
                self._update_statistics(mean, variance, count)
            normalized = (features - mean) * torch.rsqrt(variance + self.eps) * weight + bias
        return normalized.view_as(queries)

    def _is_plain(self, features, padding_mask):
        """Whether torch's faster BatchNorm gives the same result. Reading a mask on a GPU would synchronize."""
        if torch.compiler.is_compiling() or features.dtype != self.running_mean.dtype or len(features) < 2:
            return False  # a compiler fuses the explicit computation well
        can_look = features.is_cpu and type(padding_mask) is torch.Tensor
        return not self._spans_ranks() and (padding_mask is None or (can_look and bool(padding_mask.all())))

    def _batch_moments(self, features, padding_mask):
        """Mean and biased variance, `(num_features,)` each, and the number of tokens, a tensor, over all ranks."""
        if padding_mask is None:
            present = torch.ones_like(features[:, :1], dtype=torch.bool)
        else:
            present = padding_mask.reshape(-1, 1).bool()
        # Two passes: a mean of squares minus a squared mean would lose the variance's digits in float32. Padding is
        # selected away rather than multiplied by zero, as attention without a token to attend to may give NaN.
        total = torch.where(present, features, 0.0).sum(0)
        sums = self._sum_over_ranks(torch.cat([total, present.sum(0).to(total.dtype)]))
        count = sums[-1].detach()
        mean = sums[:-1] / count.clamp(min=1)
        squares = torch.where(present, features - mean, 0.0).square().sum(0)
        return mean, self._sum_over_ranks(squares) / count.clamp(min=1), count

    @staticmethod
    def _spans_ranks():
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def _sum_over_ranks(self, tensor):
        return SumOverRanks.apply(tensor) / self.num_replicas if self._spans_ranks() else tensor

    @torch.no_grad()
    def _update_statistics(self, mean, variance, count):
        unbiased_variance = variance * (count / (count - 1).clamp(min=1))
        # Fewer than two tokens have no variance and update no moments. `torch.where` avoids a synchronization.
        momentum = torch.where(count > 1, self.momentum, 0.0)
        self.running_mean += momentum * (mean - self.running_mean)
        self.running_var += momentum * (unbiased_variance - self.running_var)
        self.num_batches_tracked += 1


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
    """

    def __init__(self, config: PeerConfig, generation: Generation):
        super().__init__()
        self.config = config
        self.generation = generation
        self.num_heads = generation.num_heads
        self.query_size = config.query_size
        self.scoring_function = SCORING_FUNCTIONS[config.scoring_func]
        self.query_proj = nn.Linear(config.hidden_size, self.num_heads * self.query_size, bias=False)
        self.norm_type = config.query_norm  # a norm may be wrapped, for instance by PEFT's `modules_to_save`
        self.query_norm = self.key_norm = None
        if config.query_norm == "batch":
            self.query_norm = QueryBatchNorm(self.num_heads * self.query_size, eps=config.rms_norm_eps)
        elif config.query_norm == "rms":
            self.query_norm = QueryRMSNorm(self.query_size // 2, eps=config.rms_norm_eps)
            self.key_norm = QueryRMSNorm(self.query_size // 2, eps=config.rms_norm_eps)
        # [heads or 1, rows C and columns C', √N, d_k / 2]
        num_sets = self.num_heads if config.sub_keys_per_head else 1
        shape = num_sets, 2, grid_size(generation.num_experts), self.query_size // 2
        self.sub_keys = nn.Parameter(torch.empty(shape))

    @property
    def num_experts_per_head(self) -> int:
        """Number k of experts that each head retrieves, as the configuration says now."""
        return self.config.num_experts_per_head

    def init_own_weights(self) -> None:
        # Scores of normalized queries start with unit variance.
        init.normal_(self.sub_keys, std=self.query_size**-0.5)

    def forward(
        self,
        hidden_states: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        forward_pass: ForwardPass | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`)
            padding_mask, forward_pass (*optional*): See [`QueryBatchNorm.forward`].

        Returns:
            `tuple(torch.Tensor)`: expert indices (int64) and router weights, each of shape
            `(batch_size, sequence_length, num_retrieval_heads, num_experts_per_head)`, best first.
        """
        queries = self.query_proj(hidden_states)
        # Autocast would cast the products back to bfloat16.
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            queries, sub_keys = self._normalized(queries, padding_mask, forward_pass)
            indices, scores = self.retrieve(queries.flatten(0, -4), sub_keys, self.num_experts_per_head)
            weights = self.scoring_function(scores)
        shape = *hidden_states.shape[:-1], *indices.shape[1:]
        return indices.view(shape), weights.view(shape).to(hidden_states.dtype)

    def retrieve(self, queries: torch.Tensor, sub_keys: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Retrieve as `config.expert_kernels` says. This is a method so that expert masks can replace it."""
        retrieve = find_function(ALL_RETRIEVAL_FUNCTIONS, self.config.expert_kernels, queries.device.type)
        return retrieve(queries, sub_keys, k)

    def _normalized(self, queries, padding_mask, forward_pass):
        """Queries `(..., heads, 2, d_k / 2)` and sub-keys, normalized as configured, at least in float32."""
        dtype = torch.promote_types(queries.dtype, torch.float32)
        sub_keys = self.sub_keys.to(dtype)
        halves = *queries.shape[:-1], self.num_heads, 2, self.query_size // 2
        if self.norm_type == "batch":
            return self.query_norm(queries, padding_mask, forward_pass).view(halves), sub_keys
        queries = queries.to(dtype).view(halves)
        if self.norm_type == "rms":
            # As in attention, the dot product of vectors whose elements have unit size is scaled to unit variance.
            return self.query_norm(queries) * self.query_size**-0.5, self.key_norm(sub_keys)
        return queries, sub_keys


class GateLogit(nn.Linear):
    """The last layer of an [`ExpertGate`], which starts open."""

    def init_own_weights(self) -> None:
        init.zeros_(self.weight)
        init.constant_(self.bias, OPEN_LOGIT)

    def forward(self, neurons: torch.Tensor) -> torch.Tensor:
        """`(..., GATE_WIDTH) -> (..., 1)`"""
        # Not by a matrix-vector product, whose rounding may depend on where in memory a loaded weight lies.
        return (neurons * self.weight).sum(-1, keepdim=True) + self.bias


class ExpertGate(nn.Module):
    """
    A gate that decides which inputs use the added experts: a classifier `sigmoid(w · gelu(W x + b) + c)` that
    multiplies their output. It starts so wide open that no gradient changes it: [`fit_gates`] fits it separately. It
    is exactly zero where it would be less than one percent open. It is not the gate w_i of gated experts.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, GATE_WIDTH)
        self.down_proj = GateLogit(GATE_WIDTH, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., hidden_size) -> (..., 1)`, between 0 and 1."""
        openness = torch.sigmoid(self.logits(hidden_states))
        return torch.where(openness < SHUT_BELOW, 0.0, openness)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The logits, `(..., 1)`, whose sigmoid is the gate."""
        return self.down_proj(F.gelu(self.up_proj(hidden_states)))


class AddedRouter(ProductKeyRouter):
    """
    The router of a protected generation. Its expert indices start at `generation.first_expert`, and its weights are
    multiplied with a gate between 0 and 1, which is open until it is fitted.
    """

    def __init__(self, config: PeerConfig, generation: Generation):
        super().__init__(config, generation)
        self.gate = ExpertGate(config.hidden_size)

    @property
    def num_experts_per_head(self) -> int:
        """Number k of experts that each head retrieves, which is fixed when they are added."""
        return self.generation.num_experts_per_head

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`ProductKeyRouter.forward`]."""
        indices, weights = super().forward(hidden_states, *args, **kwargs)
        return indices + self.generation.first_expert, weights * self.gate(hidden_states)[..., None]
