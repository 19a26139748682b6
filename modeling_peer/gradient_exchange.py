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
The gradients of expert tables in replicas of a model that DistributedDataParallel (DDP) trains.

DDP reduces the gradient of a parameter by a dense sum in the midst of the backward. Tables are on its ignore list
instead (`_ddp_params_and_buffers_to_ignore`): they are broadcast once, and their gradients averaged here, once for
each optimizer step, at the end of the last micro-batch's backward, before anything clips them. What is exchanged is
the factors, by an all-gather, or a dense sum where that moves fewer bytes; both are collectives that every backend
has.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from .expert_table import ExpertTable
from .factored_gradient import Entries, FactoredGradient, Factors, factors_of_rows, takes_factors
from .library_releases import call_after_backward, can_exchange_gradients, replicas_in_forward


# The attribute under which DDP notes that it has broadcast the tables.
BROADCAST = "_expert_tables_are_broadcast"


def names_of_tables(module: nn.Module) -> list[str]:
    """
    Names of the parameters that DDP is to leave alone: the expert tables that are trained. None if nothing else is
    trained, as DDP refuses a model without a parameter of its own, or if torch does not let us exchange gradients: DDP
    then reduces dense gradients of the tables.
    """
    if not can_exchange_gradients():
        return []
    tables = {
        id(each.weight): each.weight
        for each in module.modules()
        if isinstance(each, ExpertTable) and each.weight.requires_grad
    }
    names = [name for name, parameter in module.named_parameters() if id(parameter) in tables]
    others = any(each.requires_grad and id(each) not in tables for each in module.parameters())
    return names if others else []


class ReplicatedTables:
    """
    The tables of a model that DDP leaves to us, in a forward of the model.

    Args:
        tables (`list[nn.Parameter]`): In the same order on all processes.
        replicas (`DistributedDataParallel`): What runs the forward.
    """

    def __init__(self, tables: list[nn.Parameter], replicas: nn.parallel.DistributedDataParallel):
        self.tables = tables
        self.replicas = replicas

    def average_after_backward(self, output: torch.Tensor) -> None:
        """
        Have the gradients averaged when a backward through `output`, the output of the model, ends. Does nothing
        where DDP does not reduce gradients either, in `no_sync`.
        """
        if not self.replicas.require_backward_grad_sync or not output.requires_grad:
            return

        def at_the_end(gradient):
            call_after_backward(lambda: average_gradients(self.tables, self.replicas.process_group))

        output.register_hook(at_the_end)


def replicated_tables(module: nn.Module) -> ReplicatedTables | None:
    """
    Find the tables that DDP leaves to us, at the start of a forward of a model. In the first one they are broadcast.

    Args:
        module (`nn.Module`): The model that runs, or a part of it with all its tables.

    Returns:
        [`ReplicatedTables`] or `None`: `None` outside of DDP's forward.
    """
    return None if replicas_in_forward() is None else _replicated_tables(module)


# A compiler that traces the model does not get through the module that contains it.
@torch.compiler.disable
def _replicated_tables(module):
    replicas = replicas_in_forward()
    tables = _tables_left_out(replicas, module)
    if tables and not getattr(replicas, BROADCAST, False):
        _broadcast(tables, replicas.process_group)
        setattr(replicas, BROADCAST, True)
    return ReplicatedTables(tables, replicas) if tables else None


def _tables_left_out(replicas, module):
    """The tables of a module that DDP leaves to us, in the order of their names."""
    left_out = {id(parameter): name for name, parameter in replicas.module.named_parameters()}
    weights = [each.weight for each in module.modules() if isinstance(each, ExpertTable)]
    named = {left_out.get(id(weight)): weight for weight in weights}
    return [weight for name, weight in named.items() if name in replicas.parameters_to_ignore]


@torch.no_grad()
def _broadcast(tables, group):
    for table in tables:
        dist.broadcast(table, dist.get_global_rank(group, 0), group)


