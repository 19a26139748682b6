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
The field `expert_additions` of [`PeerConfig`]: the experts that [`add_experts`] added to PEER layers, and what an
entry may say.

| mode of an addition | meaning |
|---|---|
| `"open"` | the key grid of the first generation grows: old and new experts compete over all keys |
| `"protected"` | a generation with its own router, retrieval budget, softmax and gate |
"""

from typing import Any

from .key_grid import grid_size


MODES = ("protected", "open")

PROTECTED_FIELDS = ("num_retrieval_heads", "num_experts_per_head")


def check_additions(
    additions: list[dict[str, Any]] | None, feed_forward_types: list[str], num_experts: int, is_shared: bool
) -> None:
    """
    Refuse additions that [`add_experts`] could not have made.

    Args:
        additions (`list[dict]`, *optional*): The field `expert_additions`.
        feed_forward_types (`list[str]`): The variant of each layer.
        num_experts (`int`): How many experts each PEER layer began with.
        is_shared (`bool`): Whether all PEER layers share one pool.

    Raises:
        `ValueError`: naming the field of the addition, what was found and what was expected.
    """
    peer_layers = [i for i, name in enumerate(feed_forward_types) if name == "peer"]
    sizes = dict.fromkeys(peer_layers, num_experts)
    protected: set[int] = set()
    for addition in additions or ():
        _check_addition(addition, peer_layers, feed_forward_types, is_shared)
        layers = set(addition["layers"])
        if addition["mode"] == "protected":
            protected |= layers
            continue
        if layers & protected:
            raise ValueError(
                "`expert_additions` has an open addition after a protected one in layers "
                f"{sorted(layers & protected)}: new experts would compete with those that are protected. Add "
                "protected ones."
            )
        for layer in layers:
            sizes[layer] += addition["num_experts"]
            try:
                grid_size(sizes[layer])
            except ValueError as error:
                raise ValueError(
                    f"An open addition of {addition['num_experts']} experts makes {sizes[layer]} in layer {layer}: "
                    f"{error}"
                ) from None


def _check_addition(addition, peer_layers, feed_forward_types, is_shared):
    mode = addition.get("mode")
    if mode not in MODES:
        raise ValueError(f"The `mode` of an addition of experts must be one of {MODES}, got {mode!r}.")
    names = {"layers", "mode", "num_experts"} | (set(PROTECTED_FIELDS) if mode == "protected" else set())
    if set(addition) != names:
        raise ValueError(f"A {mode} addition of experts has the fields {sorted(names)}, got {sorted(addition)}.")
    if not peer_layers:
        raise ValueError(
            f"Experts can be added to PEER layers, and there is none in `feed_forward_types` {feed_forward_types}."
        )
    layers = addition["layers"]
    are_indices = isinstance(layers, list) and layers and all(type(layer) is int for layer in layers)
    if not are_indices or len(set(layers)) != len(layers) or not set(layers) <= set(peer_layers):
        raise ValueError(
            f"`layers` of an addition must be a list of some of the PEER layers {peer_layers}, got {layers!r}."
        )
    if is_shared and set(layers) != set(peer_layers):
        raise ValueError(
            f"`layers` must be all PEER layers {peer_layers}, as they share one pool of experts, got {layers}."
        )
    sizes = {name: addition[name] for name in names - {"layers", "mode"}}
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` of an addition must be an integer of at least 1, got {value!r}.")
    if mode == "protected":
        size = grid_size(addition["num_experts"])
        if addition["num_experts_per_head"] > size:
            raise ValueError(
                f"`num_experts_per_head` of an addition must be at most √num_experts = {size}, got "
                f"{addition['num_experts_per_head']}."
            )
