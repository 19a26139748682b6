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
"""The feed-forwards of base models that a graft recognizes, and their linear layers."""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.pytorch_utils import Conv1D


if dist.is_available():
    from torch.distributed.tensor import DTensor

# Names of a feed-forward's linear layers: gate, if it has one, up- and down-projection.
LINEAR_LAYERS = (
    ("gate_proj", "up_proj", "down_proj"),
    (None, "up_proj", "down_proj"),
    (None, "c_fc", "c_proj"),
    (None, "fc1", "fc2"),
    (None, "fc_in", "fc_out"),
    (None, "dense_h_to_4h", "dense_4h_to_h"),
)


@dataclass
class FeedForwardParts:
    """
    The linear layers of a base model's feed-forward `down(σ(up(x)))`, or `down(σ(gate(x)) · up(x))` with a gate.

    Attributes:
        gate (`nn.Module`, *optional*)
        up (`nn.Module`)
        down (`nn.Module`)
    """

    gate: Any | None
    up: Any
    down: Any

    @property
    def linear_layers(self) -> list[Any]:
        return [layer for layer in (self.gate, self.up, self.down) if layer is not None]

    @property
    def hidden_size(self) -> int:
        return _sizes(self.up)[1]

    @property
    def intermediate_size(self) -> int:
        return _sizes(self.up)[0]

    @property
    def has_biases(self) -> bool:
        return any(layer.bias is not None for layer in self.linear_layers)


def weight_matrix(layer: Any) -> torch.Tensor:
    """The weight of a linear layer, of shape `(out_features, in_features)`."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def _sizes(layer):
    """`(out_features, in_features)`, also of a layer whose quantized weights are packed."""
    return (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)


def whole_feed_forward(feed_forward: nn.Module) -> nn.Module:
    """
    A feed-forward with whole weights: itself, or a copy with gathered ones if FSDP2 splits them over processes, all of
    which then take part.
    """
    split: list[Any] = [
        each for each in feed_forward.parameters() if dist.is_available() and isinstance(each, DTensor)
    ]
    if not split:
        return feed_forward
    # What a copy has in their place.
    whole: dict[int, Any] = {
        id(each): nn.Parameter(each.detach().full_tensor(), requires_grad=False) for each in split
    }
    return copy.deepcopy(feed_forward, whole)


def recognize_feed_forward(module: nn.Module) -> FeedForwardParts | None:
    """
    Find the parts of a feed-forward: a module with two or three linear layers, under names that models of Transformers
    use, that is called with nothing but hidden states. `None` for anything else, such as a mixture of experts.
    """
    for names in LINEAR_LAYERS:
        layers = [None if name is None else getattr(module, name, None) for name in names]
        found = [layer for layer, name in zip(layers, names, strict=True) if name is not None]
        if not all(isinstance(layer, (nn.Linear, Conv1D)) for layer in found):
            continue
        parts = FeedForwardParts(*layers)
        others = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, Conv1D)) and layer not in found]
        if others or _num_required_arguments(module) != 1 or not _fit_together(parts):
            return None
        return parts
    return None


def _num_required_arguments(module):
    parameters = inspect.signature(module.forward).parameters.values()
    named = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    return sum(parameter.kind in named and parameter.default is inspect.Parameter.empty for parameter in parameters)


def _fit_together(parts):
    sizes = (parts.intermediate_size, parts.hidden_size)
    into_neurons = [layer for layer in (parts.gate, parts.up) if layer is not None]
    return all(_sizes(layer) == sizes for layer in into_neurons) and _sizes(parts.down) == sizes[::-1]
