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
What a model was built of. A model follows only some fields of its configuration that change later; a checkpoint with
any other change would load as another model than the one that was saved.
"""

import copy
from dataclasses import replace
from typing import Any

from .configuration_peer import PeerConfig
from .expert_generations import generations_of
from .feed_forward_peer import PeerFeedForward


# Fields that modules read once, when they are built, and on which what a model computes depends.
BUILT_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "num_experts",
    "num_retrieval_heads",
    "query_size",
    "query_norm",
    "scoring_func",
    "sub_keys_per_head",
    "expert_act",
    "gated_experts",
    "share_experts_across_layers",
    "shared_expert_intermediate_size",
    "moe_num_experts",
    "moe_num_experts_per_tok",
    "moe_intermediate_size",
    "moe_routing",
)


def built_fields(config: PeerConfig) -> dict[str, Any]:
    """The values of the fields of a configuration that a model built of it does not follow when they change."""
    return {name: copy.deepcopy(getattr(config, name)) for name in BUILT_FIELDS}


def check_built(base_model: Any, config: PeerConfig) -> None:
    """
    Refuse a configuration that no longer describes a model.

    Args:
        base_model (`PeerModel`): A model without a head.
        config (`PeerConfig`): Its configuration as it is now.

    Raises:
        `ValueError`: for the first field that differs, with what the model has and what the configuration says.
    """
    for name, built in base_model.built_fields.items():
        _check_field(name, built, getattr(config, name))
    types = [layer.feed_forward_type for layer in base_model.layers]
    # A model runs only as many of its layers as its configuration says.
    _check_field("feed_forward_types", types[: config.num_hidden_layers], config.feed_forward_types)
    for layer in base_model.modules():
        if isinstance(layer, PeerFeedForward):
            held = [router.generation for router in (layer.router, *layer.added_routers)]
            first, *added = generations_of(config, layer.layer_idx)
            # The first router follows `num_experts_per_head` of the configuration.
            if held != [replace(first, num_experts_per_head=held[0].num_experts_per_head), *added]:
                sizes = [each.num_experts for each in held]
                raise ValueError(
                    f"`expert_additions` of the configuration does not say how layer {layer.layer_idx} grew: the "
                    f"model has generations of {sizes} experts, and the configuration says {config.expert_additions}."
                )


def _check_field(name, built, found):
    if found != built:
        raise ValueError(
            f"`{name}` was changed on the configuration of a model that was built with another value: the model has "
            f"{built!r}, and the configuration says {found!r}. Set it back, or build a new model."
        )
