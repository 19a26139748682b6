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
Generations of experts: those a PEER layer began with, and those that [`add_experts`] gave it since.

`config.expert_additions` is the history, from which each layer's generations follow. Experts are numbered through a layer,
generation after generation, so that growth changes no number.

| mode of an addition | |
|---|---|
| `"open"` | the first generation's key grid gets larger: one competition over all keys |
| `"protected"` | a generation of its own, with a router, a retrieval budget, a softmax and a gate of its own |
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .key_grid import grid_size


if TYPE_CHECKING:  # the configuration imports this module
    from .configuration_peer import PeerConfig


MODES = ("protected", "open")

PROTECTED_FIELDS = ("num_retrieval_heads", "num_experts_per_head")


@dataclass(frozen=True)
class Generation:
    """
    Experts of a layer that are retrieved together.

    Args:
        num_experts (`int`): How many, a perfect square.
        num_heads (`int`): Heads that retrieve them.
        num_experts_per_head (`int`): How many each head retrieves.
        first_expert (`int`, *optional*, defaults to 0): Number of the first of them in the layer.
    """

    num_experts: int
    num_heads: int
    num_experts_per_head: int
    first_expert: int = 0

    @property
    def experts(self) -> range:
        """Their numbers in the layer."""
        return range(self.first_expert, self.first_expert + self.num_experts)


def first_generation(config: "PeerConfig") -> Generation:
    """What a layer begins with, of the sizes that the configuration names."""
    return Generation(config.num_experts, config.num_retrieval_heads, config.num_experts_per_head)


def generations_of(config: "PeerConfig", layer_idx: int) -> list[Generation]:
    """The generations of a PEER layer, in the order of their numbers."""
    first = first_generation(config)
    additions = [addition for addition in config.expert_additions or () if layer_idx in addition["layers"]]
    size = first.num_experts + sum(entry["num_experts"] for entry in additions if entry["mode"] == "open")
    generations = [Generation(size, first.num_heads, first.num_experts_per_head)]
    for entry in additions:
        if entry["mode"] == "protected":
            heads, per_head = (entry[name] for name in PROTECTED_FIELDS)
            generations.append(Generation(entry["num_experts"], heads, per_head, generations[-1].experts.stop))
    return generations


def shared_generations(config: "PeerConfig") -> list[Generation]:
    """The generations of the pool that all PEER layers share."""
    return generations_of(config, config.feed_forward_types.index("peer"))


def has_protected_additions(config: "PeerConfig") -> bool:
    """Whether any layer has more than one generation."""
    return any(entry["mode"] == "protected" for entry in config.expert_additions or ())


def check_additions(config: "PeerConfig") -> None:
    """Raises `ValueError` if an entry of `config.expert_additions` is not one that [`add_experts`] could have made."""
    peer_layers = [i for i, name in enumerate(config.feed_forward_types) if name == "peer"]
    sizes = dict.fromkeys(peer_layers, config.num_experts)
    protected = set()
    for addition in config.expert_additions or ():
        _check_addition(addition, config, peer_layers)
        layers = set(addition["layers"])
        if addition["mode"] == "protected":
            protected |= layers
            continue
        if layers & protected:
            raise ValueError(
                f"`expert_additions` has an open addition after a protected one in layers {sorted(layers & protected)}: "
                "new experts would compete with those that are protected. Add protected ones."
            )
        for layer in layers:
            sizes[layer] += addition["num_experts"]
            try:
                grid_size(sizes[layer])
            except ValueError as error:
                raise ValueError(
                    f"An open addition of {addition['num_experts']} experts makes {sizes[layer]} in layer {layer}: {error}"
                ) from None


def _check_addition(addition: dict[str, Any], config: "PeerConfig", peer_layers):
    mode = addition.get("mode")
    if mode not in MODES:
        raise ValueError(f"The `mode` of an addition of experts must be one of {MODES}, got {mode!r}.")
    names = {"layers", "mode", "num_experts"} | (set(PROTECTED_FIELDS) if mode == "protected" else set())
    if set(addition) != names:
        raise ValueError(f"A {mode} addition of experts has the fields {sorted(names)}, got {sorted(addition)}.")
    if not peer_layers:
        raise ValueError(
            f"Experts can be added to PEER layers, and there is none in `feed_forward_types` {config.feed_forward_types}."
        )
    layers = addition["layers"]
    if not layers or len(set(layers)) != len(layers) or not set(layers) <= set(peer_layers):
        raise ValueError(f"`layers` of an addition must be some of the PEER layers {peer_layers}, got {layers}.")
    if config.share_experts_across_layers and set(layers) != set(peer_layers):
        raise ValueError(
            f"`layers` must be all PEER layers {peer_layers}, as they share one pool of experts, got {layers}."
        )
    sizes = {name: addition[name] for name in names - {"layers", "mode"}}
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` of an addition must be a whole number, at least 1, got {value!r}.")
    if mode == "protected":
        size = grid_size(addition["num_experts"])
        if addition["num_experts_per_head"] > size:
            raise ValueError(
                f"`num_experts_per_head` of an addition must be at most √num_experts = {size}, got "
                f"{addition['num_experts_per_head']}."
            )
