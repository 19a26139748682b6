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
"""
PEER beside or in place of the feed-forward of a layer of another model, its host: the feed-forwards that are recognized,
the graft, and what the host's decoder tells it.
"""

import functools
import inspect
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .configuration_peer import PeerConfig
from .expert_kernels import check_expert_kernels
from .feed_forward_peer import PeerFeedForward
from .forward_pass import ForwardPass
from .library_releases import in_backward
from .modeling_peer import padding_mask_of
from .query_norm import QueryBatchNorm
from .sparse_gradients import check_sparse_gradients


# The method of PEFT, and what the names of its adapters' modules start with.
METHOD_NAME = "peer_graft"
PREFIX = f"{METHOD_NAME}_"

PLACEMENTS = ("beside", "in_place")

# Fields that a graft shares with PeerConfig, under the same names.
LAYER_FIELDS = (
    "num_experts",
    "num_retrieval_heads",
    "num_experts_per_head",
    "query_size",
    "query_norm",
    "scoring_func",
    "sub_keys_per_head",
    "expert_act",
    "gated_experts",
    "expert_kernels",
    "sparse_expert_gradients",
)


def find_decoder_layers(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """
    Where a host has its layers: the name of the list of them in `model`, and the module that holds the list.

    Raises:
        `ValueError`: if there is no list of `config.num_hidden_layers` modules, or several.
    """
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    decoder = set(model.get_decoder().modules())
    found: dict[str, bool] = {}  # whether it is in the decoder of text, by name
    for name, module in model.named_modules():
        inside_another = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and not inside_another:
            found[name] = module in decoder
    names = [name for name in found if found[name]] or list(found)
    if len(names) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(names)} lists of `config.num_hidden_layers` = {num_layers} layers, {names}: a "
            "graft needs a decoder of the library."
        )
    return names[0], model.get_submodule(names[0].rpartition(".")[0])


class PeerGraft(PeerFeedForward):
    """
    A PEER layer in another model. Its `router` and `expert_pool` are those of [`PeerFeedForward`].

    With `has_biases` every expert has a bias, of its neuron and its gate: hidden states get a last feature that is one,
    and rows a last number that is multiplied with it. `output_bias` is added to what comes out.

    Args:
        config (`PeerConfig`): See [`peer_config_of_host`]. `hidden_size` is that of the host, one more with `has_biases`.
        has_biases (`bool`, *optional*, defaults to `False`)
    """

    def __init__(self, config: PeerConfig, has_biases: bool = False):
        super().__init__(config, layer_idx=0)
        self.config = config
        # Whatever mask the host was given; `None` if none.
        self.attention_mask: torch.Tensor | dict | None = None
        # The decoder's last one; `None` before the first.
        self.forward_pass: ForwardPass | None = None
        self.output_bias = nn.Parameter(torch.empty(config.hidden_size - 1)) if has_biases else None

    def init_own_weights(self) -> None:
        """Its own parameters alone, as every module of a PEER model does."""
        if self.output_bias is not None:
            init.zeros_(self.output_bias)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws weights as those of a PEER model are drawn, with `config.initializer_range`."""
        module: Any
        for module in self.modules():
            if hasattr(module, "init_own_weights"):
                module.init_own_weights()
            elif isinstance(module, nn.Linear):
                init.normal_(module.weight, std=self.config.initializer_range)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): In any dtype.

        Returns:
            `torch.Tensor` of the shape and dtype of `hidden_states`, computed in the dtype of the graft's parameters.
        """
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(self.router.sub_keys.dtype)
        padding_mask = self._padding_mask(hidden_states)
        if self.output_bias is None:
            return super().forward(hidden_states, padding_mask, forward_pass=self.forward_pass).to(dtype)
        ones = hidden_states.new_ones(*hidden_states.shape[:-1], 1)
        output = super().forward(
            torch.cat([hidden_states, ones], dim=-1), padding_mask, forward_pass=self.forward_pass
        )
        return (output[..., :-1] + self.output_bias).to(dtype)

    def _padding_mask(self, hidden_states):
        """
        Of the host's last forward. Another one may have come between a forward that activation checkpointing runs again in
        the backward and that: only a BatchNorm needs its mask there.
        """
        if in_backward() and not isinstance(self.router.query_norm, QueryBatchNorm):
            return None
        padding_mask = padding_mask_of(self.attention_mask, hidden_states.shape[1])
        # A host's layers may be on several devices.
        return None if padding_mask is None else padding_mask.to(hidden_states.device)


