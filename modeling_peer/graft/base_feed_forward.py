# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The feed-forwards of base models that a graft recognizes, and their linear layers."""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D


# Names of a feed-forward's linear layers: gate, if it has one, up- and down-projection.
LINEAR_LAYERS = (
    ("gate_proj", "up_proj", "down_proj"),
    (None, "up_proj", "down_proj"),
    (None, "c_fc", "c_proj"),
    (None, "fc1", "fc2"),
    (None, "fc_in", "fc_out"),
    (None, "dense_h_to_4h", "dense_4h_to_h"),
)


VARIADIC = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


@dataclass
class FeedForwardParts:
    """The linear layers of a base model's feed-forward `down(σ(up(x)))`, with a gate `down(σ(gate(x)) · up(x))`."""

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
    A feed-forward with whole weights and without its grafts. If FSDP2 splits the weights over processes, this is a
    copy with gathered weights, and all processes must take part.
    """
    feed_forward = getattr(feed_forward, "base_layer", feed_forward)
    split: list[Any] = [each for each in feed_forward.parameters() if isinstance(each, DTensor)]
    if not split:
        return feed_forward
    # The copy has these in place of the split parameters.
    whole: dict[int, Any] = {
        id(each): nn.Parameter(each.detach().full_tensor(), requires_grad=False) for each in split
    }
    return copy.deepcopy(feed_forward, whole)


def recognize_feed_forward(module: nn.Module) -> FeedForwardParts | None:
    """
    Find the parts of a feed-forward, also of one with grafts. A feed-forward is a module with two or three linear
    layers under names that models of Transformers use, and it needs no argument except hidden states. Returns `None`
    for anything else, such as a mixture of experts.
    """
    module = getattr(module, "base_layer", module)
    for names in LINEAR_LAYERS:
        layers = [getattr(module, name or "", None) for name in names]
        found = [layer for layer, name in zip(layers, names, strict=True) if name]
        if all(isinstance(layer, (nn.Linear, Conv1D)) for layer in found):
            others = [each for each in module.modules() if isinstance(each, (nn.Linear, Conv1D)) and each not in found]
            parameters = inspect.signature(module.forward).parameters.values()
            required = [each for each in parameters if each.kind not in VARIADIC and each.default is each.empty]
            return None if others or len(required) != 1 else FeedForwardParts(*layers)
    return None
