# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Product-key retrieval on kernels: scores and selection in one pass, and a backward that reads selected sub-keys."""

import torch
from torch.autograd.function import once_differentiable

from ..experts import retrieve
from .kernels import KERNELS, is_traced, needs_autograd, resolve_kernels
from .kernels_torch import empty_gradients


def retrieve_on_kernels(
    queries: torch.Tensor, sub_keys: torch.Tensor, k: int, kernels: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run [`~experts.retrieve`] with the kernels named `kernels`, or with the fastest ones if `None`."""
    name = resolve_kernels(kernels, sub_keys)
    if queries.dtype != torch.float32 or not hasattr(KERNELS[name], "retrieve"):
        return retrieve(queries, sub_keys, k)
    if is_traced():
        scores, indices = product_key_retrieval(queries, sub_keys, k, name)
    elif needs_autograd():
        scores, indices = ProductKeyRetrieval.apply(queries, sub_keys, k, name)
    else:
        return KERNELS[name].retrieve(queries, sub_keys, k)
    return indices, scores


@torch.library.custom_op("modeling_peer::product_key_retrieval", mutates_args=())
def product_key_retrieval(
    queries: torch.Tensor, sub_keys: torch.Tensor, k: int, kernels: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Run [`~experts.retrieve`] on kernels, with a backward that reads selected sub-keys only. Returns scores
    and expert indices.
    """
    indices, scores = KERNELS[kernels].retrieve(queries, sub_keys, k)
    return scores, indices


@product_key_retrieval.register_fake
def _(queries, sub_keys, k, kernels):
    scores = queries.new_empty(*queries.shape[:2], k)
    return scores, torch.empty_like(scores, dtype=torch.int64)


def _save_for_backward(ctx, inputs, output):
    queries, sub_keys, _, ctx.kernels = inputs
    ctx.save_for_backward(queries, sub_keys, output[1])
    ctx.mark_non_differentiable(output[1])


def _retrieval_gradients(gradient, indices, queries, sub_keys, wanted, kernels):
    """The gradients of [`product_key_retrieval`], see [`CpuKernels.retrieval_gradients`]."""
    return KERNELS[kernels].retrieval_gradients(gradient, indices, queries, sub_keys, wanted)


product_key_retrieval_gradients = torch.library.custom_op(
    "modeling_peer::product_key_retrieval_gradients",
    _retrieval_gradients,
    mutates_args=(),
    schema="(Tensor gradient, Tensor indices, Tensor queries, Tensor sub_keys, bool[] wanted, str kernels)"
    " -> (Tensor, Tensor)",
)


@product_key_retrieval_gradients.register_fake
def _(gradient, indices, queries, sub_keys, wanted, kernels):
    return empty_gradients(queries, sub_keys, wanted)


def _backward(ctx, gradient, _, compute=product_key_retrieval_gradients):
    queries, sub_keys, indices = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    found = compute(gradient, indices, queries, sub_keys, wanted, ctx.kernels)
    return *(each if is_wanted else None for each, is_wanted in zip(found, wanted, strict=True)), None, None


product_key_retrieval.register_autograd(_backward, setup_context=_save_for_backward)


class ProductKeyRetrieval(torch.autograd.Function):
    """[`product_key_retrieval`] for autograd alone, without the dispatcher, which takes 0.1 ms."""

    @staticmethod
    def forward(ctx, queries, sub_keys, k, kernels):
        indices, scores = KERNELS[kernels].retrieve(queries, sub_keys, k)
        _save_for_backward(ctx, (queries, sub_keys, k, kernels), (scores, indices))
        ctx.set_materialize_grads(False)  # indices have none
        return scores, indices

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, _):
        return _backward(ctx, gradient, None, _retrieval_gradients)
