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
"""Launches every kernel once at small sizes, for a tool that watches them. The only argument is settings in JSON."""

import json
import sys

import torch

from gpu.device import Device
from gpu.equality_layers import layer_config, optimizer_of
from gpu.inputs import DTYPES, draw_experts
from gpu.settings import Settings
from modeling_peer.expert_kernels import ALL_EXPERT_KERNELS
from modeling_peer.feed_forward_peer import PeerFeedForward
from modeling_peer.gradient_factors import Entries, Factors


SIZES, WIDTHS = [5, 12, 40], (20, 33, 130)


def launch_kernels(settings: Settings) -> None:
    """Kernels on tables, at widths that are no multiples of a block."""
    run = ALL_EXPERT_KERNELS[settings.kernels]
    for dtype in DTYPES.values():
        for width in WIDTHS:
            experts = draw_experts(SIZES, width, dtype, settings.device)
            run.up(experts.hidden, experts.indices, experts.table)
            run.down(experts.weights, experts.indices, experts.table)
            entries = Entries(experts.indices, len(experts.table), settings.kernels)
            factors = Factors.of(experts.weights, experts.hidden, entries)
            factors.to_rows(dtype)
            run.squared_norm(*factors.in_groups())


def launch_layer(settings: Settings) -> None:
    """Forward, backward and step of a layer: retrieval and the optimizer."""
    for name in ("float32", "bfloat16"):
        layer = PeerFeedForward(layer_config(settings), 0).to(settings.device, DTYPES[name])
        optimizer = optimizer_of(layer)
        hidden = torch.randn(1, 7, settings.small_layer["hidden_size"]).to(settings.device, DTYPES[name])
        layer(hidden.requires_grad_()).square().mean().backward()
        optimizer.step()


if __name__ == "__main__":
    given = Settings(**json.loads(sys.argv[1]))
    launch_kernels(given)
    launch_layer(given)
    Device(given.device).synchronize()
