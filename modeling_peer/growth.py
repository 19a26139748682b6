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
"""Adding experts to a trained model."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import initialization as init

from .expert_table import ExpertTable
from .feed_forward_peer import ExpertPool, PeerFeedForward
from .frozen_rows import check_can_freeze, freeze_rows
from .generations import check_additions, generations_of
from .modeling_peer import PeerPreTrainedModel
from .product_key_router import AddedRouter
from .product_keys import grid_size


@dataclass(frozen=True)
class Addition:
    """
    What [`add_experts`] did.

    Args:
        experts (`dict[int, range]`): The numbers of the new experts in each layer.
        deviation (`float`): The largest difference that the growth made to an output of the model, before any training.
    """

    experts: dict[int, range]
    deviation: float


def add_experts(
    model: PeerPreTrainedModel,
    num_experts: int,
    *,
    layers: Iterable[int] | int | None = None,
    mode: str = "protected",
    num_retrieval_heads: int | None = None,
    num_experts_per_head: int | None = None,
    inputs: torch.Tensor | None = None,
) -> Addition:
    """
    Gives a trained model more experts, in its configuration too, and leaves nothing but them to be trained, see
    [`train_added_experts_only`]. Old experts keep their numbers and rows; new ones are silent at first, v_i = 0. An
    optimizer has to be made anew.

    `mode="protected"`: the new experts are a generation with a router, a softmax and a gate of their own (see
    [`AddedRouter`]), whose query network starts as a copy of the layer's. Outputs stay what they were. Whatever is
    trained on the new experts, a model that masks them ([`masked_experts`]) computes what it did before, to the bit.
    Costs what `num_retrieval_heads · num_experts_per_head` experts and their retrieval cost.

    `mode="open"`: the key grid gets larger, and new keys compete with the old ones for the same k places of a head, at no
    cost per token but that of their scores. New experts that win a place take weight from the old ones at once.

    Args:
        model ([`PeerPreTrainedModel`]): With PEER layers.
        num_experts (`int`):
            Number of experts to add to each layer, or to the pool they share: in protected mode a perfect square, in open
            mode what is missing to one.
        layers (`int` or iterable of `int`, *optional*): The layers to grow, all PEER layers if not given.
        mode (`str`, *optional*, defaults to `"protected"`): `"protected"` or `"open"`.
        num_retrieval_heads (`int`, *optional*):
            Heads that retrieve protected new experts, at most those of the configuration, which is the default.
        num_experts_per_head (`int`, *optional*):
            Protected new experts that a head retrieves; as in the configuration if not given.
        inputs (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            Tokens to measure the deviation on. Random ones if not given.

    Returns:
        [`Addition`]: the numbers of the new experts, and how much the outputs changed.

    Raises:
        `ValueError`: for a model that is no PEER model, has no PEER layer or is split over processes, or a size that cannot
            be. The model is left as it was.

    ```python
    >>> from modeling_peer import add_experts, fit_gates, masked_experts

    >>> add_experts(model, 64**2)
    >>> fit_gates(model, new_text, reference_text)  # so that they do not speak where they were not asked
    >>> Trainer(model, args, train_dataset=new_text).train()
    >>> with masked_experts(model):
    ...     model.generate(**inputs)  # what it would have written before
    ```
    """
    _check_model(model)
    grown = _peer_layers(model, layers)
    config = model.config
    addition = {"layers": sorted(grown), "mode": mode, "num_experts": num_experts}
    if mode == "protected":
        addition["num_retrieval_heads"] = num_retrieval_heads or config.num_retrieval_heads
        addition["num_experts_per_head"] = num_experts_per_head or config.num_experts_per_head
    elif num_retrieval_heads is not None or num_experts_per_head is not None:
        raise ValueError("`num_retrieval_heads` and `num_experts_per_head` are of protected experts; open ones share.")
    _check(model, addition)
    before = _outputs(model, inputs)
    # Pools first: what they hold is the most, and may not fit.
    pools = {id(_pool(model, layer)): (_pool(model, layer), index) for index, layer in grown.items()}
    old_sizes = {index: generations_of(config, index)[-1].experts.stop for index in grown}
    config.expert_additions = [*(config.expert_additions or []), addition]
    for pool, index in pools.values():
        _grow_pool(model, pool, generations_of(config, index), mode)
    for index, layer in grown.items():
        _grow_layer(model, layer, generations_of(config, index), mode)
    train_added_experts_only(model)
    after = _outputs(model, inputs)
    experts = {index: range(size, size + num_experts) for index, size in old_sizes.items()}
    return Addition(experts, (after - before).abs().max().item())


def train_added_experts_only(model: PeerPreTrainedModel) -> None:
    """
    Freezes all of a grown model but the experts of its last addition, their keys, and, if it was a protected one, their
    query network; gates are [`fit_gates`]'s. [`add_experts`] does so; it has to be said again of a model that was loaded, or copied.

    In layers with an open addition the old rows of tables and keys are frozen by [`freeze_rows`].

    Raises:
        `ValueError`: if no experts were added.
    """
    if not model.config.expert_additions:
        raise ValueError("No experts were added to this model: `expert_additions` of its configuration is empty.")
    addition = model.config.expert_additions[-1]
    model.requires_grad_(False)
    for layer in _peer_layers(model, addition["layers"]).values():
        pool = _pool(model, layer)
        if addition["mode"] == "protected":
            layer.added_routers[-1].requires_grad_(True).gate.requires_grad_(False)
            pool.added[-1].requires_grad_(True)
        else:
            _freeze_old_rows(layer.router, pool, addition["num_experts"])


def _peer_layers(model, layers):
    """The PEER layers of a model by their index in it, all or those named."""
    found = {module.layer_idx: module for module in model.modules() if isinstance(module, PeerFeedForward)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no PEER layer that could get more experts.")
    if layers is None:
        return found
    layers = [layers] if isinstance(layers, int) else list(layers)
    if unknown := [layer for layer in layers if layer not in found]:
        raise ValueError(f"`layers` must be some of the PEER layers {sorted(found)}, got {unknown} among them.")
    return {layer: found[layer] for layer in layers}


def _freeze_old_rows(router, pool, num_added):
    num_old = router.generation.num_experts - num_added
    old_sizes = {(router.sub_keys, 2): grid_size(num_old)}
    old_sizes |= {(table.weight, 0): num_old for table in _tables(pool)}
    for (parameter, dim), size in old_sizes.items():
        parameter.requires_grad_(True)
        freeze_rows(parameter, torch.arange(parameter.shape[dim]) < size, dim)


def _check_model(model):
    if not isinstance(model, PeerPreTrainedModel):
        raise ValueError(
            f"Experts can be added to PEER models, got {type(model).__name__}. Of a model with adapters, merge or unload them "
            "first; a model with grafts takes another graft."
        )
    for parameter in model.parameters():
        check_can_freeze(parameter)


def _check(model, addition):
    """Raises `ValueError` if the model cannot grow so."""
    config = copy.deepcopy(model.config)
    config.expert_additions = [*(config.expert_additions or []), addition]
    check_additions(config)
    if addition["mode"] == "protected" and addition["num_retrieval_heads"] > config.num_retrieval_heads:
        raise ValueError(
            f"`num_retrieval_heads` must be at most {config.num_retrieval_heads}, those of the layer, whose query network "
            f"new experts start with, got {addition['num_retrieval_heads']}."
        )


def _pool(model, layer):
    return layer.expert_pool if layer.expert_pool is not None else model.base_model.expert_pool


def _tables(pool):
    """Those of a pool's first generation."""
    return [module for module in pool.children() if isinstance(module, ExpertTable)]


@torch.no_grad()
def _outputs(model, inputs):
    """What the model puts out in evaluation, on random tokens if not told on which."""
    training = model.training
    if inputs is None:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randint(model.config.vocab_size, (4, 64), generator=generator)
    try:
        return model.eval()(inputs.to(model.device), use_cache=False)[0].float()
    finally:
        model.train(training)


def _grow_pool(model, pool, generations, mode):
    if mode == "protected":
        reference = pool.up_proj.weight
        pool.added.append(_initialised(model, ExpertPool(model.config, generations[-1:]), reference))
        return
    for table in _tables(pool):
        rows = torch.zeros if table is pool.down_proj else torch.empty
        added = rows(generations[0].num_experts - table.num_embeddings, table.embedding_dim, dtype=table.weight.dtype)
        if table is not pool.down_proj:
            init.normal_(added, std=table.init_std)
        table.append_rows(added.to(table.weight.device))


def _grow_layer(model, layer, generations, mode):
    if mode == "open":
        layer.router.enlarge(generations[0])
        return
    router = _initialised(model, AddedRouter(model.config, generations[-1]), layer.router.sub_keys)
    router.copy_query_network(layer.router)
    layer.added_routers.append(router)


def _initialised(model, module, reference):
    """A new module, where and of the type that a parameter of the model is, its weights as those of a new model."""
    module.apply(model._init_weights)
    statistics = dict(module.named_buffers())
    module.to(reference.device, reference.dtype).train(model.training)
    for name, buffer in statistics.items():  # in float32 whatever the model is in
        module.get_buffer(name).data = buffer.to(reference.device)
    return module


__all__ = ["Addition", "add_experts", "train_added_experts_only"]
