# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Expert tables that are split by columns, and the experts that run on them. Each process holds some columns of every row
and their optimizer state. Processes of memory groups have different tokens, those of tensor parallelism the same.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel
from transformers.utils.generic import maybe_autocast

from ..experts import expert_tables
from ..ops.experts import run_expert_pool
from ..ops.factored_gradient import let_follow
from ..ops.kernels import KERNELS, resolve_kernels
from .releases import TensorParallelLayer, require_parallel_styles
from .token_exchange import ReplicatedExchange, TokenExchange


class ExpertColumns(TensorParallelLayer):
    """The parallel style of tables that are split by columns, see [`run_on_columns`]."""

    def validate_param(self, module: Any, param: str, mesh: DeviceMesh, parameter_name: str | None = None) -> None:
        require_parallel_styles()
        width, size = module.weight.shape[1], mesh.size()
        if -(-width // size) * (size - 1) >= width:
            raise ValueError(f"{parameter_name} has {width} columns: split over {size} processes, the last has none.")

    def shard_param(self, module: Any, param: str, mesh: DeviceMesh) -> None:
        weight = module._parameters[param]
        columns = distribute_tensor(weight, mesh, [Shard(1)], src_data_rank=None)
        module._parameters[param] = nn.Parameter(columns, requires_grad=weight.requires_grad)

    def install_forward(self, module: Any, mesh: DeviceMesh) -> Any:
        return module


class TensorParallelGroup:
    """The processes that hold the columns of tables and run the same tokens."""

    def __init__(self, columns: dist.ProcessGroup):
        self.columns = columns

    def exchange(self, tokens: torch.Tensor, width: int) -> ReplicatedExchange:
        """Return the exchange of the tokens of the pool that runs now."""
        return ReplicatedExchange(self.columns, width)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TensorParallelGroup":
        return self  # a copy of a model uses the same process group, which torch cannot copy


class MemoryGroup(TensorParallelGroup):
    """
    The processes that together hold whole expert tables and have different tokens, as one of them sees them. `columns`
    are these processes, in the order of their columns. `replicas` are the processes of all groups that own the same
    columns as this one, or `None` if there is one group.
    """

    def __init__(self, columns: dist.ProcessGroup, replicas: dist.ProcessGroup | None):
        super().__init__(columns)
        self.replicas = replicas
        self._begun: TokenExchange | None = None

    # A compiler knows neither the collectives nor the numbers of tokens of other processes.
    @torch.compiler.disable
    def begin(self, reads_tokens: bool, router: nn.Module, arguments: tuple) -> None:
        """
        Begin the exchange of the pool that runs next, as a forward pre-hook of its router: hidden states do not depend
        on retrieval. In the first layer of a forward pass the processes agree on the largest number of tokens.
        """
        hidden_states, _, forward_pass = (*arguments, None, None)[:3]
        tokens = hidden_states.detach().flatten(0, -2)
        most_tokens = getattr(forward_pass, "most_tokens", None) or self._most_tokens(tokens)
        if forward_pass is not None:
            forward_pass.most_tokens = most_tokens  # all layers of a forward pass have equally many
        self._begun = TokenExchange(self.columns, tokens.shape[1], len(tokens), most_tokens)
        if reads_tokens:
            self._begun.start_to_columns(tokens)

    def exchange(self, tokens: torch.Tensor, width: int) -> TokenExchange:
        begun, self._begun = self._begun, None
        return begun or TokenExchange(self.columns, width, len(tokens), self._most_tokens(tokens))

    def _most_tokens(self, tokens):
        count = torch.tensor(len(tokens), device=tokens.device)
        dist.all_reduce(count, dist.ReduceOp.MAX, group=self.columns)
        return int(count)


def run_on_columns(model: nn.Module, group: TensorParallelGroup) -> None:
    """
    Let the pools and PKM layers of a model run on the columns of this process.

    Raises:
        `ValueError`: if a table is quantized, or an adapter is in its place.
    """
    for name, table in expert_tables(model).items():
        if type(table) is not nn.Embedding:
            raise ValueError(f"Only plain tables are split over processes, and {name} is a {type(table).__name__}.")
    # Not found by class: code that a checkpoint carries has classes of its own.
    for module in model.modules():
        names = getattr(type(module), "expert_table_names", ())
        if names:
            setattr(module, "sum_values" if "values" in names else "forward", functools.partial(_run, module, group))
        if isinstance(group, MemoryGroup) and hasattr(getattr(module, "router", None), "sub_keys"):
            for router in (module.router, *getattr(module, "added_routers", ())):
                router.register_forward_pre_hook(functools.partial(group.begin, "values" not in names))


@torch.compiler.disable
def _run(module, group, hidden_states, rows, weights):
    """[`ExpertPool.forward`] or [`PkmFeedForward.sum_values`] on the columns of this process."""
    tables = [getattr(module, name, None) for name in ("up_proj", "gate_proj")]
    tables.append(module.values if hasattr(module, "values") else module.down_proj)
    columns = [None if table is None else _own_columns(table) for table in tables]
    # The eager algorithm is for one process: autograd does not see what others do.
    name = "torch" if module.config.expert_kernels == "eager" else module.config.expert_kernels
    kernels = resolve_kernels(name if name in KERNELS else None, columns[-1])
    rows, act_fn = (rows - getattr(module, "first_expert", 0)).int(), getattr(module, "act_fn", None)
    exchange = group.exchange(hidden_states, tables[-1].embedding_dim)
    with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
        return run_expert_pool(hidden_states, rows, weights, *columns, act_fn, kernels, exchange)


def _own_columns(table):
    if type(table) is not nn.Embedding or table._forward_hooks or table._forward_pre_hooks or "forward" in vars(table):
        raise TypeError("Tables that are split over processes are read, not called: adapters and hooks do not work.")
    local = table.weight.to_local()
    let_follow(table.weight, local)
    return local


def is_split(weight: torch.Tensor, dim: str = "ep") -> bool:
    """Whether a table is split over a dimension of a mesh, by default over a memory group."""
    return isinstance(weight, DTensor) and dim in (weight.device_mesh.mesh_dim_names or ())


def decoder_of(model: nn.Module, others: Iterable[nn.Module] = ()) -> nn.Module:
    """
    Return the innermost model in a model that has all its expert tables and `others`. Its hooks see their forward
    passes.
    """
    tables = {*expert_tables(model).values(), *others}
    holders = [
        each for each in model.modules() if isinstance(each, PreTrainedModel) and tables.issubset(each.modules())
    ]
    return holders[-1] if holders else model


@contextlib.contextmanager
def tables_left_out(model: nn.Module) -> Iterator[None]:
    """
    Hide the tables that a memory group splits from the code in the `with` block. FSDP2 would gather them, as
    Transformers does not tell it which parameters to ignore.
    """
    tables = [table for table in expert_tables(model).values() if is_split(table.weight)]
    weights = [table._parameters.pop("weight") for table in tables]
    try:
        yield
    finally:
        for table, weight in zip(tables, weights, strict=True):
            table._parameters["weight"] = weight
