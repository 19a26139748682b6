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


EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

# If there are more tokens than this fraction of the rows, a dense gradient takes less memory.
MOST_TOKENS = 0.5


def embeddings_of(model: nn.Module) -> list[nn.Embedding | nn.EmbeddingBag]:
    """
    Return the trained embeddings of a model whose weights no other module shares. A head that is tied to an embedding
    would give each of its rows a gradient. Raises `ValueError` for one with `sparse=True`.
    """
    elsewhere = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, EMBEDDINGS)
        for parameter in module.parameters(recurse=False)
    }
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, EMBEDDINGS) and module.weight.requires_grad and id(module.weight) not in elsewhere
    }
    for name, module in found.items():
        if module.sparse:
            raise ValueError(
                f"The gradient of the embedding {name!r} is a sparse tensor, which `RowAdamW` does not take. Set "
                "`sparse=False`: a step still moves the rows of its tokens only."
            )
    return list(found.values())


def let_gradients_come_in_factors(embedding: nn.Embedding | nn.EmbeddingBag) -> None:
    """
    Let the gradient of an embedding come in factors if an optimizer takes them and few rows are looked up. It stays
    dense for embeddings that compute more than a lookup, or than the sum or mean of a bag.
    """
    is_plain = type(embedding).forward in [each.forward for each in EMBEDDINGS] and "forward" not in vars(embedding)
    computes_more = embedding.max_norm or embedding.scale_grad_by_freq or getattr(embedding, "mode", None) == "max"
    if is_plain and not computes_more and _in_factors not in embedding._forward_hooks.values():
        embedding.register_forward_hook(_in_factors, with_kwargs=True)


def embeddings_in_factors(model: nn.Module) -> list[nn.Embedding | nn.EmbeddingBag]:
    """The embeddings of a model whose gradients may come in factors."""
    found = [module for module in model.modules() if isinstance(module, EMBEDDINGS)]
    return [each for each in found if _in_factors in each._forward_hooks.values()]


def _arguments(input, offsets=None, per_sample_weights=None):
    return input, offsets, per_sample_weights


def _in_factors(embedding, args, kwargs, output):
    (rows, offsets, factors), weight = _arguments(*args, **kwargs), embedding.weight
    if (
        not output.requires_grad
        or is_traced()
        or factors is not None
        or rows.numel() > MOST_TOKENS * len(weight)
        or not takes_factors(weight)
    ):
        return None
    # Otherwise another hook has changed it.
    if output.grad_fn is None or output.grad_fn.name() not in ("EmbeddingBackward0", "EmbeddingBagBackward0"):
        return None
    padding = -1 if embedding.padding_idx is None else embedding.padding_idx
    coefficients = (rows.reshape(-1) != padding).to(torch.promote_types(weight.dtype, torch.float32))
    bags = None
    if isinstance(embedding, nn.EmbeddingBag):
        bags = _bags(rows, offsets, len(output))
        if embedding.mode == "mean":
            sizes = coefficients.new_zeros(len(output)).index_add_(0, bags, coefficients)
            coefficients /= sizes[bags].clamp(min=1)
    return _Rows.apply(weight, rows, output.detach(), coefficients, bags)


def _bags(rows, offsets, num_bags):
    """The bag of each lookup: int32, `(num_lookups,)`."""
    starts = torch.arange(num_bags, device=rows.device) * rows.shape[-1] if offsets is None else offsets[:num_bags]
    places = torch.arange(rows.numel(), dtype=starts.dtype, device=rows.device)
    return torch.searchsorted(starts, places, right=True, out_int32=True) - 1


class _Rows(torch.autograd.Function):
    """Autograd function that gives looked-up rows, or their bags, a gradient in factors."""

    @staticmethod
    def forward(ctx: Any, weight, rows, found, coefficients, bags):
        ctx.save_for_backward(rows, coefficients, bags)
        ctx.weight = weight
        ctx.mark_dirty(found)  # no copy, and no view, which could not be written in place
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient):
        rows, coefficients, bags = ctx.saved_tensors
        tokens = gradient.reshape(-1, ctx.weight.shape[1]).contiguous()
        kernels = resolve_kernels(None, ctx.weight)
        assignments = Assignments(rows.reshape(-1, 1).long(), len(ctx.weight), kernels, bags, len(tokens))
        factors = Factors(coefficients.reshape(-1, 1), tokens, assignments).summed()  # one for each distinct token
        return FactoredGradient(ctx.weight, [factors]), None, None, None, None
