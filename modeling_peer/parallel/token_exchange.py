# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Exchange of tokens between processes that each hold some columns of every row of the expert tables. Tables and their
gradients are never sent.

In a memory group ([`TokenExchange`]) a process has tokens of its own. It gets from the others the columns of their
hidden states that match its columns of the tables. Results are summed in the process that has the tokens. Under
tensor parallelism ([`ReplicatedExchange`]) all processes have the same tokens.

NCCL and gloo have all collectives that are used, of equal parts. Tokens are padded to the largest number of a process,
and columns to the widest part.
"""

import math

import torch
import torch.distributed as dist
from torch.nn import functional as F

from ..ops.experts import NoExchange
from .releases import all_gather, reduce_scatter


class ColumnExchange(NoExchange):
    """
    Base class of both exchanges; each has a `_sum` of its own.

    Args:
        group (`dist.ProcessGroup`): Each of its processes holds a part of the columns, in the order of their ranks.
        width (`int`): Number of columns of whole tables. Where they do not divide, the last process has fewer.
    """

    def __init__(self, group: dist.ProcessGroup, width: int):
        self.group, self.size, self.width = group, dist.get_world_size(group), width
        # Number of columns of a part, as DTensor splits a dimension, and the start and end of this process's part.
        self.part = math.ceil(width / self.size)
        first = dist.get_rank(group) * self.part
        self.own = slice(min(first, width), min(first + self.part, width))

    def products(self, kernels, columns, rows, tables):
        # Each process has a part of every sum. The parts are added in float32 at least, and rounded once.
        exact = columns.to(torch.promote_types(columns.dtype, torch.float32))
        sums = self._sum(torch.cat([kernels.up(exact, rows, table) for table in tables], dim=1))
        return list(sums.to(columns.dtype).chunk(len(tables), dim=1))

    def _with_columns(self, columns):
        """Columns of this process, padded to the widest part."""
        return _padded(columns, columns=self.part - columns.shape[1]).contiguous()


class ReplicatedExchange(ColumnExchange):
    """The exchange of tokens that all processes have: products are summed, columns of the output gathered."""

    def to_columns(self, tokens):
        return tokens[:, self.own].contiguous()

    def to_tokens(self, columns):
        parts = columns.new_empty(self.size * len(columns), self.part)
        if parts.numel():
            all_gather(parts, self._with_columns(columns), group=self.group)
        return parts.view(self.size, len(columns), self.part).transpose(0, 1).flatten(1)[:, : self.width]

    def _sum(self, parts):
        dist.all_reduce(parts, group=self.group)
        return parts


class TokenExchange(ColumnExchange):
    """
    The exchange of the tokens of one forward, and of its backward, between processes that have different ones.

    Args:
        group, width: See [`ColumnExchange`].
        num_tokens (`int`): Number of tokens of this process. May be 0, and differ between processes.
        most_tokens (`int`): The largest number of tokens of a process of the group.
    """

    keeps_coefficients = True

    def __init__(self, group: dist.ProcessGroup, width: int, num_tokens: int, most_tokens: int):
        super().__init__(group, width)
        self.num_tokens, self.most_tokens = num_tokens, most_tokens
        # Each process has the mean loss of its own tokens, and its columns get the gradients of all processes. They
        # are averaged, like all other gradients.
        self.share = 1 / self.size
        self._started: tuple[torch.Tensor, torch.Tensor, dist.Work] | None = None

    def gather(self, part):
        whole = part.new_empty(self.size * self.most_tokens, *part.shape[1:])
        if whole.numel():
            padded = _padded(part, tokens=self.most_tokens - self.num_tokens)
            all_gather(whole, padded.contiguous(), group=self.group)
        return whole

    def start_to_columns(self, tokens: torch.Tensor) -> None:
        """Start [`to_columns`] for some tokens; the next [`input_columns`] waits for it."""
        parts = self._parts(tokens)
        received = torch.empty_like(parts)
        if received.numel():
            work = dist.all_to_all_single(received, parts, group=self.group, async_op=True)
            self._started = received, parts, work  # sent tensors must be kept until they are received

    def input_columns(self, tokens):
        if self._started is None:
            return self.to_columns(tokens)
        (received, _, work), self._started = self._started, None
        work.wait()
        return self._of_process(received)

    def to_columns(self, tokens):
        return self._of_process(self._all_to_all(self._parts(tokens)))

    def to_tokens(self, columns):
        parts = self._with_columns(columns).unflatten(0, (self.size, self.most_tokens))
        return self._all_to_all(parts).transpose(0, 1).flatten(1)[: self.num_tokens, : self.width]

    def _sum(self, parts):
        sums = parts.new_empty(self.most_tokens, parts.shape[1])
        if sums.numel():
            reduce_scatter(sums, parts, group=self.group)
        return sums[: self.num_tokens]

    def _parts(self, tokens):
        """`(num_tokens, width) -> (size, most_tokens, part)`, the parts for each process."""
        padded = _padded(tokens, self.size * self.part - self.width, self.most_tokens - self.num_tokens)
        return padded.unflatten(1, (self.size, self.part)).transpose(0, 1).contiguous()

    def _of_process(self, parts):
        return parts.flatten(0, 1)[:, : self.own.stop - self.own.start].contiguous()

    def _all_to_all(self, parts):
        """`(size, ...)`, a part for each process -> `(size, ...)`, a part of each process."""
        received = torch.empty_like(parts)
        if received.numel():
            dist.all_to_all_single(received, parts, group=self.group)
        return received


def _padded(matrix, columns=0, tokens=0):
    """A matrix with columns and tokens of zeros added."""
    return F.pad(matrix, (0, columns, 0, tokens)) if columns or tokens else matrix