@torch.no_grad()
def average_gradients(tables: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """
    Average the gradients of some tables over the processes of a group: `parameter.grad` is the same on all of them
    afterwards, to the bit. A table without a gradient on a process counts as zero there.

    Args:
        tables (`Iterable[nn.Parameter]`): The same tables, in the same order, on all processes.
        group (`dist.ProcessGroup`)
    """
    tables = [table for table in tables if table.requires_grad]
    for table in tables:
        if table.grad is None:
            table.grad = FactoredGradient(table, []) if takes_factors(table) else torch.zeros_like(table)
    own = [_sizes(table, tables[:place]) for place, table in enumerate(tables)]
    every = torch.tensor(own, dtype=torch.int64, device=tables[0].device if tables else None)
    sizes = _gather(every[None], group).tolist() if tables else []
    gathered: dict[int, Entries] = {}
    for place, table in enumerate(tables):
        of_ranks = [_Sizes(*rank[place]) for rank in sizes]
        if not _factors_are_smaller(table, of_ranks):
            _average_rows(table, group)
            continue
        first = of_ranks[0].first_with_entries
        shared = gathered.get(first) if all(each.first_with_entries == first for each in of_ranks) else None
        gathered[place] = _average_factors(table, of_ranks, shared, group)


class _Sizes:
    """
    What the processes tell each other of a gradient: numbers of its entries and tokens, and the first table with the
    same entries.
    """

    def __init__(self, num_entries: int, num_tokens: int, first_with_entries: int):
        self.num_entries, self.num_tokens, self.first_with_entries = num_entries, num_tokens, first_with_entries


def _sizes(table, earlier):
    if not isinstance(table.grad, FactoredGradient):
        return [-1, -1, -1]
    factors = table.grad.factors
    if factors is None:
        return [0, 0, len(earlier)]
    same = [
        place
        for place, each in enumerate(earlier)
        if isinstance(each.grad, FactoredGradient)
        and each.grad.factors is not None
        and each.grad.factors.entries is factors.entries
    ]
    return [factors.coefficients.numel(), len(factors.tokens), same[0] if same else len(earlier)]


def _factors_are_smaller(table, of_ranks):
    """Whether an all-gather of factors moves fewer bytes than a dense sum, which moves the table about twice."""
    if any(each.num_entries < 0 for each in of_ranks):
        return False
    entries, tokens = (max(getattr(each, name) for each in of_ranks) for name in ("num_entries", "num_tokens"))
    width, element = table.shape[1], max(table.dtype.itemsize, torch.float32.itemsize)
    factors = len(of_ranks) * (tokens * width * element + entries * (element + 2 * torch.int32.itemsize))
    return factors < 2 * table.numel() * element


def _average_rows(table, group):
    gradient = table.grad
    rows = gradient.to_rows() if isinstance(gradient, FactoredGradient) else gradient
    dist.all_reduce(rows, group=group)
    rows /= dist.get_world_size(group)
    if isinstance(gradient, FactoredGradient):
        gradient.set_factors([factors_of_rows(rows)])


def _average_factors(table, of_ranks, entries, group):
    """Average a gradient by its factors; return its entries, which other tables of its pool share."""
    gradient = table.grad
    factors = gradient.factors
    if factors is None:
        factors = Factors.empty(table)
    num_entries, num_tokens = [each.num_entries for each in of_ranks], [each.num_tokens for each in of_ranks]
    dtype = torch.promote_types(table.dtype, torch.float32)
    coefficients = _gather_parts(factors.coefficients.reshape(-1, 1).to(dtype), num_entries, group)
    tokens = _gather_parts(factors.tokens.to(dtype), num_tokens, group)
    if entries is None:
        places = torch.stack([factors.entries.indices.reshape(-1).int(), factors.entries.sources], dim=1)
        entries = Entries.of_parts(_gather_parts(places, num_entries, group), num_tokens, factors.entries)
    mean = torch.cat(coefficients) / len(of_ranks)
    gradient.set_factors([Factors(mean, torch.cat(tokens), entries)])
    return entries


def _gather_parts(part, sizes, group):
    """Tensors of different lengths of all processes, in the order of their ranks: padded, as all-gathers are even."""
    most = max(sizes)
    padded = part.new_zeros(most, *part.shape[1:])
    padded[: len(part)] = part
    return [whole[:size] for whole, size in zip(_gather(padded[None], group), sizes, strict=True)]


def _gather(part, group):
    """`(1, ...)` of each process -> `(world_size, ...)`."""
    whole = part.new_empty(dist.get_world_size(group), *part.shape[1:])
    if whole.numel():
        dist.all_gather(list(whole.split(1)), part.contiguous(), group=group)
    return whole
