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
The registry of feed-forward variants, like the attention interface of Transformers.

A variant is a module class. It is constructed as `variant(config, layer_idx)` and called as
`forward(hidden_states, padding_mask=..., **kwargs)`, and returns a tensor of the shape of `hidden_states`,
`(batch_size, sequence_length, hidden_size)`. It takes the place of the feed-forward in each layer for which
`PeerConfig.feed_forward_types` names it:

```python
>>> from modeling_peer import FeedForwardInterface

>>> FeedForwardInterface.register("my_feed_forward", MyFeedForward)
>>> config = PeerConfig(num_hidden_layers=2, feed_forward_types=["dense", "my_feed_forward"])
```

| argument of its forward | |
|---|---|
| `padding_mask` | True where there is a token, `(batch_size, sequence_length)`; `None` if the model was not told |
| `forward_pass` | the [`ForwardPass`] of the model: whether it learns, and whether this call recomputes another |
| `expert_pool` | the [`ExpertPool`] that PEER layers share, or `None` |

Further arguments may be added: a variant must accept `**kwargs`. If it contains a layer of this package it should pass
them on.

Transformers initializes its `nn.Linear`, `nn.Embedding` and norm modules. Other parameters it initializes in a method
`init_own_weights()`, with the functions of `transformers.initialization`, which do not change loaded weights. A class
method `tp_plan(config)` may name the tensor parallel styles of its modules, relative to itself, `ep_plan(config)`
those of a memory group, and a static method `count_costs(config, layer_idx)` lets [`model_costs`] count it.

A checkpoint does not carry the code of a custom variant: saving warns of it and writes it into the model's card, and
the variant must be registered wherever the checkpoint is loaded.
"""

from transformers.utils import logging
from transformers.utils.generic import GeneralInterface

from .configuration_peer import PeerConfig
from .feed_forward_dense import DenseFeedForward
from .feed_forward_moe import MoeFeedForward
from .feed_forward_peer import PeerFeedForward
from .feed_forward_pkm import PkmFeedForward


logger = logging.get_logger(__name__)

# The variants whose code every checkpoint carries.
OWN_VARIANTS = {
    "dense": DenseFeedForward,
    "moe": MoeFeedForward,
    "pkm": PkmFeedForward,
    "peer": PeerFeedForward,
}


class FeedForwardInterface(GeneralInterface):
    """
    Mapping from the names in `PeerConfig.feed_forward_types` to module classes.

    `FeedForwardInterface.register(name, variant)` adds a variant; the docstring of this module says what it must
    provide.
    """

    _global_mapping = dict(OWN_VARIANTS)


ALL_FEED_FORWARDS = FeedForwardInterface()


def check_feed_forward_types(names: list[str]) -> None:
    """Raise `ValueError` if one of the names in `PeerConfig.feed_forward_types` is not registered."""
    for name in names:
        if name not in ALL_FEED_FORWARDS:
            raise ValueError(
                f"`feed_forward_types` names the unknown variant {name!r}; known are {sorted(ALL_FEED_FORWARDS)}. "
                "Register others with `FeedForwardInterface.register(name, class)` before the model is built."
            )


def feed_forward_plan(kind: str, config: PeerConfig) -> dict[str, str]:
    """
    The parallel styles of the variants in `config.feed_forward_types`, by names in the base model.

    Args:
        kind (`str`): `"tp_plan"` or `"ep_plan"`, what a variant may have.
        config (`PeerConfig`)
    """
    plan: dict[str, str] = {}
    for name in dict.fromkeys(config.feed_forward_types):
        variant = ALL_FEED_FORWARDS[name]
        if hasattr(variant, kind):
            plan |= {f"layers.*.mlp.{module}": style for module, style in getattr(variant, kind)(config).items()}
    return plan


def custom_variants(names: list[str]) -> dict[str, type]:
    """The variants named in `PeerConfig.feed_forward_types` that no checkpoint carries; warns once of each."""
    custom = {name: ALL_FEED_FORWARDS[name] for name in names if ALL_FEED_FORWARDS[name] is not OWN_VARIANTS.get(name)}
    for name, variant in custom.items():
        logger.warning_once(
            f"The code of the feed-forward variant {name!r}, class `{variant.__module__}.{variant.__qualname__}`, "
            "is not saved with the model. Publish it beside the checkpoint: whoever loads the model must first "
            f"call `FeedForwardInterface.register({name!r}, {variant.__name__})`, as the model's card says."
        )
    return custom
