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
What training on many GPUs moves and keeps: bytes received, seconds and memory for each rank, counted from a
configuration alone.

```python
>>> from modeling_peer import PeerConfig, communication_costs

>>> print(communication_costs(PeerConfig(), num_ranks=64, tokens_per_rank=8192))
```
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..configuration_peer import PeerConfig
from ..expert_generations import first_generation, generations_of, shared_generations
from ..factored_gradient import MOST_FACTORS
from ..feed_forward import ALL_FEED_FORWARDS
from ..feed_forward_dense import DenseFeedForward
from ..feed_forward_moe import MoeFeedForward
from ..feed_forward_peer import PeerFeedForward
from ..feed_forward_pkm import PkmFeedForward
from .arguments import check_integer
from .collectives import GROUP_COLLECTIVES, INDEX_BYTES, Ranks, Received, joined, memory_group_bytes
from .costs import dtype_of, model_costs


# Bytes per second that a rank receives: NVLink of the fourth generation, and InfiniBand NDR with a port for each GPU.
NVLINK = 450e9
INFINIBAND = 50e9


@dataclass(frozen=True)
class Kept:
    """
    Bytes that a rank keeps from step to step, without activations.

    Args:
        parameters (`int`): Parameters.
        gradients (`int`): Gradients at the end of the backward, as the optimizer gets them.
        optimizer (`int`): State of [`RowAdamW`].
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class DesignCosts:
    """
    Costs of one way of training on many GPUs, for each rank.

    Args:
        received (`tuple[Received]`): Bytes received in a step, by collective.
        tables (`Kept`): What is kept of the expert tables.
        rest (`Kept`): What is kept of all other parameters.
        node_bandwidth, network_bandwidth (`float`): Bytes per second of the links.
    """

    received: tuple[Received, ...]
    tables: Kept
    rest: Kept
    node_bandwidth: float
    network_bandwidth: float

    @property
    def node_bytes(self) -> int:
        """Bytes received in a step over the links within a node."""
        return sum(each.node_bytes for each in self.received)

    @property
    def network_bytes(self) -> int:
        """Bytes received in a step over the network between nodes."""
        return sum(each.network_bytes for each in self.received)

    @property
    def received_bytes(self) -> int:
        """All bytes received in a step."""
        return self.node_bytes + self.network_bytes

    @property
    def seconds(self) -> float:
        """
        Seconds that a step's collectives take one after the other at the link speeds: a lower bound, as latency is not
        counted, and an upper bound of what a step waits for, as nothing is overlapped with computation.
        """
        return sum(each.seconds(self.node_bandwidth, self.network_bandwidth) for each in self.received)

    @property
    def kept_bytes(self) -> int:
        """All bytes that are kept."""
        return self.tables.total + self.rest.total

    def __str__(self) -> str:
        width = max(map(len, ["received per rank and step", *(each.name for each in self.received)]))
        lines = [f"{'received per rank and step':<{width}}  {'':<14}  {'GB in node':>12}  {'GB by network':>13}"]
        for each in self.received:
            node, network = each.node_bytes / 1e9, each.network_bytes / 1e9
            lines.append(f"{each.name:<{width}}  {each.operation:<14}  {node:>12.3f}  {network:>13.3f}")
        return "\n".join(lines)


@dataclass(frozen=True)
class CommunicationCosts:
    """
    Costs of training a model on many GPUs, made by [`communication_costs`]. Printed, they are a table.

    Args:
        num_ranks (`int`): Number of ranks.
        group_size (`int`): Ranks of a memory group, and of a tensor-parallel group.
        tokens_per_rank (`int`): Tokens of a rank in a micro-batch.
        micro_batches (`int`): Micro-batches of a step.
        dtype (`torch.dtype`): Data type of parameters, gradients and hidden states.
        designs (`dict[str, DesignCosts]`): Costs of `"ddp"`, `"ddp_factors"`, `"fsdp2"`, `"tensor_parallel"`,
            `"memory_group"` and `"memory_group_fsdp2"`.
    """

    num_ranks: int
    group_size: int
    tokens_per_rank: int
    micro_batches: int
    dtype: torch.dtype
    designs: dict[str, DesignCosts]

    def __getitem__(self, design: str) -> DesignCosts:
        return self.designs[design]

    def __str__(self) -> str:
        heading = f"per rank and step of {self.num_ranks:,} ranks"
        width = max(map(len, [heading, *self.designs]))
        names = ("GB in node", "GB by network", "seconds", "GB kept, tables", "GB kept, rest")
        lines = [f"{heading:<{width}}  " + "  ".join(f"{name:>15}" for name in names)]
        for name, costs in self.designs.items():
            sizes = [size / 1e9 for size in (costs.node_bytes, costs.network_bytes)]
            figures = [*sizes, costs.seconds, costs.tables.total / 1e9, costs.rest.total / 1e9]
            lines.append(f"{name:<{width}}  " + "  ".join(f"{figure:>15,.3f}" for figure in figures))
        lines += [
            "",
            f"{self.micro_batches:,} micro-batches of {self.tokens_per_rank:,} tokens per rank, groups of "
            f"{self.group_size:,}, in {str(self.dtype).split('.')[-1]}",
        ]
        return "\n".join(lines)


def communication_costs(
    config: PeerConfig,
    num_ranks: int,
    group_size: int | None = None,
    tokens_per_rank: int = 8192,
    micro_batches: int = 1,
    dtype: torch.dtype | None = None,
    ranks_per_node: int = 8,
    node_bandwidth: float = NVLINK,
    network_bandwidth: float = INFINIBAND,
) -> CommunicationCosts:
    """
    Count what each way of training a [`PeerForCausalLM`] on many GPUs moves and keeps, for each rank.

    | design | expert tables | rest |
    |---|---|---|
    | `"ddp"` | replicated, gradients summed densely | DDP |
    | `"ddp_factors"` | replicated, gradients exchanged in factors | DDP |
    | `"fsdp2"` | FSDP2: gathered before use and again in backward | FSDP2 |
    | `"tensor_parallel"` | columns split over the ranks of a group | split as its plan says |
    | `"memory_group"` | columns split over the ranks of a group, each with tokens of its own | DDP |
    | `"memory_group_fsdp2"` | the same | FSDP2 |

    Every rank runs `micro_batches` of `tokens_per_rank` tokens; a tensor-parallel group runs those of all its ranks.
    Groups lie within a node. The replicas of a table, or of a rank's columns, exchange factors of gradients wherever
    [`gradient_exchange`] would, and otherwise a dense sum; DDP, and that exchange, run once in a step. FSDP2 gathers
    and reduces in every micro-batch, over all ranks.

    Counted are bytes that a rank *receives*, not its own part: of an all-gather of n equal parts n − 1, of a
    reduce-scatter n − 1 partial sums of its part, of an all-reduce both. Of a collective over several nodes, what
    another node has to give comes over the network once for each node, spread over its ranks, and the rest over the
    links within the node. Not counted are latency, single elements (numbers of tokens, norms), the statistics of query
    BatchNorm, and what activation checkpointing repeats.

    The state of the optimizer is that of [`RowAdamW`], with all second moments.

    Args:
        config (`PeerConfig`)
        num_ranks (`int`): Number of ranks, one GPU each. More than `ranks_per_node` have to fill whole nodes.
        group_size (`int`, *optional*):
            Ranks of a memory group, and of a tensor-parallel group. Divides `config.hidden_size` and the ranks of a
            node. Defaults to all ranks of a node.
        tokens_per_rank (`int`, *optional*, defaults to 8192):
            Tokens of a rank in a micro-batch; of the rank with most of them, as a group pads to these.
        micro_batches (`int`, *optional*, defaults to 1): Micro-batches of a step (gradient accumulation).
        dtype (`torch.dtype`, *optional*):
            Data type of parameters, gradients and hidden states. Defaults to `config.dtype`, float32 if that is not
            set.
        ranks_per_node (`int`, *optional*, defaults to 8): Ranks of a node.
        node_bandwidth (`float`, *optional*, defaults to 450e9):
            Bytes per second that a rank receives from ranks of its node: NVLink of an H100.
        network_bandwidth (`float`, *optional*, defaults to 50e9):
            Bytes per second that a rank receives from other nodes: InfiniBand NDR, 400 Gb/s for each GPU.

    Returns:
        `CommunicationCosts`.

    Raises:
        `ValueError`: if `config` is not a [`PeerConfig`], a layer's variant is not registered or of unknown cost, or
            an argument is out of its range.
    """
    model = model_costs(config)  # first, as it checks the configuration
    dtype = dtype_of(config) if dtype is None else dtype
    for name, value in (
        ("num_ranks", num_ranks),
        ("tokens_per_rank", tokens_per_rank),
        ("micro_batches", micro_batches),
        ("ranks_per_node", ranks_per_node),
    ):
        check_integer(name, value)
    _check_dtype(dtype)
    _check_bandwidth("node_bandwidth", node_bandwidth)
    _check_bandwidth("network_bandwidth", network_bandwidth)
    if num_ranks > ranks_per_node and num_ranks % ranks_per_node:
        raise ValueError(
            f"`num_ranks` must be at most `ranks_per_node` = {ranks_per_node} or a multiple of it, got {num_ranks}."
        )
    ranks_of_node = min(num_ranks, ranks_per_node)
    group_size = ranks_of_node if group_size is None else group_size
    check_integer("group_size", group_size)
    for name, whole in (("the ranks of a node", ranks_of_node), ("`hidden_size`", config.hidden_size)):
        if whole % group_size:
            raise ValueError(f"`group_size` must divide {name}, {whole}, got {group_size}.")

    ranks = num_ranks, ranks_of_node, group_size
    run = _Run(config, model, ranks, tokens_per_rank, micro_batches, dtype)
    costs = {
        "ddp": run.ddp(),
        "ddp_factors": run.ddp_factors(),
        "fsdp2": run.fsdp2(),
        "tensor_parallel": run.tensor_parallel(),
        "memory_group": run.memory_group(),
        "memory_group_fsdp2": run.memory_group_fsdp2(),
    }
    designs = {}
    for name, (received, tables, rest) in costs.items():
        moved = tuple(each for each in received if each.num_bytes)
        designs[name] = DesignCosts(moved, tables, rest, node_bandwidth, network_bandwidth)
    return CommunicationCosts(num_ranks, group_size, tokens_per_rank, micro_batches, dtype, designs)


def _check_dtype(dtype: Any) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"`dtype` must be a floating-point `torch.dtype`, got {dtype!r}.")


def _check_bandwidth(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be a positive number of bytes per second, got {value!r}.")


@dataclass(frozen=True)
class _Pool:
    """Tables with the same rows, and the number of active experts of each layer that retrieves from them."""

    num_rows: int
    num_up_projections: int
    num_active: tuple[int, ...]

    @property
    def num_tables(self) -> int:
        return self.num_up_projections + 1


def _pools(config: PeerConfig) -> Iterator[_Pool]:
    num_up = 2 if config.gated_experts else 1
    variants = [ALL_FEED_FORWARDS[name] for name in config.feed_forward_types]
    shares = config.share_experts_across_layers
    for layer_idx, variant in enumerate(variants):
        if variant is PkmFeedForward:
            generation = first_generation(config)
            yield _Pool(generation.num_experts, 0, (_num_active(generation),))
        elif variant is PeerFeedForward and not shares:
            for generation in generations_of(config, layer_idx):
                yield _Pool(generation.num_experts, num_up, (_num_active(generation),))
    num_layers = variants.count(PeerFeedForward)
    if shares and num_layers:
        for generation in shared_generations(config):
            yield _Pool(generation.num_experts, num_up, (_num_active(generation),) * num_layers)


def _num_active(generation):
    return generation.num_heads * generation.num_experts_per_head


class _Run:
    """A training run; each design's costs are what is received, and what is kept of the tables and of the rest."""

    def __init__(self, config, model, ranks, tokens_per_rank, micro_batches, dtype):
        num_ranks, ranks_of_node, group_size = ranks
        self.config, self.model = config, model
        self.tokens_per_rank, self.micro_batches = tokens_per_rank, micro_batches
        self.num_tokens = tokens_per_rank * micro_batches
        self.width, self.group_size = config.hidden_size, group_size
        self.element = dtype.itemsize
        self.float_element = max(dtype.itemsize, torch.float32.itemsize)  # of what is summed, and of moments
        self.pools = list(_pools(config))
        self.num_table_rows = sum(pool.num_rows * pool.num_tables for pool in self.pools)
        self.num_table_elements = self.num_table_rows * self.width
        self.num_rest = model.parameters - self.num_table_elements
        num_nodes = num_ranks // ranks_of_node
        self.every = Ranks(num_nodes, ranks_of_node)
        self.group = Ranks(1, group_size)
        self.replicas = Ranks(num_nodes, ranks_of_node // group_size)  # those with the same columns

    def ddp(self):
        received = [
            self.every.all_reduce("gradients of tables", self.num_table_elements, self.element),
            self.every.all_reduce("gradients of the rest", self.num_rest, self.element),
        ]
        return received, self._tables(self.num_table_elements * self.element), self._rest()

    def ddp_factors(self):
        received, gradients = self._exchange(self.every, 1)
        received.append(self.every.all_reduce("gradients of the rest", self.num_rest, self.element))
        return received, self._tables(gradients), self._rest()

    def fsdp2(self):
        num_ranks = self.every.total
        received = self._fsdp2("tables", self.num_table_elements)
        received += self._fsdp2("the rest", self.num_rest)
        gradients = -(-self.num_table_elements // num_ranks) * self.element
        return (
            received,
            self._tables(gradients, num_ranks, -(-self.num_table_rows // num_ranks)),
            self._rest(num_ranks),
        )

    def tensor_parallel(self):
        num_split = self._num_split()
        received, gradients = self._exchange(self.replicas, self.group_size)
        own = num_split // self.group_size + self.num_rest - num_split
        received += [
            self.replicas.all_reduce("gradients of the rest", own, self.element),
            *self._activations_of_tensor_parallelism(),
        ]
        return received, self._tables(gradients, self.group_size), self._kept_of_rest(own)

    def memory_group(self):
        received, gradients = self._exchange(self.replicas, self.group_size)
        received += [
            *self._activations_of_memory_group(),
            self.every.all_reduce("gradients of the rest", self.num_rest, self.element),
        ]
        return received, self._tables(gradients, self.group_size), self._rest()

    def memory_group_fsdp2(self):
        received, tables, _ = self.memory_group()
        rest = self._fsdp2("the rest", self.num_rest)
        return [*received[:-1], *rest], tables, self._rest(self.every.total)

    def _tables(self, gradients, num_shards=1, num_step_counts=None):
        """Moments are in float32, and each row has an int32 count of its steps, which ranks of its columns repeat."""
        num_elements = -(-self.num_table_elements // num_shards)
        counts = self.num_table_rows if num_step_counts is None else num_step_counts
        moments = 2 * num_elements * self.float_element
        return Kept(num_elements * self.element, gradients, moments + counts * torch.int32.itemsize)

    def _rest(self, num_shards=1):
        return self._kept_of_rest(-(-self.num_rest // num_shards))

    def _kept_of_rest(self, num_elements):
        """Moments are in the data type of the weights, as those of torch's AdamW are."""
        return Kept(*(each * num_elements * self.element for each in (1, 1, 2)))

    def _fsdp2(self, name, num_elements):
        part = self.micro_batches * -(-num_elements // self.every.total) * self.element
        return [
            self.every.all_gather(f"parameters of {name}, forward", part),
            self.every.all_gather(f"parameters of {name}, backward", part),
            self.every.reduce_scatter(f"gradients of {name}", part),
        ]

    def _exchange(self, replicas, group_size):
        """
        What replicas exchange of the gradients of tables, or of their columns, and the bytes of these gradients. The
        factors of a rank are of all tokens of its group.
        """
        width = self.width // group_size
        received, gradients = [], 0
        for pool in self.pools:
            num_tokens, num_entries = self._accumulated(pool, group_size)
            factors = num_tokens * width + num_entries
            # Rows and tokens of entries are two int32, once for all tables of a pool.
            part = pool.num_tables * factors * self.float_element + num_entries * 2 * INDEX_BYTES
            size = pool.num_tables * pool.num_rows * width
            if replicas.total == 1:
                own = num_tokens * width * self.element + num_entries * self.float_element
                gradients += pool.num_tables * own + num_entries * torch.int64.itemsize
            elif replicas.total * part < 2 * size * self.element:  # as `gradient_exchange` decides
                received.append(replicas.all_gather("factors of tables", part))
                of_replica = pool.num_tables * factors * self.float_element + num_entries * torch.int64.itemsize
                gradients += replicas.total * of_replica
            else:
                received.append(replicas.all_reduce("gradients of tables", size, self.element))
                gradients += size * self.element
        return joined(received), gradients

    def _accumulated(self, pool, group_size):
        """
        Numbers of tokens and of entries in the factors of a table at the end of a step, of all layers and
        micro-batches. As [`FactoredGradient`] does, factors are summed to rows, each one token and one entry, when
        they take much more memory than these; rows are counted as if each entry named another one.
        """
        width = self.width // group_size
        num_tokens = num_entries = 0
        for place, num_active in enumerate(pool.num_active * self.micro_batches):
            num_tokens += self.tokens_per_rank * group_size
            num_entries += self.tokens_per_rank * group_size * num_active
            size = num_tokens * width * self.element + num_entries * (self.float_element + torch.int64.itemsize)
            num_rows = min(num_entries, pool.num_rows)
            if place and size > MOST_FACTORS * num_rows * width * self.float_element:
                num_tokens = num_entries = num_rows
        return num_tokens, num_entries

    def _activations_of_memory_group(self):
        received = []
        for pool in self.pools:
            for num_active in pool.num_active:
                sizes = memory_group_bytes(
                    self.width, num_active, self.group_size, self.element, pool.num_up_projections
                )
                received += [
                    Received(name, GROUP_COLLECTIVES[name][1], size * self.num_tokens, 0)
                    for name, size in sizes.items()
                ]
        return joined(received)

    def _num_split(self):
        """Parameters of the rest that tensor parallelism splits. Those of variants of your own are replicated."""
        config, model = self.config, self.model
        num_split = model.embedding.parameters + model.attention.parameters + model.lm_head.parameters
        if config.attention_bias:
            num_split -= config.num_hidden_layers * self.width  # of the output projection
        for name, costs in zip(model.feed_forward_types, model.feed_forwards, strict=True):
            variant = ALL_FEED_FORWARDS[name]
            if variant is DenseFeedForward:
                num_split += costs.parameters
            elif variant is MoeFeedForward:
                num_split += costs.parameters - self.width * config.moe_num_experts
            elif variant is PeerFeedForward:
                num_split += 3 * self.width * (config.shared_expert_intermediate_size or 0)
        return num_split

    def _activations_of_tensor_parallelism(self):
        """
        As the plans of the model and of Transformers have it: the output of a row-wise layer is summed, and in
        backward the gradient of the input of each column-wise layer on its own.
        """
        config, width = self.config, self.width
        summed = (2 + config.num_hidden_layers * 4) * width  # embedding, LM head; queries, keys, values, output
        for name in config.feed_forward_types:
            variant = ALL_FEED_FORWARDS[name]
            if variant is DenseFeedForward:
                summed += 3 * width  # gate, up, down
            elif variant is MoeFeedForward:
                summed += 2 * width + config.moe_num_experts_per_tok
            elif variant is PeerFeedForward and config.shared_expert_intermediate_size is not None:
                summed += 3 * width
        products = gathered = 0
        for pool in self.pools:
            products += (pool.num_up_projections + 1) * sum(pool.num_active)  # and gradients of the down projection
            gathered += (pool.num_up_projections + 1) * width * len(pool.num_active)  # outputs, input gradients
        num_tokens = self.num_tokens * self.group_size
        return [
            self.group.all_reduce("hidden states of the rest", num_tokens * summed, self.element),
            self.group.all_gather("logits", self.num_tokens * config.vocab_size * self.element),
            self.group.all_reduce("dot products", num_tokens * products, self.element),
            self.group.all_gather("outputs and hidden state gradients", self.num_tokens * gathered * self.element),
        ]


__all__ = ["CommunicationCosts", "DesignCosts", "Kept", "communication_costs"]
