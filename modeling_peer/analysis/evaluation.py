# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Context manager for evaluation mode."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def evaluation(model: nn.Module, hooks: Iterable[RemovableHandle] = ()) -> Iterator[None]:
    """
    Put a model into evaluation mode, without gradients. Afterwards restore the mode of each module and remove hooks.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for hook in hooks:
            hook.remove()
