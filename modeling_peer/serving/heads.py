# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Making a smaller model with fewer retrieval heads."""

import copy
from dataclasses import replace

import torch
from torch import nn

from ..arguments.check_types import check_types
from ..modeling_peer import PeerPreTrainedModel
from ..quantization.quantizer import replace_config
from ..router import AddedRouter, ProductKeyRouter


@check_types
@torch.no_grad()
def keep_heads(model: PeerPreTrainedModel, num_heads: int) -> PeerPreTrainedModel:
    """
    Keep the first retrieval heads of every PEER and PKM layer, and drop the others: each layer then returns the sum
    over the remaining heads. Routers of added experts keep all their heads. Call it before an optimizer, an adapter or
    a quantizer of another library gets the model. A saved model loads with the new number of heads.

    Args:
        model ([`PeerPreTrainedModel`]): A PEER model, which is changed in place.
        num_heads (`int`): How many heads to keep, at least one.

    Returns:
        The model.

    Raises:
        `ValueError`: if `num_heads` is less than one, or larger than the number of heads.

    ```python
    >>> model = keep_heads(PeerForCausalLM.from_pretrained("checkpoint"), 4)
    ```
    """
    if not 1 <= num_heads <= model.config.num_retrieval_heads:
        raise ValueError(f"`num_heads` must be from 1 to {model.config.num_retrieval_heads}, got {num_heads}.")
    for router in model.modules():
        if not isinstance(router, ProductKeyRouter) or isinstance(router, AddedRouter):
            continue
        router.num_heads, router.generation = num_heads, replace(router.generation, num_heads=num_heads)
        size = num_heads * router.query_size
        _keep_rows(router.query_proj, size, "weight")
        router.query_proj.out_features = size
        if router.norm_type == "batch":
            _keep_rows(router.query_norm, size, "weight", "bias", "running_mean", "running_var")
            router.query_norm.num_features = size
        if len(router.sub_keys) > 1:
            _keep_rows(router, num_heads, "sub_keys")
    config = copy.deepcopy(model.config)
    config.num_retrieval_heads = num_heads
    replace_config(model, config)
    return model


def _keep_rows(module, number, *names):
    for name in names:
        tensor = getattr(module, name)
        kept = tensor[:number].clone()
        setattr(module, name, nn.Parameter(kept, tensor.requires_grad) if name in module._parameters else kept)
