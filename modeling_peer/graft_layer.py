# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
PEER layers beside or in place of feed-forwards of another model, the base model: the graft, the module that holds
merged grafts, and the state of the decoder's forward pass that grafts read.
"""

import functools
import inspect
import operator
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .configuration_peer import PeerConfig
from .feed_forward import PeerFeedForward
from .router import AddedRouter, ForwardPass, QueryBatchNorm


# The method of PEFT, and the prefix of the names of its adapters' modules.
METHOD_NAME = "peer_graft"
PREFIX = f"{METHOD_NAME}_"

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
)


def find_decoder_layers(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """
    The name of the list of layers of a base model, and the module that holds the list. Raises `ValueError` if there is
    no list of `config.num_hidden_layers` modules, or several.
    """
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    decoder = set(model.get_decoder().modules())
    found: dict[str, bool] = {}  # by name, whether the list is in the text decoder
    for name, module in model.named_modules():
        inside_another = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and not inside_another:
            found[name] = module in decoder
    names = [name for name in found if found[name]] or list(found)
    if len(names) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(names)} lists of `config.num_hidden_layers` = {num_layers} layers, "
            f"{names}: a graft needs a decoder of Transformers, with one."
        )
    return names[0], model.get_submodule(names[0].rpartition(".")[0])


class DecoderForward(threading.local):
    """
    State of a decoder's present forward pass, which its grafts read: the `attention_mask`, `position_ids` and `cache`
    that the decoder got, the `embeddings` that entered the first layer, and `learns`, whether a backward pass may
    follow. Each is `None` outside of a forward pass. Each thread has its own values.

    The layers of a base model pass only hidden states to a feed-forward. Hooks of the decoder therefore store the rest
    in this object, which all its grafts hold. See [`watch_decoder`].
    """

    def __init__(self, decoder: nn.Module):
        self.decoder = decoder
        # Not class attributes: the compiler of torch 2.9 takes those for the values of the instance.
        self.attention_mask: torch.Tensor | dict | None = None
        self.position_ids: torch.Tensor | None = None
        self.cache: Any = None
        self.embeddings: torch.Tensor | None = None
        self.has_embeddings = False
        # Functions to call with the cache at the end of the pass: before, there may be no cache.
        self.to_keep: list[Callable[[Any], None]] = []
        self.learns: bool | None = None

    def begin(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note the arguments of a forward pass of the decoder, as a forward pre-hook."""
        arguments = kwargs
        if args:
            arguments = {**inspect.signature(decoder.forward).bind_partial(*args).arguments, **kwargs}
        self.attention_mask = arguments.get("attention_mask")
        self.position_ids = arguments.get("position_ids")
        self.cache = _cache_in(arguments)
        self.embeddings, self.to_keep = None, []
        self.learns = decoder.training and torch.is_grad_enabled()

    def watch_embeddings(self, layers: nn.ModuleList) -> None:
        """Note from now on the `embeddings` that enter the first layer."""
        if not self.has_embeddings:
            self.has_embeddings = True
            layers[0].register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, layer, args, kwargs):
        self.embeddings = args[0] if args else kwargs["hidden_states"]
        if self.learns is None:  # an engine called the decoder's `forward`, without hooks
            self.position_ids, self.to_keep = kwargs.get("position_ids"), []

    def end(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        """Forget the forward pass, as a forward hook."""
        cache = _cache_in(getattr(output, "__dict__", {})) if self.cache is None else self.cache
        for keep in self.to_keep if cache is not None else []:
            keep(cache)
        self.attention_mask = self.position_ids = self.cache = self.embeddings = self.learns = None
        self.to_keep = []

    def __deepcopy__(self, memo):
        # A copy of the whole decoder gets a new object. A copy of a layer, as in PEFT's `modules_to_save`, keeps this.
        return DecoderForward(memo[id(self.decoder)]) if id(self.decoder) in memo else self

    def __reduce__(self):
        return DecoderForward, (self.decoder,)


def _cache_in(values: dict[str, Any]) -> Any:
    """The cache among a decoder's arguments or outputs, under either of its names in Transformers releases."""
    return next((values[name] for name in ("cache", "past_key_values") if values.get(name) is not None), None)


def is_in_backward() -> bool:
    """Whether the caller runs in a backward pass, as when activation checkpointing recomputes a layer."""
    return torch._C._current_graph_task_id() != -1


class PeerGraft(PeerFeedForward):
    """
    A PEER layer in a base model. Its `router` and `expert_pool` are those of [`PeerFeedForward`].

    With `has_biases` every expert has a bias of its neuron and of its gate. These are the last elements of u_i and
    w_i, which are multiplied by an additional feature of one. `output_bias` is added to the output.

    Args:
        config (`PeerConfig`): `hidden_size` is that of the base model, one more with `has_biases`.
        has_biases (`bool`, *optional*, defaults to `False`)
        has_gate (`bool`, *optional*, defaults to `False`): Whether its router has a gate, see [`AddedRouter`].
    """

    # Whether, of all grafts of this kind, only the last one that opens for a token contributes there.
    answers_alone = False

    def __init__(self, config: PeerConfig, has_biases: bool = False, has_gate: bool = False):
        super().__init__(config, layer_idx=0)
        if has_gate:
            self.router = AddedRouter(config, self.router.generation)
        self.config = config
        # Set by `watch_decoder`. If `None`, each call of `forward` is a forward pass of its own.
        self.decoder_forward: DecoderForward | None = None
        # For activation checkpointing, which runs a BatchNorm again when the decoder's forward pass is over.
        self.mask_to_recompute_with: torch.Tensor | dict | None = None
        self.output_bias = nn.Parameter(torch.empty(config.hidden_size - 1)) if has_biases else None

    def watch(self, decoder_forward: DecoderForward, layers: nn.ModuleList) -> None:
        """Read the state of forward passes of a decoder with these layers from `decoder_forward`."""
        self.decoder_forward = decoder_forward

    def init_own_weights(self) -> None:
        """Initialize its own parameters alone, as every module of a PEER model does."""
        if self.output_bias is not None:
            init.zeros_(self.output_bias)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize all weights as in a PEER model, with `config.initializer_range`."""
        module: Any
        for module in self.modules():
            if hasattr(module, "init_own_weights"):
                module.init_own_weights()
            elif hasattr(module, "init_std"):
                init.normal_(module.weight, std=module.init_std)
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
        hidden_states = hidden_states.to(next(self.router.parameters()).dtype)
        recomputes = is_in_backward()
        decoder = self.decoder_forward
        learns = torch.is_grad_enabled() if decoder is None or decoder.learns is None else decoder.learns
        padding_mask = self._padding_mask(hidden_states, learns or recomputes, recomputes)
        forward_pass = ForwardPass(learns or recomputes, has_ended=recomputes)
        if self.output_bias is None:
            return super().forward(hidden_states, padding_mask, forward_pass=forward_pass).to(dtype)
        ones = hidden_states.new_ones(*hidden_states.shape[:-1], 1)
        output = super().forward(torch.cat([hidden_states, ones], dim=-1), padding_mask, forward_pass=forward_pass)
        return (output[..., :-1] + self.output_bias).to(dtype)

    def _padding_mask(self, hidden_states, learns, recomputes):
        """
        The padding mask of the inputs, `None` if there is none. A recomputation needs it only for the moments of a
        BatchNorm, and then takes the mask of the graft's last forward: no other batch may come between.
        """
        attention_mask = None if self.decoder_forward is None else self.decoder_forward.attention_mask
        if learns and isinstance(self.router.query_norm, QueryBatchNorm):
            if recomputes:
                attention_mask = self.mask_to_recompute_with
            self.mask_to_recompute_with = attention_mask
        elif recomputes:
            return None
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
            return None
        # Layers of the base model may be on several devices.
        return attention_mask[:, -hidden_states.shape[1] :].to(hidden_states.device)


class GraftedFeedForward(nn.Module):
    """
    Replaces a feed-forward in a base model with merged grafts: adds the outputs of the grafts and, unless a graft took
    its place, of the base model's own feed-forward.
    """

    def __init__(self, feed_forward: nn.Module | None, grafts: list[PeerGraft]):
        super().__init__()
        self.feed_forward = feed_forward
        self.grafts = nn.ModuleList(grafts)
        # Whether the model's configuration describes them, so that a checkpoint loads with them.
        self.is_merged = False
        self.register_state_dict_pre_hook(_refuse_if_not_merged)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return sum_of_branches(self.feed_forward, self.grafts, hidden_states, **kwargs)


def _refuse_if_not_merged(module, prefix, keep_vars):
    if not module.is_merged:
        raise ValueError(
            f"The model has grafts at {prefix.removesuffix('.') or 'a feed-forward'} that its configuration does not "
            "describe, so a checkpoint would not load with them: `merge_and_unload` of another method left them. "
            "Merge them first, with `modeling_peer.graft_merged.merge_grafts(model)`."
        )


def sum_of_branches(
    feed_forward: nn.Module | None, grafts: Iterable[nn.Module], hidden_states: torch.Tensor, **kwargs
) -> torch.Tensor:
    """
    Add the outputs of grafts and of a feed-forward, if there is one. There must be at least one output. Of the grafts
    with `answers_alone`, only the last one that opens for a token contributes there.
    """
    outputs: list[torch.Tensor] = []
    answered = None
    for graft in reversed(list(grafts)):
        output = graft(hidden_states)
        if graft.answers_alone:
            is_open = output.any(-1, keepdim=True)
            if answered is not None:
                output = output.masked_fill(answered, 0.0)
            answered = is_open if answered is None else answered | is_open
        outputs.append(output)
    if feed_forward is not None:
        outputs.append(feed_forward(hidden_states, **kwargs))
    return functools.reduce(operator.add, reversed(outputs))


def watch_decoder(model: PreTrainedModel) -> None:
    """
    Connect all present grafts of a model to the forward passes of its decoder, see [`DecoderForward`]. Call it again
    after adding grafts. The hooks stay when grafts are removed.
    """
    name, decoder = find_decoder_layers(model)
    decoder_forward = getattr(decoder, f"{PREFIX}forward", None)
    if decoder_forward is None:
        decoder_forward = DecoderForward(decoder)
        decoder.register_forward_pre_hook(decoder_forward.begin, with_kwargs=True)
        decoder.register_forward_hook(decoder_forward.end, always_call=True)
        setattr(decoder, f"{PREFIX}forward", decoder_forward)
    layers: Any = model.get_submodule(name)
    for module in decoder.modules():
        if isinstance(module, PeerGraft):
            module.watch(decoder_forward, layers)


def peer_config_of_base_model(
    base_config: PreTrainedConfig, hidden_size: int, intermediate_size: int, **fields
) -> PeerConfig:
    """
    The configuration of a PEER layer in a base model: fields of [`PeerConfig`], the width of the layer and that of the
    base model's feed-forward.
    """
    return PeerConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=2,
        feed_forward_types=["peer"],
        hidden_act=base_activation(base_config) or "silu",
        initializer_range=getattr(base_config, "initializer_range", None) or PeerConfig.initializer_range,
        **fields,
    )


def base_activation(base_config: PreTrainedConfig) -> str | None:
    """The activation in the base model's feed-forwards, by the name in its configuration; `None` if it names none."""
    names = ("hidden_act", "hidden_activation", "activation_function")
    values = (getattr(base_config, name, None) for name in names)
    return next((value for value in values if isinstance(value, str)), None)
