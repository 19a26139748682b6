# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding of one token at a time, with CUDA graphs and without: layers, and whole models with a static cache."""

import functools
from typing import Any

import torch
from transformers import AutoConfig
from transformers.initialization import no_init_weights

from gpu.device import WARM_UP, Device
from gpu.equality_layers import decoding
from gpu.inputs import DTYPES, build_layer, layer_task
from gpu.rows import Row
from gpu.settings import Settings
from modeling_peer import PeerForCausalLM, configuration_path


def rows(settings: Settings, device: Device) -> dict[str, Row]:
    """All measurements by name."""
    found: dict[str, Row] = {}
    for graph in (False, True):
        for width in settings.layer_widths:
            for contender in ("peer", "dense"):
                name = row_name(f"layer {contender}, d = {width}", graph)
                found[name] = functools.partial(measure_layer, settings, device, contender, width, graph)
        for name in settings.decoded_models:
            found[row_name(name, graph)] = functools.partial(measure_model, settings, device, name, graph)
    return found


def row_name(what: str, graph: bool) -> str:
    """The name of a measurement."""
    return f"{what}, {'graph' if graph else 'no graph'}"


@torch.no_grad()
def measure_layer(settings: Settings, device: Device, contender: str, width: int, graph: bool) -> dict[str, Any]:
    """The time of a layer for one token, whose weights are not in the cache."""
    task = layer_task(settings, contender, "forward", width, 1)
    module = build_layer(settings, task)
    token = torch.randn(1, 1, width, device=settings.device).to(task.torch_dtype)

    @torch.no_grad()
    def call():
        module(token)

    call = device.captured(call) if graph else call
    seconds = device.seconds(call, settings.repetitions, cold=True)
    return {"seconds": seconds, "what": f"layer {contender}, d = {width}", "graph": graph}


def measure_model(settings: Settings, device: Device, name: str, graph: bool) -> dict[str, Any]:
    """The time of a token of a model of a named configuration, with random weights, over some tokens."""
    config = AutoConfig.from_pretrained(configuration_path(name), expert_kernels=settings.kernels)
    with no_init_weights(), torch.device(settings.device):
        model = PeerForCausalLM(config).to(DTYPES[settings.dtype]).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    count = settings.decoded_tokens
    # Tokens to warm up and to capture, those that are timed, and one call to see how long a call takes.
    _, step = decoding(model, config, settings.device, count * (2 * WARM_UP + 4) + 2 * WARM_UP)
    step = device.captured(step) if graph else step

    def several():
        for _ in range(count):
            step()

    return {"seconds": device.seconds(several, 3) / count, "what": name, "graph": graph}
