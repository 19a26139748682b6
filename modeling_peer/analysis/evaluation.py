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
    head = getattr(getattr(model, "get_output_embeddings", lambda: None)(), "weight", None)
    # The logits of a part of a sequence take 200 times as long on CPUs if the head is frozen and in bfloat16, see
    # https://github.com/pytorch/pytorch/issues/151934.
    thaws = isinstance(head, nn.Parameter) and head.is_floating_point() and not head.requires_grad
    try:
        with torch.no_grad():
            model.eval()
            if thaws:
                head.requires_grad_(True)
            yield
    finally:
        if thaws:
            head.requires_grad_(False)
        for module, training in modes.items():
            module.training = training
        for hook in hooks:
            hook.remove()
