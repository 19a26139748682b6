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
"""Normalization of queries: a BatchNorm over tokens that ignores padding and spans all ranks, and an RMSNorm."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from .forward_pass import ForwardPass
from .library_releases import active_transforms
from .process_groups import group_of_all


class _SumOverRanks(torch.autograd.Function):
    """The sum of every rank's tensor. The gradient of each rank's tensor is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return _SumOverRanks.apply(gradient, ctx.group), None


class QueryRMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension, in the dtype of its input whatever the dtype of its weight."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(..., normalized_size)`): In at least float32.

        Returns:
            `torch.Tensor` of the shape and dtype of `hidden_states`.
        """
        return F.rms_norm(hidden_states, self.normalized_shape, self.weight.to(hidden_states.dtype), self.eps)


class QueryBatchNorm(nn.BatchNorm1d):
    """
    BatchNorm of queries over the tokens of a batch, padding excluded: one mean and variance per feature (section 2.3
    of the paper; its table 3 shows that it evens out how often experts are used).

    In training, a query is normalized by the moments of the whole micro-batch, which include later tokens and other
    sequences. These moments are all that a token learns of its future: means over thousands of positions, never a
    single position. In evaluation and generation the running statistics take their place, and a token depends on its
    past alone. Where training must be strictly causal, choose `query_norm="rms"` or `None`.

    Two cases use the running statistics in training mode too, and leave them unchanged:

    - a frozen norm, whose `weight` requires no gradient (see [`freeze_query_norm`]): adapters train on the statistics
      they will be used with;
    - a forward pass without gradients, as when a policy generates between its updates.

    Moments are computed in float32 (float64 for float64 queries). Where `torch.distributed` is initialized they are
    reduced over all ranks, with gradients, so that they equal the moments of the joint batch; every rank must
    therefore run equally many training forward passes. The query norms have a process group for these sums alone,
    except in a compiled graph, which has the default group. Running statistics take up each micro-batch once, also
    under activation checkpointing, which runs a layer twice: see [`ForwardPass`].

    Args:
        num_features (`int`): Elements of a query, of all heads together.
        eps (`float`, *optional*, defaults to 1e-5): Added to the variance.

    Attributes:
        num_replicas (`int`): How many ranks see each batch: more than one under tensor parallelism.
    """

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__(num_features, eps=eps)
        # In float32 whatever dtype the model is made or loaded in, until it is cast: bfloat16 loses what a momentum of
        # 0.1 adds.
        self.running_mean = torch.zeros(num_features, dtype=torch.float32)
        self.running_var = torch.ones(num_features, dtype=torch.float32)
        self.num_replicas = 1

    def forward(
        self,
        queries: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        forward_pass: ForwardPass | None = None,
    ) -> torch.Tensor:
        """
        Args:
            queries (`torch.Tensor` of shape `(..., num_features)`):
                The queries of all heads, concatenated.
            padding_mask (`torch.Tensor` of shape `(...)`, *optional*):
                True (or 1) where there is a token, False where there is padding. Every position is a token if `None`.
            forward_pass (`ForwardPass`, *optional*):
                The forward pass of the model. If `None`, this call is one by itself, which learns if gradients are
                enabled.

        Returns:
            `torch.Tensor`: normalized queries, of the shape of `queries`, at least float32.
        """
        if forward_pass is None:
            forward_pass = ForwardPass(learns=torch.is_grad_enabled())
        queries = queries.to(torch.promote_types(queries.dtype, torch.float32))
        weight, bias = self.weight.to(queries.dtype), self.bias.to(queries.dtype)
        if self.training and forward_pass.learns and self.weight.requires_grad:
            if self._is_plain_batch(queries, padding_mask):
                return self._normalize_plain_batch(queries, weight, bias, forward_pass.updates_statistics)
            mean, variance, count = self._batch_moments(queries, padding_mask)
            if forward_pass.updates_statistics:
                self._update_statistics(mean, variance, count)
            normalized = (queries - mean) * torch.rsqrt(variance + self.eps)
            return normalized * weight + bias
        statistics = (self.running_mean.to(queries.dtype), self.running_var.to(queries.dtype))
        features = queries.reshape(-1, self.num_features)
        return F.batch_norm(features, *statistics, weight, bias, eps=self.eps).view_as(queries)

    def _is_plain_batch(self, queries, padding_mask):
        """
        Whether torch's own BatchNorm, which is ten times faster on a CPU, computes the same: on one rank, without
        padding, and with a variance.
        """
        if not queries.is_cpu or queries.dtype != self.running_mean.dtype or self._spans_ranks():
            return False
        # Compilers fuse what `_batch_moments` computes, and neither they nor transforms know the values of a mask.
        if torch.compiler.is_compiling() or active_transforms() or queries.numel() <= self.num_features:
            return False
        return padding_mask is None or (type(padding_mask) is torch.Tensor and bool(padding_mask.all()))

    def _normalize_plain_batch(self, queries, weight, bias, updates_statistics):
        # A layer that recomputes saves for its backward what it saved before, so it has statistics as well.
        statistics = [x if updates_statistics else x.clone() for x in (self.running_mean, self.running_var)]
        features = queries.reshape(-1, self.num_features)
        normalized = F.batch_norm(features, *statistics, weight, bias, True, self.momentum, self.eps)
        self.num_batches_tracked += updates_statistics
        return normalized.view_as(queries)

    def _batch_moments(self, queries, padding_mask):
        """Mean and biased variance, `(num_features,)` each, and the number of tokens, a tensor, over all ranks."""
        queries = queries.reshape(-1, self.num_features)
        if padding_mask is None:
            present = torch.ones_like(queries[:, :1], dtype=torch.bool)
        else:
            present = padding_mask.reshape(-1, 1).bool()
        # Two passes: the variance as a mean of squares minus a squared mean would lose its digits in float32. Padding
        # is selected away rather than multiplied by zero: the output of attention without a token to attend to may be
        # NaN.
        total = torch.where(present, queries, 0.0).sum(0)
        sums = self._sum_over_ranks(torch.cat([total, present.sum(0).to(total.dtype)]))
        count = sums[-1].detach()
        mean = sums[:-1] / count.clamp(min=1)
        squares = torch.where(present, queries - mean, 0.0).square().sum(0)
        variance = self._sum_over_ranks(squares) / count.clamp(min=1)
        return mean, variance, count

    @staticmethod
    def _spans_ranks():
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    def _sum_over_ranks(self, tensor):
        if self._spans_ranks():
            # A compiler does not trace how a group is made.
            group = None if torch.compiler.is_compiling() else group_of_all("query norms")
            return _SumOverRanks.apply(tensor, group) / self.num_replicas
        return tensor

    @torch.no_grad()
    def _update_statistics(self, mean, variance, count):
        unbiased_variance = variance * (count / (count - 1).clamp(min=1))
        # One token has no variance, and none has not even a mean. Decided on the device: no synchronization.
        momentum = torch.where(count > 1, self.momentum, 0.0)
        self.running_mean += momentum * (mean - self.running_mean)
        self.running_var += momentum * (unbiased_variance - self.running_var)
        self.num_batches_tracked += 1


def freeze_query_norm(model: nn.Module) -> None:
    """
    Let a trained model train on the running statistics of its query BatchNorms, which keep these and their weights
    from then on. Every token is then computed in training as in evaluation.

    Trainers that compare a policy with a reference or with its own earlier outputs, such as `DPOTrainer` and
    `GRPOTrainer` of TRL, need it when they train all parameters: otherwise only the policy normalizes queries by the
    moments of its batch, and differs from its reference before the first update. An adapter of other modules needs
    nothing, because PEFT freezes the norms with the rest of the base model.

    Call it before the training starts, and again after loading or copying the model: which parameters are trained is
    not saved. `requires_grad_(True)` of a norm undoes it, and so does `set_adapter` of PEFT for the norm of a graft:
    for grafts with `query_norm="batch"`, call it on the `model` of a trainer that is made.

    Args:
        model (`nn.Module`):
            Any module with PEER or PKM layers: a [`PeerForCausalLM`], or a model they are grafted onto. One without
            query BatchNorm stays as it is.

    ```python
    >>> model = PeerForCausalLM.from_pretrained(folder)
    >>> freeze_query_norm(model)
    >>> DPOTrainer(model, args=args, train_dataset=preferences).train()
    ```
    """
    for module in model.modules():
        if isinstance(module, QueryBatchNorm):
            module.requires_grad_(False)
