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
"""What the layers of a model are told about the forward pass in which they run."""

import torch
from torch import nn

from .library_releases import in_backward


class ForwardPass:
    """
    One forward pass of a base model, which makes it, hands it to every layer, and ends it after the last layer.

    A layer cannot tell by itself whether it is trained: under reentrant activation checkpointing it first runs without
    gradients, and under any activation checkpointing it runs again during the backward pass, with the arguments of the
    first time. As an argument rather than an attribute of modules, the answer is right on every thread.

    Args:
        learns (`bool`):
            Whether a backward pass may follow: the model is in training mode and gradients are enabled.

    Attributes:
        has_ended (`bool`): Whether the last layer has run: layers that run after it recompute what they did before.
        most_tokens (`int`, *optional*):
            The largest number of tokens of a process, of those that exchange tokens. Noted by the first layer that
            asks for it.
    """

    def __init__(self, learns: bool):
        self.learns = learns
        self.has_ended = False
        self.most_tokens: int | None = None

    @classmethod
    def of_model(cls, model: nn.Module) -> "ForwardPass":
        """
        The forward pass that a model begins. In a backward it has ended before: activation checkpointing of the whole
        model recomputes it. A compiler does not trace the question, so compiled models take a batch up twice there.
        """
        forward_pass = cls(learns=model.training and torch.is_grad_enabled())
        forward_pass.has_ended = not torch.compiler.is_compiling() and in_backward()
        return forward_pass

    @property
    def updates_statistics(self) -> bool:
        """Whether running statistics take up the batch: once, so not where a layer recomputes."""
        return self.learns and not self.has_ended

    def end(self) -> None:
        """Mark the end of the forward pass."""
        self.has_ended = True
