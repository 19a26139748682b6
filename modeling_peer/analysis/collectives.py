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
Bytes that a rank receives by collectives, by arithmetic alone: of a memory group for each token, and of all-gathers,
reduce-scatters and all-reduces within a node and between nodes.

Counted are bytes that a rank *receives*, not its own part: of an all-gather of n equal parts n − 1, of a
reduce-scatter n − 1 partial sums of its part, of an all-reduce both.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .arguments import check_integer


INDEX_BYTES = 4  # int32
FLOAT_BYTES = 4  # float32, in which partial sums are made

# The collectives of a memory group in a forward and backward of a layer, in their order: the pass, and the operation.
GROUP_COLLECTIVES = {
    "indices": ("forward", "all-gather"),
    "hidden states": ("forward", "all-to-all"),
    "dot products": ("forward", "reduce-scatter"),
    "weighted activations": ("forward", "all-gather"),
    "outputs": ("forward", "all-to-all"),
    "output gradients": ("backward", "all-to-all"),
    "weight gradients": ("backward", "reduce-scatter"),
    "neuron gradients": ("backward", "all-gather"),
    "hidden state gradients": ("backward", "all-to-all"),
}


def memory_group_bytes(
    hidden_size: int, num_active: int, group_size: int, element_bytes: int, num_up_projections: int = 1
) -> dict[str, int]:
    """
    Count what a rank of a memory group receives for each of its own tokens in one call of an expert pool and its
    backward.

    Each of the G ranks has d / G columns of every row, and T tokens of its own. Of an all-to-all it receives
    `T · d / G` elements from each of the G − 1 others; of an all-gather the `T · A` elements of each; of a
    reduce-scatter G − 1 partial sums of its own `T · A` elements. A rank's own part is not counted. Divided by T, an
    all-to-all is (G − 1) / G · d elements, each of the others (G − 1) · A.

    Partial dot products, and partial gradients of the weighted activations, are summed in float32 at least. Gated
    experts have two of the dot products and of the neuron gradients; memory values without neurons (PKM) have none,
    and do not need the hidden states.

    Args:
        hidden_size (`int`): Width d of the rows.
        num_active (`int`): Active experts per token, A = h · k.
        group_size (`int`): Number of ranks G of the group, a divisor of `hidden_size`.
        element_bytes (`int`): Bytes of an element of the hidden states, 2 for bfloat16.
        num_up_projections (`int`, *optional*, defaults to 1): Tables that hidden states are multiplied with: 2 for
            gated experts, 0 for PKM.

    Returns:
        `dict[str, int]`: bytes of each of `GROUP_COLLECTIVES`, in its order.

    Raises:
        `ValueError`: if a size is not a positive integer, or `group_size` does not divide `hidden_size`.
    """
    sizes = {"hidden_size": hidden_size, "num_active": num_active, "group_size": group_size}
    for name, value in (sizes | {"element_bytes": element_bytes}).items():
        check_integer(name, value)
    check_integer("num_up_projections", num_up_projections, minimum=0)
    if hidden_size % group_size:
        raise ValueError(f"`group_size` must divide `hidden_size`, {hidden_size}, got {group_size}.")
    others = group_size - 1
    columns = others * (hidden_size // group_size) * element_bytes
    partial_sums = others * num_active * max(element_bytes, FLOAT_BYTES)
    neurons = others * num_active * element_bytes
    has_neurons = min(num_up_projections, 1)
    return {
        "indices": others * num_active * INDEX_BYTES,
        "hidden states": has_neurons * columns,
        "dot products": num_up_projections * partial_sums,
        "weighted activations": neurons,
        "outputs": columns,
        "output gradients": columns,
        "weight gradients": partial_sums,
        "neuron gradients": num_up_projections * neurons,
        "hidden state gradients": has_neurons * columns,
    }


@dataclass(frozen=True)
class Received:
    """
    What a rank receives in a step by the collectives of one kind.

    Args:
        name (`str`): What is moved.
        operation (`str`): The collective: `"all-gather"`, `"all-to-all"`, `"reduce-scatter"` or `"all-reduce"`.
        node_bytes (`int`): Bytes that come over the links within a node.
        network_bytes (`int`): Bytes that come over the network between nodes.
    """

    name: str
    operation: str
    node_bytes: int
    network_bytes: int

    @property
    def num_bytes(self) -> int:
        """All bytes that the rank receives."""
        return self.node_bytes + self.network_bytes

    def seconds(self, node_bandwidth: float, network_bandwidth: float) -> float:
        """Seconds at these bytes per second, both links being busy at once: the slower one decides."""
        return max(self.node_bytes / node_bandwidth, self.network_bytes / network_bandwidth)


@dataclass(frozen=True)
class Ranks:
    """
    Ranks that take part in a collective.

    Args:
        num_nodes (`int`): Number of nodes that they are in.
        per_node (`int`): Number of ranks in each of these.
    """

    num_nodes: int
    per_node: int

    @property
    def total(self) -> int:
        """Number of ranks."""
        return self.num_nodes * self.per_node

    def all_gather(self, name: str, part: int) -> Received:
        """An all-gather of `part` bytes from each rank."""
        network = (self.num_nodes - 1) * part
        return Received(name, "all-gather", (self.total - 1) * part - network, network)

    def reduce_scatter(self, name: str, part: int) -> Received:
        """A reduce-scatter to `part` bytes on each rank: an all-gather backwards."""
        return replace(self.all_gather(name, part), operation="reduce-scatter")

    def all_reduce(self, name: str, num_elements: int, element_bytes: int) -> Received:
        """An all-reduce of a tensor on each rank: a reduce-scatter to equal parts, and an all-gather of them."""
        half = self.all_gather(name, -(-num_elements // self.total) * element_bytes)
        return Received(name, "all-reduce", 2 * half.node_bytes, 2 * half.network_bytes)


def joined(several: Iterable[Received]) -> list[Received]:
    """Sum what has one name and operation, in the order in which they first come."""
    found: dict[tuple[str, str], Received] = {}
    for each in several:
        before = found.get((each.name, each.operation), Received(each.name, each.operation, 0, 0))
        found[each.name, each.operation] = replace(
            before,
            node_bytes=before.node_bytes + each.node_bytes,
            network_bytes=before.network_bytes + each.network_bytes,
        )
    return list(found.values())