class GraftedFeedForward(nn.Module):
    """
    What stands in a layer of a host whose grafts are part of the model: the sum of the host's own feed-forward, unless a
    graft took its place, and of the grafts.

    Args:
        feed_forward (`nn.Module`, *optional*): `None` if a graft took its place.
        grafts (`list[PeerGraft]`)
    """

    def __init__(self, feed_forward: nn.Module | None, grafts: list[PeerGraft]):
        super().__init__()
        self.feed_forward = feed_forward
        self.grafts = nn.ModuleList(grafts)
        # Whether the model's configuration has them, so that they come back when it is loaded.
        self.is_merged = False
        self.register_state_dict_pre_hook(_refuse_if_not_merged)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return sum_of_branches(self.feed_forward, self.grafts, hidden_states, **kwargs)


def _refuse_if_not_merged(module, prefix, keep_vars):
    if not module.is_merged:
        raise ValueError(
            f"There are grafts at {prefix.removesuffix('.') or 'a feed-forward'} that the model would not be loaded with: "
            "another method's `merge_and_unload` left them. Make them a part of it by `modeling_peer.graft_merged.merge_grafts(model)`."
        )


def sum_of_branches(
    feed_forward: nn.Module | None, grafts: Iterable[nn.Module], hidden_states: torch.Tensor, **kwargs
) -> torch.Tensor:
    """The output of a host's feed-forward, unless it is `None`, and of grafts, of which there is one if it is."""
    outputs = [] if feed_forward is None else [feed_forward(hidden_states, **kwargs)]
    outputs += [graft(hidden_states) for graft in grafts]
    return functools.reduce(operator.add, outputs)


def watch_decoder(decoder: nn.Module) -> list:
    """
    Lets the grafts in a host's decoder know, before each forward, whether it is one to learn from and where its batch is
    padded, and folds the moments of their query norms after it.

    Returns:
        `list`: handles of the hooks, each with a method `remove`; none if the decoder has them.
    """
    if _before_forward in decoder._forward_pre_hooks.values():
        return []
    return [
        decoder.register_forward_pre_hook(_before_forward, with_kwargs=True),
        decoder.register_forward_hook(_after_forward),
    ]


def _before_forward(decoder, args, kwargs):
    """See `PeerModel`, which does the same. The mask stays: activation checkpointing runs layers again in the backward."""
    attention_mask = kwargs.get("attention_mask")
    if attention_mask is None and args:
        attention_mask = inspect.signature(decoder.forward).bind_partial(*args).arguments.get("attention_mask")
    forward_pass = ForwardPass(learns=decoder.training and torch.is_grad_enabled())
    for graft in decoder.modules():
        if not isinstance(graft, PeerGraft):
            continue
        if forward_pass.learns:
            check_sparse_gradients(graft)
        graft.attention_mask = attention_mask
        graft.forward_pass = forward_pass


def _after_forward(decoder, args, output):
    """Running statistics take up a batch once, where a layer's forward may run twice."""
    for module in decoder.modules():
        if isinstance(module, PeerGraft) and module.forward_pass is not None:
            module.forward_pass.end()


def peer_config_of_host(
    host_config: PreTrainedConfig, hidden_size: int, intermediate_size: int, **fields
) -> PeerConfig:
    """
    The configuration of a PEER layer in a host. Raises `ValueError` as [`PeerConfig`] and [`PeerModel`] do.

    Args:
        host_config (`PreTrainedConfig`)
        hidden_size (`int`): Of the layer.
        intermediate_size (`int`): Of the host's feed-forward.
        fields: Fields of [`PeerConfig`].
    """
    config = PeerConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=2,
        feed_forward_types=["peer"],
        hidden_act=host_activation(host_config) or "silu",
        initializer_range=getattr(host_config, "initializer_range", None) or PeerConfig.initializer_range,
        **fields,
    )
    check_expert_kernels(config.expert_kernels)
    return config


def host_activation(host_config: PreTrainedConfig) -> str | None:
    """Name of the activation in the host's feed-forwards, as its configuration has it."""
    for name in ("hidden_act", "hidden_activation", "activation_function"):
        value = getattr(host_config, name, None)
        if isinstance(value, str):
            return value
    return None
