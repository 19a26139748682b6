# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Averaging the gradients of expert tables over replicas. These are models that DistributedDataParallel (DDP) trains, or
a process's columns of the tables if there are several memory groups (see `memory_group.py`).

DDP reduces the gradient of a parameter by a dense sum in the middle of the backward. Tables are on its ignore list
instead. They are broadcast once, and their gradients are averaged here, once for each optimizer step. This happens at
the end of the last micro-batch's backward, before clipping. An all-gather exchanges factors, or a dense sum whole
gradients if that moves fewer bytes. Every backend has these collectives.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from ..experts import expert_tables
from ..ops.factored_gradient import FactoredGradient, takes_factors
from ..ops.gradient_factors import Factors
from ..optim.embedding_rows import embeddings_in_factors
from .columns import decoder_of, is_split
from .releases import all_gather, call_after_backward, can_exchange_gradients, reduces_gradients, replicas_in_forward


# Elements of 16-bit gradients that are averaged at a time: 64 MB.
PIECE_ELEMENTS = 2**25


def leave_tables_out_of_ddp(model: nn.Module) -> list[str]:
    """
    Return the names of the parameters that DDP is to ignore, and average their gradients here from now on. These are
    trained expert tables, embeddings whose gradients come in factors, and tables that a memory group splits. They are
    only the last if nothing else is trained, as DDP refuses a model without parameters, or if torch lacks what the
    exchange needs.
    """
    weights = _weights_of_tables(model) + _weights_of_embeddings(model)
    split = {id(weight) for weight in weights if is_split(weight)}
    trained = {id(weight) for weight in weights if weight.requires_grad}
    others = any(each.requires_grad and id(each) not in trained for each in model.parameters())
    left_out = split | trained if others and can_exchange_gradients() else split
    if left_out:
        average_in_replicas(decoder_of(model, embeddings_in_factors(model)))
    return [name for name, parameter in model.named_parameters() if id(parameter) in left_out]


def _weights_of_tables(model):
    """The weights of tables, including those that an adapter put in place of a table."""
    inside = (each for table in expert_tables(model).values() for each in table.modules())
    return [each.weight for each in inside if isinstance(each, nn.Embedding)]


def _weights_of_embeddings(model):
    """The weights of embeddings with factored gradients, each once. Memory groups leave them to DDP or FSDP2."""
    if any(hasattr(module, "memory_group") for module in model.modules()):
        return []
    return list({id(each.weight): each.weight for each in embeddings_in_factors(model)}.values())


def average_in_replicas(decoder: nn.Module) -> None:
    """Average the gradients of tables in replicas at the end of each backward through a decoder that has them all."""
    if _broadcast_tables not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_broadcast_tables)
        decoder.register_forward_hook(_average_after_backward)


# A compiler that traces the decoder cannot trace the DDP module that contains it.
@torch.compiler.disable
@torch.no_grad()
def _broadcast_tables(decoder, args):
    """Broadcast, from DDP's first process, the tables that it leaves out, in its first forward."""
    replicas = replicas_in_forward()
    if replicas is None or hasattr(replicas, "_broadcast_expert_tables") or hasattr(decoder, "memory_group"):
        return
    for table in _tables_left_out(replicas, decoder):
        dist.broadcast(table, dist.get_global_rank(replicas.process_group, 0), replicas.process_group)
    replicas._broadcast_expert_tables = True


@torch.compiler.disable
def _average_after_backward(decoder, args, output):
    """Average gradients at the end of a backward through this forward, if other gradients are reduced in it."""
    replicas, memory_group = replicas_in_forward(), getattr(decoder, "memory_group", None)
    if (replicas, memory_group) == (None, None) or (replicas is not None and not replicas.require_backward_grad_sync):
        return
    tensors = [each for each in tree_leaves(output) if isinstance(each, torch.Tensor) and each.requires_grad]
    if not tensors:
        return
    if memory_group is not None:
        tables, group = _weights_of_tables(decoder), memory_group.replicas
    else:
        tables, group = _tables_left_out(replicas, decoder), replicas.process_group

    is_due = []  # not empty once the backward has reached one of the tensors

    def average():
        is_due.clear()
        # FSDP2 is asked in the backward, where it decides, and DDP in the forward.
        if replicas is not None or reduces_gradients(decoder):
            average_gradients(tables, group)

    def await_end(gradient):
        if not is_due:
            is_due.append(True)
            call_after_backward(average)

    for tensor in tensors if tables and group is not None else ():
        tensor.register_hook(await_end)


def _tables_left_out(replicas, decoder):
    """The tables of a decoder that DDP leaves to us, in the order of their names."""
    names = {id(parameter): name for name, parameter in replicas.module.named_parameters()}
    weights = _weights_of_tables(decoder) + _weights_of_embeddings(decoder)
    return [weight for weight in weights if names.get(id(weight)) in replicas.parameters_to_ignore]


