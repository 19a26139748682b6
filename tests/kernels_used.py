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
"""Which implementation of the experts ran, by name: for tests of what must go through the fast one."""

import functools
from collections.abc import Callable
from typing import Any

from modeling_peer.expert_kernels import ALL_EXPERT_KERNELS


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

    for name, kernels in ALL_EXPERT_KERNELS.items():
        for function in FUNCTIONS:
            if hasattr(kernels, function):
                patch(kernels, function, recorded((name, function), getattr(kernels, function)))
    return used
