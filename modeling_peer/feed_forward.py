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
The registry of feed-forward variants, in the manner of the library's attention interface.

A variant is a module class, constructed as `variant(config, layer_idx)` and called as
`forward(hidden_states, padding_mask=..., **kwargs)`, that returns a tensor of the shape of `hidden_states`,
`(batch_size, sequence_length, hidden_size)`. Registered by name, it stands in any layer whose entry of
`PeerConfig.feed_forward_types` says so:

```python
>>> from modeling_peer import FeedForwardInterface

>>> FeedForwardInterface.register("my_feed_forward", MyFeedForward)
>>> config = PeerConfig(num_hidden_layers=2, feed_forward_types=["dense", "my_feed_forward"])
```

Its `nn.Linear`, `nn.Embedding` and norm modules are initialized by the library; what else it holds it initializes in a
method `init_own_weights()`, with the functions of `transformers.initialization`, which leave loaded weights alone. A
class method `tp_plan(config)` may name the tensor parallel styles of its modules, relative to itself; a static method
`count_costs(config, layer_idx)` lets [`model_costs`] count it.
"""

from transformers.utils.generic import GeneralInterface

from .configuration_peer import PeerConfig
from .feed_forward_dense import DenseFeedForward
from .feed_forward_moe import MoeFeedForward
from .feed_forward_peer import PeerFeedForward
from .feed_forward_pkm import PkmFeedForward


class FeedForwardInterface(GeneralInterface):
    """Mapping from the names in `PeerConfig.feed_forward_types` to module classes. See the module's docstring."""

    _global_mapping = {
        "dense": DenseFeedForward,
        "moe": MoeFeedForward,
        "pkm": PkmFeedForward,
        "peer": PeerFeedForward,
    }


ALL_FEED_FORWARDS = FeedForwardInterface()


def check_feed_forward_types(names: list[str]) -> None:
    """Raise `ValueError` if one of the names in `PeerConfig.feed_forward_types` is not registered."""
    for name in names:
        if name not in ALL_FEED_FORWARDS:
            raise ValueError(
                f"`feed_forward_types` names the unknown variant {name!r}; known are {sorted(ALL_FEED_FORWARDS)}. "
                "Register others with `FeedForwardInterface.register(name, class)` before the model is built."
            )


def feed_forward_tp_plan(config: PeerConfig) -> dict[str, str]:
    """The tensor parallel styles of the variants in `config.feed_forward_types`, by names relative to the base model."""
    plan: dict[str, str] = {}
    for name in dict.fromkeys(config.feed_forward_types):
        variant = ALL_FEED_FORWARDS[name]
        if hasattr(variant, "tp_plan"):
            plan |= {f"layers.*.mlp.{module}": style for module, style in variant.tp_plan(config).items()}
    return plan
