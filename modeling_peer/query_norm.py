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
"""Normalization of the queries across tokens: BatchNorm that leaves padding out and equals the joint batch's on ranks."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F


class _SumOverRanks(torch.autograd.Function):
    """The sum of each rank's tensor; the gradient of a rank's tensor is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, tensor):
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return _SumOverRanks.apply(gradient)


class QueryRMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension in the dtype of its input, at least float32, whatever the dtype of its weight."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, self.normalized_shape, self.weight.to(hidden_states.dtype), self.eps)


class QueryBatchNorm(nn.BatchNorm1d):
    """
    BatchNorm over the unpadded positions of a batch, one mean and variance per feature of the query (paper, section
    2.3 and table 3: it evens out how often experts are used).

    While training, a query is normalized by moments of the whole micro-batch, of later tokens and other sequences
    too. These moments are the only thing a token learns of its future: a mean over thousands of positions, not a
    position. In evaluation and generation the running statistics take their place and a token depends on nothing but
    its past. Whoever must have strict causality while training takes `query_norm="rms"` or `None`. A frozen norm, one
    whose `weight` requires no gradient, works as in evaluation: adapters train on the statistics they will be used
    with. So does a forward without gradients in training mode, where a policy generates between its updates: it trains
    nothing.

    Moments are computed in float32 (or float64 for float64 queries) and, where torch.distributed is initialized,
    reduced over its ranks so that they equal the joint batch's, with gradients flowing across ranks: all ranks must run
    equally many training forwards. Running statistics are folded by `fold_moments`, which the base model calls once
    per micro-batch: under activation checkpointing a layer's forward runs twice and must not count twice.
    """

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__(num_features, eps=eps)
        # In float32 whatever dtype the model is made or loaded in: bfloat16 loses what a momentum of 0.1 adds.
        self.running_mean = torch.zeros(num_features, dtype=torch.float32)
        self.running_var = torch.ones(num_features, dtype=torch.float32)
        # Whether a forward in training mode has a backward to come; the base model says so.
        self.learns = True
        self.pending_moments: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        # How many ranks see each batch, more than one under tensor parallelism: they count a token once.
        self.num_replicas = 1

    def forward(self, queries: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            queries (`torch.Tensor` of shape `(..., num_features)`):
                The queries of all heads, concatenated.
            padding_mask (`torch.Tensor` of shape `(...)`, *optional*):
                True (or 1) where there is a token, False where there is padding. All tokens if not given.

        Returns:
            `torch.Tensor`: normalized queries, of the shape of `queries`, at least float32.
        """
        queries = queries.to(torch.promote_types(queries.dtype, torch.float32))
        weight, bias = self.weight.to(queries.dtype), self.bias.to(queries.dtype)
        if self.training and self.learns and self.weight.requires_grad:
            mean, variance, count = self._batch_moments(queries, padding_mask)
            unbiased_variance = variance * (count / (count - 1).clamp(min=1))
            self.pending_moments = (mean.detach(), unbiased_variance.detach(), count)
            normalized = (queries - mean) * torch.rsqrt(variance + self.eps)
            return normalized * weight + bias
        statistics = (self.running_mean.to(queries.dtype), self.running_var.to(queries.dtype))
        features = queries.reshape(-1, self.num_features)
        return F.batch_norm(features, *statistics, weight, bias, eps=self.eps).view_as(queries)

    def _batch_moments(self, queries, padding_mask):
        queries = queries.reshape(-1, self.num_features)
        if padding_mask is None:
            present = torch.ones_like(queries[:, :1], dtype=torch.bool)
        else:
            present = padding_mask.reshape(-1, 1).bool()
        # Two passes: the variance as a mean of squares minus a squared mean would lose its digits in float32. Selected
        # rather than multiplied by zero: an attention row without a token may be NaN.
        total = torch.where(present, queries, 0.0).sum(0)
        sums = self._sum_over_ranks(torch.cat([total, present.sum(0).to(total.dtype)]))
        count = sums[-1].detach()
        mean = sums[:-1] / count.clamp(min=1)
        squares = torch.where(present, queries - mean, 0.0).square().sum(0)
        variance = self._sum_over_ranks(squares) / count.clamp(min=1)
        return mean, variance, count

    def _sum_over_ranks(self, tensor):
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return _SumOverRanks.apply(tensor) / self.num_replicas
        return tensor

    @torch.no_grad()
    def fold_moments(self) -> None:
        """Folds the moments of the last training forward into the running statistics, once."""
        if self.pending_moments is None:
            return
        mean, variance, count = self.pending_moments
        self.pending_moments = None
        # One token has no variance, none has not even a mean; decided on the device, without a copy to the host.
        momentum = torch.where(count > 1, self.momentum, 0.0)
        self.running_mean += momentum * (mean - self.running_mean)
        self.running_var += momentum * (variance - self.running_var)
        self.num_batches_tracked += 1
