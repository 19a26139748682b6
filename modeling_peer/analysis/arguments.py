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
"""Checks of arguments that several functions share."""

from typing import Any

from torch import nn


def check_integer(name: str, value: Any, minimum: int = 1) -> None:
    """Raise `ValueError` if an argument is not an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {value!r}.")


def check_is_module(model: Any) -> None:
    """Raise `ValueError` if an argument `model` is not an `nn.Module`."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` must be an `nn.Module`, got {shown(model)}.")


def shown(value: Any, elements: list | None = None) -> str:
    """What an error says was found: the value, or the first of its `elements`, cut short, and its type."""
    text = repr(value) if elements is None else repr(elements[:5])
    return f"{text[:80]}{'…' * (len(text) > 80)} ({type(value).__name__})"