@torch.no_grad()
def average_gradients(tables: Iterable[Any], group: dist.ProcessGroup) -> None:
    """
    Average the gradients of some tables over the processes of a group: `parameter.grad` is the same on all of them
    afterward, to the bit. A table without a gradient on a process counts as zero there. All processes pass the same
    tables in the same order.
    """
    tables = [table for table in tables if table.requires_grad]
    if not tables:
        return
    gradients = [_local_gradient(table) for table in tables]
    # For each process and table: the numbers of assignments and tokens of its factors, and the first table with the
    # same assignments; -1 for a dense gradient.
    own = torch.tensor(_sizes(gradients), device=gradients[0].device)
    sizes = _gather(own[None], group).tolist()
    sharing: dict[int, list[int]] = {}  # tables with the same assignments on all processes, which are sent once
    for place in range(len(tables)):
        firsts = {of_rank[place][2] for of_rank in sizes}
        sharing.setdefault(firsts.pop() if len(firsts) == 1 and min(firsts) >= 0 else place, []).append(place)
    for places in sharing.values():
        several = [gradients[place] for place in places]
        widths = [_widest_part(tables[place]) for place in places]
        num_assignments, num_tokens, _ = zip(*(of_rank[places[0]] for of_rank in sizes), strict=True)
        in_factors, assignments = _factors_are_smaller(several, widths, num_assignments, num_tokens), None
        for gradient in several:
            if in_factors:
                assignments = _average_factors(gradient, num_assignments, num_tokens, assignments, group)
            else:
                _average_rows(gradient, group)


def _local_gradient(table):
    """Return the gradient of this process's part of a table, to be changed in place. It is zero if there was none."""
    if table.grad is None:
        local = table.to_local() if isinstance(table, DTensor) else table
        zero = FactoredGradient(local, []) if takes_factors(table) else torch.zeros_like(local)
        if isinstance(table, DTensor):
            whole = {"shape": table.shape, "stride": table.stride()}
            zero = DTensor.from_local(zero, table.device_mesh, table.placements, run_check=False, **whole)
        table.grad = zero
    return table.grad.to_local() if isinstance(table.grad, DTensor) else table.grad


def _sizes(gradients):
    found, firsts = [], {}
    for place, gradient in enumerate(gradients):
        if not isinstance(gradient, FactoredGradient):
            found.append([-1, -1, -1])
        elif (factors := gradient.factors) is None:
            found.append([0, 0, place])
        else:
            first = firsts.setdefault(factors.assignments, place)
            found.append([factors.coefficients.numel(), len(factors.tokens), first])
    return found


def _widest_part(table):
    """The most columns that a process has of a table: all processes must decide by the same number."""
    return -(-table.shape[1] // table.device_mesh.size()) if isinstance(table, DTensor) else table.shape[1]


def _factors_are_smaller(gradients, widths, num_assignments, num_tokens):
    """
    Whether an all-gather of the factors of gradients with the same assignments moves fewer bytes than dense sums.

    In an all-gather, a process receives the factors of each other one, at least in float32 and padded to the largest
    number. It receives their assignments, a row and a token in int32, once for all gradients. In an all-reduce by n
    processes, it receives 2 (n − 1) / n of a gradient, in the gradient's dtype.
    """
    if min(num_assignments) < 0:
        return False
    factors, rows = max(num_assignments) * 2 * torch.int32.itemsize, 0
    for gradient, width in zip(gradients, widths, strict=True):
        itemsize = max(gradient.dtype.itemsize, torch.float32.itemsize)
        factors += (max(num_tokens) * width + max(num_assignments)) * itemsize
        rows += len(gradient) * width * gradient.dtype.itemsize
    return len(num_tokens) * factors < 2 * rows


def _average_rows(gradient, group):
    rows = gradient.to_rows() if isinstance(gradient, FactoredGradient) else gradient
    if rows.dtype.itemsize < torch.float32.itemsize:
        for piece in rows.split(max(PIECE_ELEMENTS // rows.shape[1], 1)):
            _average_in_float32(piece, group)
    else:
        dist.all_reduce(rows, group=group)
        rows /= dist.get_world_size(group)
    if isinstance(gradient, FactoredGradient):
        gradient.set_factors([Factors.of_rows(rows)])


def _average_in_float32(piece, group):
    """Average in place and round once. Each process sums a slice, and as many bytes move as in an all-reduce."""
    size = dist.get_world_size(group)
    parts = F.pad(piece.reshape(-1), (0, -piece.numel() % size))
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    mean = received.view(size, -1).mean(0, dtype=torch.float32)
    all_gather(parts, mean.to(parts.dtype), group=group)
    piece.copy_(parts[: piece.numel()].view_as(piece))


def _average_factors(gradient, num_assignments, num_tokens, assignments, group):
    """Average a gradient by its factors; return its assignments, which other tables of its pool share."""
    factors = gradient.factors or Factors.empty(gradient)
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    coefficients = _gather_parts(factors.coefficients.reshape(-1, 1).to(dtype), num_assignments, group)
    tokens = _gather_parts(factors.tokens.to(dtype), num_tokens, group)
    if assignments is None:
        own = factors.assignments
        parts = torch.stack([own.rows.reshape(-1).int(), own.sources], dim=1)
        assignments = own.of_processes(_gather_parts(parts, num_assignments, group), num_tokens)
    gradient.set_factors([Factors(torch.cat(coefficients) / len(num_tokens), torch.cat(tokens), assignments)])
    return assignments


def _gather_parts(part, sizes, group):
    """Gather tensors of different lengths, in the order of ranks: padded, as all-gathers need equal shapes."""
    padded = part.new_zeros(max(sizes), *part.shape[1:])
    padded[: len(part)] = part
    return [whole[:size] for whole, size in zip(_gather(padded[None], group), sizes, strict=True)]


def _gather(part, group):
    """`(1, ...)` of each process -> `(world_size, ...)`."""
    whole = part.new_empty(dist.get_world_size(group), *part.shape[1:])
    if whole.numel():
        dist.all_gather(list(whole.split(1)), part.contiguous(), group=group)
    return whole
