# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Factored gradients of embeddings, for any model. They have one row for each token of a step, whereas a dense gradient
has one for each entry of the vocabulary.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ..ops.factored_gradient import FactoredGradient, takes_factors
from ..ops.gradient_factors import Assignments, Factors
from ..ops.kernels import is_traced, resolve_kernels


# If there are more tokens than this fraction of the rows, a dense gradient takes less memory.
MOST_TOKENS = 0.5


def embeddings_of(model: nn.Module) -> list[nn.Embedding]:
    """
    Return the trained embeddings of a model whose weights no other module shares. A head that is tied to an embedding
    would give each of its rows a gradient.
    """
    elsewhere = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.weight.requires_grad and id(module.weight) not in elsewhere
    ]


def let_gradients_come_in_factors(embedding: nn.Embedding) -> None:
    """
    Let the gradient of an embedding come in factors if an optimizer takes them and few rows are looked up. It stays
    dense for embeddings that compute more than a lookup.
    """
    is_plain = type(embedding).forward is nn.Embedding.forward and "forward" not in vars(embedding)
    options = embedding.max_norm, embedding.scale_grad_by_freq, embedding.sparse
    if is_plain and not any(options) and _in_factors not in embedding._forward_hooks.values():
        embedding.register_forward_hook(_in_factors, with_kwargs=True)


def embeddings_in_factors(model: nn.Module) -> list[nn.Embedding]:
    """The embeddings of a model whose gradients may come in factors."""
    found = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return [each for each in found if _in_factors in each._forward_hooks.values()]


def _in_factors(embedding, args, kwargs, output):
    rows, weight = kwargs["input"] if "input" in kwargs else args[0], embedding.weight
    if (
        not output.requires_grad
        or is_traced()
        or rows.numel() > MOST_TOKENS * len(weight)
        or not takes_factors(weight)
    ):
        return None
    if output.grad_fn is None or output.grad_fn.name() != "EmbeddingBackward0":  # another hook has changed it
        return None
    return _Rows.apply(weight, rows, output.detach(), embedding.padding_idx)


class _Rows(torch.autograd.Function):
    """Autograd function that gives looked-up rows a gradient in factors."""

    @staticmethod
    def forward(ctx: Any, weight, rows, found, padding_idx):
        ctx.save_for_backward(rows)
        ctx.weight, ctx.padding_idx = weight, padding_idx
        ctx.mark_dirty(found)  # no copy, and no view, which could not be written in place
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient):
        rows = ctx.saved_tensors[0].reshape(-1, 1)
        is_counted = torch.ones_like(rows) if ctx.padding_idx is None else rows != ctx.padding_idx
        tokens = gradient.reshape(len(rows), ctx.weight.shape[1]).contiguous()
        assignments = Assignments(rows.long(), len(ctx.weight), resolve_kernels(None, ctx.weight))
        factors = Factors(is_counted.to(tokens.dtype), tokens, assignments).summed()  # one for each distinct token
        return FactoredGradient(ctx.weight, [factors]), None, None, None
