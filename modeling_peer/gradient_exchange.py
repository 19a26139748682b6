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
The gradients of expert tables in replicas: of a model that DistributedDataParallel (DDP) trains, or of a process's
columns of the tables where there are several memory groups (see `memory_group.py`).

DDP reduces the gradient of a parameter by a dense sum in the midst of the backward. Tables are on its ignore list
instead (`_ddp_params_and_buffers_to_ignore`): they are broadcast once, and their gradients averaged here, once for
each optimizer step, at the end of the last micro-batch's backward, before anything clips them. What is exchanged is
the factors, by an all-gather, or a dense sum where that moves fewer bytes; both are collectives that every backend
has. A memory group's columns are in no replica of anything else, and are averaged in the same way.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn

from .expert_table import ExpertTable
from .factored_gradient import FactoredGradient, takes_factors
from .gradient_factors import Entries, Factors, factors_of_rows
from .library_releases import (
    call_after_backward,
    can_exchange_gradients,
    reduces_gradients,
    replicas_in_forward,
)
from .memory_group import is_split


if dist.is_available():
    from torch.distributed.tensor import DTensor

# The attribute under which DDP notes that it has broadcast the tables.
BROADCAST = "_expert_tables_are_broadcast"


def names_of_tables(module: nn.Module) -> list[str]:
    """
    Names of the parameters that DDP is to leave alone: the expert tables that are trained, and those that a memory
    group splits. No trained ones if nothing else is trained, as DDP refuses a model without a parameter of its own, or
    if torch does not let us exchange gradients: DDP then reduces dense gradients of the tables.
    """
    weights = [each.weight for each in module.modules() if isinstance(each, ExpertTable)]
    split = {id(weight) for weight in weights if is_split(weight)}
    trained = {id(weight) for weight in weights if weight.requires_grad}
    others = any(each.requires_grad and id(each) not in trained for each in module.parameters())
    left_out = split | trained if others and can_exchange_gradients() else split
    return [name for name, parameter in module.named_parameters() if id(parameter) in left_out]


class ReplicatedTables:
    """
    The tables of a model whose gradients are averaged here, in a forward of the model.

    Args:
        tables (`list[nn.Parameter]`): In the same order on all processes.
        group (`dist.ProcessGroup`): The processes that have them, or the same columns of them.
        are_reduced (`Callable`): Whether other gradients are reduced in a backward.
        in_backward (`bool`, *optional*, defaults to `False`):
            Whether to ask that in the backward, as FSDP2 does, and not in the forward, as DDP does.
    """

    def __init__(
        self,
        tables: list[nn.Parameter],
        group: dist.ProcessGroup,
        are_reduced: Callable[[], bool],
        in_backward: bool = False,
    ):
        self.tables = tables
        self.group = group
        self.are_reduced = are_reduced
        self.in_backward = in_backward

    def average_after_backward(self, output: torch.Tensor) -> None:
        """
        Have the gradients averaged when a backward through `output`, the output of the model, ends. Does nothing
        where other gradients are not reduced either, as in DDP's `no_sync`.
        """
        if not output.requires_grad or not (self.in_backward or self.are_reduced()):
            return

        def average():
            if not self.in_backward or self.are_reduced():
                average_gradients(self.tables, self.group)

        def at_the_end(gradient):
            call_after_backward(average)

        output.register_hook(at_the_end)


def replicated_tables(module: nn.Module) -> ReplicatedTables | None:
    """
    Find the tables that DDP leaves to us, at the start of a forward of a model, in the first of which they are
    broadcast, or those of which other memory groups have the same columns.

    Args:
        module (`nn.Module`): The model that runs, or a part of it with all its tables.

    Returns:
        [`ReplicatedTables`] or `None`: `None` outside of DDP's forward, and if there is one memory group.
    """
    group = getattr(module, "memory_group", None)
    if group is not None:
        return None if group.replicas is None else _replicated_columns(module, group)
    return None if replicas_in_forward() is None else _replicated_tables(module)


@torch.compiler.disable
def _replicated_columns(module, group):
    tables = [each.weight for each in module.modules() if isinstance(each, ExpertTable)]
    replicas = replicas_in_forward()
    if replicas is None:
        return ReplicatedTables(tables, group.replicas, lambda: reduces_gradients(module), in_backward=True)
    return ReplicatedTables(tables, group.replicas, lambda: replicas.require_backward_grad_sync)


