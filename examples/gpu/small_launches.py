# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Launches every kernel once at small sizes, for a tool that watches them. The only argument is settings in JSON."""

import json
import sys

import torch

from gpu.device import Device
from gpu.equality_layers import layer_config, optimizer_of
from gpu.inputs import DTYPES, draw_experts
from gpu.settings import Settings
from modeling_peer.feed_forward import PeerFeedForward
from modeling_peer.ops.gradient_factors import Assignments, Factors
from modeling_peer.ops.kernels import KERNELS


SIZES, WIDTHS = [5, 12, 40], (20, 33, 130)


def launch_kernels(settings: Settings) -> None:
    """Kernels on tables, at widths that are no multiples of a block."""
    run = KERNELS[settings.kernels]
    for dtype in DTYPES.values():
        for width in WIDTHS:
            experts = draw_experts(SIZES, width, dtype, settings.device)
            run.up(experts.hidden, experts.indices, experts.table)
            run.down(experts.weights, experts.indices, experts.table)
            assignments = Assignments(experts.indices, len(experts.table), settings.kernels)
            factors = Factors(experts.weights, experts.hidden, assignments)
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
