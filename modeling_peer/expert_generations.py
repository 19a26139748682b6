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
Generations of experts: the experts with which a PEER layer began, and those that [`add_experts`] has added since.

The generations of every layer follow from `config.expert_additions`, see `expert_additions.py`. Expert indices run
through the layer, generation after generation, so that growth changes no index.
"""

from dataclasses import dataclass

from .configuration_peer import PeerConfig
from .expert_additions import PROTECTED_FIELDS


@dataclass(frozen=True)
class Generation:
    """
    Experts of a layer that are retrieved together.

    Args:
        num_experts (`int`): Number of experts, a perfect square.
        num_heads (`int`): Number of heads that retrieve them.
        num_experts_per_head (`int`): Number of experts that each head retrieves.
        first_expert (`int`, *optional*, defaults to 0): Index of the first of them in the layer.
    """

    num_experts: int
    num_heads: int
    num_experts_per_head: int
    first_expert: int = 0

    @property
    def experts(self) -> range:
        """The indices of the experts in the layer."""
        return range(self.first_expert, self.first_expert + self.num_experts)


def first_generation(config: PeerConfig) -> Generation:
    """The generation that every PEER layer begins with, of the sizes in the fields of the configuration."""
    return Generation(config.num_experts, config.num_retrieval_heads, config.num_experts_per_head)


def generations_of(config: PeerConfig, layer_idx: int) -> list[Generation]:
    """The generations of a PEER layer, in the order of their expert indices."""
    first = first_generation(config)
    additions = [addition for addition in config.expert_additions or () if layer_idx in addition["layers"]]
    size = first.num_experts + sum(entry["num_experts"] for entry in additions if entry["mode"] == "open")
    generations = [Generation(size, first.num_heads, first.num_experts_per_head)]
    for entry in additions:
        if entry["mode"] == "protected":
            heads, per_head = (entry[name] for name in PROTECTED_FIELDS)
            generations.append(Generation(entry["num_experts"], heads, per_head, generations[-1].experts.stop))
    return generations


def shared_generations(config: PeerConfig) -> list[Generation]:
    """The generations of the pool that all PEER layers share."""
    return generations_of(config, config.feed_forward_types.index("peer"))


def has_protected_additions(config: PeerConfig) -> bool:
    """Whether any layer has more than one generation."""
    return any(entry["mode"] == "protected" for entry in config.expert_additions or ())
