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
The exchange of tokens between processes that each hold some columns of every row of the expert tables.

A process takes part with the tokens of its own batch. It gets from the others the columns of their hidden states that
go with its columns of the tables, and what comes of them is summed where the tokens are: tables and their gradients
never travel. All collectives are those that NCCL and gloo have: all-to-all, all-gather and reduce-scatter of equal
parts, so the tokens of all processes are padded to the largest number of them.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from .forward_pass import ForwardPass
from .library_releases import all_gather, reduce_scatter


class NoExchange:
    """What a pool does with its tokens where one process holds whole tables: nothing."""

    # What the gradients of the tables are multiplied with.
    share = 1.0
    keeps_coefficients = False

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """`(num_tokens, ...)` of each process -> `(num_all_tokens, ...)`, those of all of them."""
        return part

    def to_columns(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(num_tokens, hidden_size)` of each process -> `(num_all_tokens, width)`, the columns of this process."""
        return tokens

    def input_columns(self, tokens: torch.Tensor) -> torch.Tensor:
        """As [`NoExchange.to_columns`], of the hidden states, whose exchange may have been started before."""
        return tokens

    def to_tokens(self, columns: torch.Tensor) -> torch.Tensor:
        """The inverse of [`NoExchange.to_columns`]."""
        return columns

    def products(
        self, kernels: Any, columns: torch.Tensor, indices: torch.Tensor, tables: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """
        The dot products of tokens and the rows that they name.

        Args:
            kernels ([`TorchKernels`])
            columns (`torch.Tensor` of shape `(num_all_tokens, width)`)
            indices (`torch.Tensor` of shape `(num_all_tokens, num_active)`): int64, rows of the tables.
            tables (`list[torch.Tensor]` of shape `(num_rows, width)`): The columns of this process.

        Returns:
            `list[torch.Tensor]` of shape `(num_tokens, num_active)`: one for each table, for the tokens of this
            process, in the dtype of `columns`.
        """
        return [kernels.up(columns, indices, table) for table in tables]


class TokenExchange(NoExchange):
    """
    The exchange of the tokens of one forward, and of its backward, between the processes of a group.

    Args:
        group (`dist.ProcessGroup`): Each of its processes holds a part of the columns, in the order of their ranks.
        num_tokens (`int`): Number of tokens of this process. May be 0, and differ between processes.
        most_tokens (`int`): The largest number of tokens of a process of the group.
        width (`int`): Number of columns of whole tables. Where they do not divide, the last process has fewer.
    """

    keeps_coefficients = True

    def __init__(self, group: dist.ProcessGroup, num_tokens: int, most_tokens: int, width: int):
        if num_tokens > most_tokens:
            raise ValueError(
                f"A layer runs {num_tokens} tokens, and an earlier one of the forward pass told a memory group of "
                f"{most_tokens} at most: do not hand `forward_pass` on to a layer that runs other tokens."
            )
        self.group = group
        self.size = dist.get_world_size(group)
        self.num_tokens = num_tokens
        self.most_tokens = most_tokens
        self.width = width
        # Columns of a part, as DTensor splits a dimension, and those of this process. Parts are sent with the columns
        # that the last one lacks, as all parts have to be equal.
        self.part = math.ceil(width / self.size)
        self.own_width = max(min(self.part, width - dist.get_rank(group) * self.part), 0)
        # Each process has the mean loss of its own tokens, and its columns get the gradients of all of them: as the
        # gradients of everything else, they are averaged.
        self.share = 1 / self.size
        self._started: tuple[torch.Tensor, torch.Tensor, dist.Work] | None = None

    def _padded(self, tokens):
        missing = self.most_tokens - self.num_tokens
        if missing:
            tokens = torch.cat([tokens, tokens.new_zeros(missing, *tokens.shape[1:])])
        return tokens.contiguous()

    def gather(self, part):
        whole = part.new_empty(self.size * self.most_tokens, *part.shape[1:])
        if whole.numel():
            all_gather(whole, self._padded(part), group=self.group)
        return whole

    def start_to_columns(self, tokens: torch.Tensor) -> None:
        """Start [`to_columns`] of some tokens, for which the next [`input_columns`] waits."""
        parts = self._parts(tokens).contiguous()
        received = torch.empty_like(parts)
        if received.numel():
            work = dist.all_to_all_single(received, parts, group=self.group, async_op=True)
            self._started = received, parts, work  # what is sent has to be there until it is received

    def input_columns(self, tokens):
        if self._started is None:
            return self.to_columns(tokens)
        (received, _, work), self._started = self._started, None
        work.wait()
        return self._of_process(received)

    def to_columns(self, tokens):
        return self._of_process(self._all_to_all(self._parts(tokens)))

    def _parts(self, tokens):
        tokens = _with_columns(self._padded(tokens), self.size * self.part)
        return tokens.unflatten(1, (self.size, self.part)).transpose(0, 1)

    def _of_process(self, parts):
        return parts.flatten(0, 1)[:, : self.own_width].contiguous()

    def to_tokens(self, columns):
        parts = _with_columns(columns, self.part).unflatten(0, (self.size, self.most_tokens))
        return self._all_to_all(parts).transpose(0, 1).flatten(1)[: self.num_tokens, : self.width]

    def _all_to_all(self, parts):
        """`(size, ...)`, a part for each process -> `(size, ...)`, a part of each process."""
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        if received.numel():
            dist.all_to_all_single(received, parts.contiguous(), group=self.group)
        return received

    def products(self, kernels, columns, indices, tables):
        # Each process has a part of every sum. The parts are added in float32, and rounded once.
        exact = columns.to(torch.promote_types(columns.dtype, torch.float32))
        parts = torch.cat([kernels.up(exact, indices, table) for table in tables], dim=1)
        sums = parts.new_empty(self.most_tokens, parts.shape[1])
        if sums.numel():
            reduce_scatter(sums, parts, group=self.group)
        return list(sums[: self.num_tokens].to(columns.dtype).chunk(len(tables), dim=1))


def _with_columns(matrix, num_columns):
    """A matrix with as many columns more, of zeros, as it takes to have so many."""
    missing = num_columns - matrix.shape[1]
    return F.pad(matrix, (0, missing)) if missing else matrix


def exchange_tokens(
    group: dist.ProcessGroup, tokens: torch.Tensor, width: int, forward_pass: ForwardPass | None = None
) -> TokenExchange:
    """
    Begin an exchange: in the first of a forward pass the processes tell each other how many tokens they have.

    Args:
        group (`dist.ProcessGroup`): See [`TokenExchange`].
        tokens (`torch.Tensor` of shape `(num_tokens, ...)`): Those of this process.
        width (`int`): Number of columns of whole tables.
        forward_pass (`ForwardPass`, *optional*):
            The forward pass of the model, in all of whose layers there are equally many tokens. Without it, they are
            counted each time.
    """
    most = None if forward_pass is None else forward_pass.most_tokens
    if most is None:
        count = torch.tensor(len(tokens), device=tokens.device)
        dist.all_reduce(count, dist.ReduceOp.MAX, group=group)
        most = int(count)
    if forward_pass is not None:
        forward_pass.most_tokens = most
    return TokenExchange(group, len(tokens), most, width)
