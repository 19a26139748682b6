# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Forward, backward and training step of a layer with a million experts and a BatchNorm of queries, beside PEER-pytorch
and the dense feed-forward of width 4 d, with peak memory.

A contender that runs out of memory is measured on equal parts of the tokens one after the other, whose gradients add
up, as one would train with it. The floor of an operation is the time of its unavoidable bytes at the bandwidth of a
copy: a forward reads the row of each retrieved expert, a backward reads it again, and a step reads and writes it and
two moments in float32.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from benchmark.contenders import OURS, Task
from gpu.device import Device
from gpu.inputs import Latest, build_layer, in_pieces, layer_inputs, layer_task, make_optimizer
from gpu.kernels import measure_copy
from gpu.rows import Row, SkippedError
from gpu.settings import Settings


CONTENDERS = ("peer", "peer_pytorch", "dense")
OPERATIONS = ("forward", "forward_backward", "step")

# Parts of the tokens at most.
MOST_PIECES = 64


def rows(settings: Settings, device: Device) -> dict[str, Row]:
    """All measurements by name."""
    layers = Latest(Layer, device)
    found: dict[str, Row] = {"copy": functools.partial(measure_copy, settings, device)}
    for contender in CONTENDERS:
        for width in settings.layer_widths:
            for operation in OPERATIONS:
                name = row_name(contender, operation, width)
                found[name] = functools.partial(measure, settings, device, layers, contender, operation, width)
    return found


def row_name(contender: str, operation: str, width: int) -> str:
    """The name of a measurement."""
    return f"{contender}, {operation}, d = {width}"


class Layer:
    """A contender and its optimizer."""

    def __init__(self, contender: str, width: int, settings: Settings):
        task = layer_task(settings, contender, "step", width, settings.layer_tokens)
        self.module = build_layer(settings, task)
        self.optimizer = make_optimizer(self.module, task)

    def operation(self, task: Task, device: Device, pieces: int) -> Callable[[], None]:
        """An operation on all tokens, in some parts one after the other."""
        inputs = [layer_inputs(in_pieces(task, pieces), device) for _ in range(pieces)]

        @torch.no_grad()
        def forward():
            for tokens, _ in inputs:
                self.module(tokens)

        def forward_backward():
            self.module.zero_grad()
            for tokens, gradient in inputs:
                tokens.grad = None
                self.module(tokens).backward(gradient)

        def step():
            forward_backward()
            self.optimizer.step()

        return {"forward": forward, "forward_backward": forward_backward, "step": step}[task.operation]


def measure(
    settings: Settings, device: Device, layers: Latest, contender: str, operation: str, width: int
) -> dict[str, Any]:
    """Time and peak memory of an operation of a contender."""
    if contender == "peer_pytorch" and find_spec("PEER_pytorch") is None:
        raise SkippedError("PEER-pytorch is not installed: see --wheels.")
    task = layer_task(settings, contender, operation, width, settings.layer_tokens)
    pieces = 1
    while pieces <= min(MOST_PIECES, settings.layer_tokens):
        try:
            return _measure(settings, device, layers(contender, width, settings), task, pieces)
        except torch.OutOfMemoryError:
            pieces *= 2
        layers.release()  # out here, where no traceback holds tensors of what failed
    return {"skipped": f"Out of memory even in {MOST_PIECES} parts."}


def _measure(settings, device, layer, task, pieces):
    call = layer.operation(task, device, pieces)
    seconds = device.seconds(call, settings.repetitions)
    found = {"seconds": seconds, "contender": task.contender, "operation": task.operation, "width": task.hidden_size}
    found |= {"peak_bytes": device.peak_bytes(call), "pieces": pieces}
    layer.module.zero_grad()
    if task.contender in OURS:
        found["unique_rows"] = _unique_rows(layer.module, task, device)
        found["bytes"] = unavoidable_bytes(task, found["unique_rows"])
    return found


@torch.no_grad()
def _unique_rows(module: nn.Module, task: Task, device: Device) -> int:
    return module.router(layer_inputs(task, device)[0])[0].unique().numel()


def unavoidable_bytes(task: Task, unique_rows: int) -> int:
    """Bytes of the rows of both tables that an operation cannot avoid to move, those of moments included."""
    size = task.torch_dtype.itemsize
    of_element = {"forward": size, "forward_backward": 2 * size, "step": 2 * size + 2 * size + 2 * 2 * 4}
    return 2 * unique_rows * task.hidden_size * of_element[task.operation]
