# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Which implementation of the experts ran, by name: for tests of what must go through the fast one."""

import functools
from collections.abc import Callable
from typing import Any

from modeling_peer.ops.kernels import KERNELS


FUNCTIONS = ("up", "down", "group", "row_gradient", "squared_norm", "retrieve", "retrieval_gradients")

INFERENCE = {("cpu", "up"), ("cpu", "down"), ("cpu", "retrieve")}
TRAINING = INFERENCE | {("cpu", "group"), ("cpu", "row_gradient"), ("cpu", "retrieval_gradients")}


def record_kernels(patch: Callable[[type, str, Any], None] = setattr) -> set[tuple[str, str]]:
    """A set that from now on gets `(implementation, function)` as one is called. `patch` sets an attribute of a class."""
    used: set[tuple[str, str]] = set()

    def recorded(call, function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            used.add(call)
            return function(*args, **kwargs)

        return staticmethod(wrapper)

    for name, kernels in KERNELS.items():
        for function in FUNCTIONS:
            if hasattr(kernels, function):
                patch(kernels, function, recorded((name, function), getattr(kernels, function)))
    return used