# A compiler that traces the model does not get through the module that contains it.
@torch.compiler.disable
def _replicated_tables(module):
    replicas = replicas_in_forward()
    tables = _tables_left_out(replicas, module)
    if tables and not getattr(replicas, BROADCAST, False):
        _broadcast(tables, replicas.process_group)
        setattr(replicas, BROADCAST, True)
    if not tables:
        return None
    return ReplicatedTables(tables, replicas.process_group, lambda: replicas.require_backward_grad_sync)


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
    gradients = [_local_gradient(table) for table in tables]
    widths = [_width_of_the_widest_part(table) for table in tables]
    own = [_sizes(gradient, gradients[:place]) for place, gradient in enumerate(gradients)]
    every = torch.tensor(own, dtype=torch.int64, device=gradients[0].device if gradients else None)
    sizes = _gather(every[None], group).tolist() if gradients else []
    for places in _places_that_share_entries(sizes):
        sharing = [gradients[place] for place in places]
        of_ranks = [_Sizes(*rank[places[0]]) for rank in sizes]
        if not _factors_are_smaller(sharing, [widths[place] for place in places], of_ranks):
            for gradient in sharing:
                _average_rows(gradient, group)
            continue
        entries = None
        for gradient in sharing:
            entries = _average_factors(gradient, of_ranks, entries, group)


def _width_of_the_widest_part(table):
    """
    How many columns of a table a process of its group has at most. The processes of a group decide by it, each with
    its replicas, and have to decide alike: row by row, their gradients are one.
    """
    return -(-table.shape[1] // table.device_mesh.size()) if isinstance(table, DTensor) else table.shape[1]


def _local_gradient(table):
    """The gradient of what this process holds of a table, to be changed in place. Zero if there was none."""
    if table.grad is None:
        local = table.to_local() if isinstance(table, DTensor) else table
        zero = FactoredGradient(local, []) if takes_factors(table) else torch.zeros_like(local)
        if isinstance(table, DTensor):
            whole = {"shape": table.shape, "stride": table.stride()}
            zero = DTensor.from_local(zero, table.device_mesh, table.placements, run_check=False, **whole)
        table.grad = zero
    return table.grad.to_local() if isinstance(table.grad, DTensor) else table.grad


class _Sizes:
    """
    What the processes tell each other of a gradient: numbers of its entries and tokens, and the first table with the
    same entries.
    """

    def __init__(self, num_entries: int, num_tokens: int, first_with_entries: int):
        self.num_entries, self.num_tokens, self.first_with_entries = num_entries, num_tokens, first_with_entries


def _sizes(gradient, earlier):
    if not isinstance(gradient, FactoredGradient):
        return [-1, -1, -1]
    factors = gradient.factors
    if factors is None:
        return [0, 0, len(earlier)]
    same = [
        place
        for place, each in enumerate(earlier)
        if isinstance(each, FactoredGradient) and each.factors is not None and each.factors.entries is factors.entries
    ]
    return [factors.coefficients.numel(), len(factors.tokens), same[0] if same else len(earlier)]


def _places_that_share_entries(sizes):
    """The places of all tables, those together that have the same entries on every process, of which one is sent."""
    sharing: dict[int, list[int]] = {}
    for place in range(len(sizes[0]) if sizes else 0):
        firsts = {_Sizes(*rank[place]).first_with_entries for rank in sizes}
        first = firsts.pop() if len(firsts) == 1 else -1
        sharing.setdefault(place if first < 0 else first, []).append(place)
    return sharing.values()


def _factors_are_smaller(gradients, widths, of_ranks):
    """
    Whether an all-gather of the factors of gradients with the same entries moves fewer bytes than dense sums of them.

    A process receives the factors of each other one, in at least float32 and padded to the most, and with them once
    for all gradients the entries, a row and a token in int32. Of an all-reduce by n processes it receives
    2 (n − 1) / n of a gradient, in the gradient's own dtype.
    """
    if any(each.num_entries < 0 for each in of_ranks):
        return False
    entries, tokens = (max(getattr(each, name) for each in of_ranks) for name in ("num_entries", "num_tokens"))
    factors, rows = entries * 2 * torch.int32.itemsize, 0
    for gradient, width in zip(gradients, widths, strict=True):
        factors += (tokens * width + entries) * max(gradient.dtype.itemsize, torch.float32.itemsize)
        rows += len(gradient) * width * gradient.dtype.itemsize
    return len(of_ranks) * factors < 2 * rows


def _average_rows(gradient, group):
    rows = gradient.to_rows() if isinstance(gradient, FactoredGradient) else gradient
    dist.all_reduce(rows, group=group)
    rows /= dist.get_world_size(group)
    if isinstance(gradient, FactoredGradient):
        gradient.set_factors([factors_of_rows(rows)])


def _average_factors(gradient, of_ranks, entries, group):
    """Average a gradient by its factors; return its entries, which other tables of its pool share."""
    factors = gradient.factors
    if factors is None:
        factors = Factors.empty(gradient)
    num_entries, num_tokens = [each.num_entries for each in of_ranks], [each.num_tokens for each in of_ranks]
    dtype = torch.promote_types(gradient.dtype, torch.float32)
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
