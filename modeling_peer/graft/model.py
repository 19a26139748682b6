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
"""PEER grafts as adapters of PEFT: the layer around a feed-forward, and the tuner that puts it into a base model."""

import copy
import math
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..expert_table import refuse_quantized
from ..gradient_exchange import names_of_tables
from ..graft_layer import (
    LAYER_FIELDS,
    METHOD_NAME,
    PREFIX,
    GraftedFeedForward,
    PeerGraft,
    base_activation,
    find_decoder_layers,
    peer_config_of_base_model,
    sum_of_branches,
    unwatch_decoder,
    watch_decoder,
)
from ..graft_merged import base_model_type, check_mergeable, merge_grafts
from ..memory_group import is_split
from ..split_checkpoints import state_dict_to_save
from .adapter_card import write_pushed_card
from .base_feed_forward import FeedForwardParts, recognize_feed_forward, whole_feed_forward
from .config import PeerGraftConfig
from .initialization import computes, init_graft
from .peft_releases import asking_for_peft, call_before_upload
from .registration import register_peer_graft
from .target_modules import register_target_modules


with asking_for_peft():
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists


class PeerGraftLayer(nn.Module, BaseTunerLayer):
    """
    Wraps a feed-forward of a base model: adds the outputs of active grafts beside it, and skips it for a graft in its
    place.

    Args:
        base_layer (`nn.Module`): The base model's feed-forward.
    """

    adapter_layer_names = (f"{PREFIX}layer",)
    other_param_names = (f"{PREFIX}placement",)

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.peer_graft_layer = nn.ModuleDict()
        self.peer_graft_placement: dict[str, str] = {}
        self.register_state_dict_pre_hook(_refuse_to_save_quantized)

    def add_graft(self, adapter_name: str, graft: PeerGraft, placement: str) -> None:
        """Add a graft, on the device of the feed-forward and with parameters of its dtype."""
        dtype = next(self.base_layer.parameters()).dtype
        # Running statistics of queries stay in float32, and so does all of it in a model that is quantized to
        # integers.
        for parameter in graft.parameters() if dtype.is_floating_point else ():
            parameter.data = parameter.data.to(dtype)
        self.peer_graft_layer[adapter_name] = graft
        self.peer_graft_placement[adapter_name] = placement
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name, device=None):
        if adapter_name not in self.peer_graft_layer:
            return
        graft = self.peer_graft_layer[adapter_name]
        if not any(parameter.is_meta for parameter in graft.parameters()):
            graft.to(device or next(self.base_layer.parameters()).device)

    def active_grafts(self, adapter_names: list[str] | None = None) -> list[PeerGraft]:
        """The grafts of the named adapters, of the active ones if `None`."""
        names = self.active_adapters if adapter_names is None else adapter_names
        return [self.peer_graft_layer[name] for name in names if name in self.peer_graft_layer]

    def remaining_feed_forward(self, adapter_names: list[str] | None = None) -> nn.Module | None:
        """The feed-forward; `None` if a graft of the named adapters, or of the active ones, is in its place."""
        names = self.active_adapters if adapter_names is None else adapter_names
        replaced = any(self.peer_graft_placement.get(name) == "in_place" for name in names)
        return None if replaced else self.base_layer

    def check_places(self, adapter_names: list[str] | None, name: str) -> None:
        """
        Raise `ValueError` if several grafts, of the named adapters or the active ones, would be in place of the
        feed-forward.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        replacing = [each for each in names if self.peer_graft_placement.get(each) == "in_place"]
        if len(replacing) > 1:
            raise ValueError(f"Only one of the adapters {replacing} can be in place of {name}.")

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT. Raise `ValueError` as [`~PeerGraftLayer.check_places`] does."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.check_places(names, "a feed-forward")
        super().set_adapter(names, inference_mode=inference_mode)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        if self.disable_adapters:
            return self.base_layer(hidden_states, **kwargs)
        return sum_of_branches(self.remaining_feed_forward(), self.active_grafts(), hidden_states, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise `ValueError`: the base model has no weights that could express a graft."""
        raise ValueError(
            "A graft cannot be merged into the weights of its base model. `merge_and_unload()` makes it a module of "
            "the model."
        )

    def unmerge(self) -> None:
        """Raise `ValueError`, as `merge` does."""
        raise ValueError("A graft is never merged into the weights of its base model: there is nothing to undo.")

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What stays in the base model: its feed-forward and, with `merge`, the grafts."""
        if not merge or not self.active_grafts(adapter_names):
            return self.base_layer
        return GraftedFeedForward(self.remaining_feed_forward(adapter_names), self.active_grafts(adapter_names))

    def __repr__(self) -> str:
        return f"{METHOD_NAME}.{super().__repr__()}"


def _refuse_to_save_quantized(layer, prefix, keep_vars):
    refuse_quantized(layer.peer_graft_layer, "The state dict of an adapter")


class PeerGraftModel(BaseTuner):
    """
    A base model with grafts, see [`PeerGraftConfig`].

    Grafts of a bfloat16 base model are in float32 unless `autocast_adapter_dtype` is `False`, as in all of PEFT;
    `load_adapter` of Transformers keeps the dtype of the base model.

    Padding is taken from the attention mask that the base model's decoder gets. Where that is no mask of tokens, as in
    a multimodal Gemma 3, padding counts in the query BatchNorm and in measures of expert usage.

    Several adapters may be active at a layer, one of them in place of its feed-forward. `merge_and_unload` returns a
    model without PEFT in which the grafts are modules, see [`PeerGraftedConfig`].

    Args:
        model (`PreTrainedModel`): The base model.
        config (`PeerGraftConfig` or `dict[str, PeerGraftConfig]`):
            What is found in the base model is filled in, as methods of PEFT do: use another one for another base
            model.
        adapter_name (`str`)
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Whether to make grafts on the meta device, to be
            loaded.

    Raises:
        `ValueError`: for a layer that does not exist or whose feed-forward is not recognized, an adapter of another
            base model, or experts that do not fit the feed-forward. The base model is left as it was.
    """

    prefix = PREFIX
    tuner_layer_cls = PeerGraftLayer
    target_module_mapping: dict[str, list[str]] = {}

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DistributedDataParallel reads it of the `PeftModel` that it wraps, which asks this part of it.
        return [f"base_model.{name}" for name in names_of_tables(self)]

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        """As in PEFT, after every check that may refuse the adapter."""
        try:
            self._check_and_resolve(model, adapter_name)
            requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
            try:
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            except BaseException:
                self._take_out(adapter_name)
                for parameter, required in requires_grad:
                    parameter.requires_grad_(required)
                raise
        except BaseException:
            # PEFT added it before this method; the name must stay free for another try.
            self.peft_config.pop(adapter_name, None)
            raise
        watch_decoder(find_decoder_layers(model)[1])

    def _check_and_resolve(self, model, adapter_name):
        """Fill in the configuration of an adapter, or raise `ValueError` if it does not fit the base model."""
        config = self.peft_config[adapter_name]
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"A graft needs a base model of Transformers, a `PreTrainedModel`, got {type(model).__name__}."
            )
        _check_adapter_name(adapter_name, model)
        config.check()
        _check_same_base(config, _base_fields(model.config))
        targets = _find_targets(config, model)
        _check_same_base(config, _feed_forward_fields(targets))
        _resolve(config, model, targets)

    def _take_out(self, adapter_name):
        """Take out what was injected of an adapter before an error."""
        for name, layer in self._graft_layers().items():
            if adapter_name in layer.peer_graft_layer:
                layer.delete_adapter(adapter_name)
            if not layer.peer_graft_layer:
                self.model.set_submodule(name, layer.base_layer)

    def _graft_layers(self) -> dict[str, PeerGraftLayer]:
        return {name: each for name, each in self.model.named_modules() if isinstance(each, PeerGraftLayer)}

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ):
        layer = target if isinstance(target, PeerGraftLayer) else PeerGraftLayer(target)
        starts_as_neurons = _starts_as_neurons(peft_config)
        parts = recognize_feed_forward(whole_feed_forward(layer.base_layer) if starts_as_neurons else layer.base_layer)
        graft = _make_graft(peft_config, self.model.config, parts)
        if not graft.router.sub_keys.is_meta:
            init_graft(graft, parts, peft_config.placement, starts_as_neurons)
        layer.add_graft(adapter_name, graft, peft_config.placement)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent, child_name, new_module, child):
        # PEFT's method assumes that the replaced module is a linear layer.
        setattr(parent, child_name, new_module)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT. Raise `ValueError` if grafts of several adapters would be in place of one feed-forward."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for name, layer in self._graft_layers().items():
            layer.check_places(names, name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        if merge:
            check_mergeable(self.model)
            self._check_merge(adapter_names, safe_merge)
        # Without names, layers of other methods merge their own active adapters.
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if merge:
            return merge_grafts(model)
        if not any(isinstance(module, PeerGraft) for module in model.modules()):
            unwatch_decoder(find_decoder_layers(model)[1])
        return model

    def _check_merge(self, adapter_names, safe_merge):
        known = list(self.peft_config)
        if adapter_names is not None and (isinstance(adapter_names, str) or not set(adapter_names) <= set(known)):
            raise ValueError(f"`adapter_names` must be a list of some of {known}, got {adapter_names!r}.")
        layers = self._graft_layers()
        if not any(layer.active_grafts(adapter_names) for layer in layers.values()):
            names = "the active adapters" if adapter_names is None else adapter_names
            raise ValueError(f"There is no graft of {names} to merge. `unload()` removes all adapters.")
        for name, layer in layers.items():
            refuse_quantized(layer.peer_graft_layer, "`merge_and_unload`")
            layer.check_places(adapter_names, name)
            if safe_merge:
                _check_finite(name, layer.active_grafts(adapter_names))

    def add_weighted_adapter(self, *args, **kwargs) -> None:
        """Raise `ValueError`: the experts of two grafts do not correspond, so their weights have no average."""
        raise ValueError(
            "Grafts cannot be averaged. `base_model.set_adapter([...])` activates several, whose outputs are added."
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "`adapter_names` for each row of a batch is not supported by grafts: all rows go through the active "
                "adapters."
            )
        yield

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        own = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if not any(is_split(tensor) for tensor in own.values()):
            return own
        # All that was gathered, in the first process.
        whole = state_dict_to_save(model, None) or {}
        return {name: whole[name] for name in own if name in whole}

    @classmethod
    def _remove_adapter_name_from_key(cls, key, adapter_name):
        # PEFT's method expects the name at the end of the key, and a graft has nested modules.
        return key.replace(f".{PREFIX}layer.{adapter_name}.", f".{PREFIX}layer.", 1)


@cache
def _graft_parts() -> frozenset[str]:
    """Every name in the path of a graft's weight or buffer, whatever its options."""
    fields = {"num_experts": 1, "num_experts_per_head": 1, "query_size": 2, "gated_experts": True}
    with torch.device("meta"):
        grafts = [
            PeerGraft(
                peer_config_of_base_model(PreTrainedConfig(), 2, 2, query_norm=query_norm, **fields), has_biases=True
            )
            for query_norm in ("rms", "batch")
        ]
    return frozenset(part for graft in grafts for name in graft.state_dict() for part in name.split("."))


def _check_adapter_name(adapter_name, model):
    """Refuse a name that is part of a weight's name: by that PEFT tells the weights of adapters apart."""
    base_parts = {part for name in model.state_dict() if PREFIX not in name for part in name.split(".")}
    if "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(f"`adapter_name` is {adapter_name!r}, which cannot be the name of a module.")
    if adapter_name in base_parts | _graft_parts():
        raise ValueError(f"`adapter_name` is {adapter_name!r}, the name of a part of the model: choose another.")


def _base_fields(model_config: PreTrainedConfig) -> dict[str, int | str]:
    text_config = model_config.get_text_config()
    return {
        "host_model_type": base_model_type(text_config),
        "host_hidden_size": text_config.hidden_size,
        "host_num_layers": text_config.num_hidden_layers,
    }


def _feed_forward_fields(targets: dict[str, FeedForwardParts]) -> dict[str, int | bool]:
    return {
        "host_intermediate_size": max(parts.intermediate_size for parts in targets.values()),
        "host_has_biases": any(parts.has_biases for parts in targets.values()),
    }


def _check_same_base(config: PeerGraftConfig, base):
    for name, found in base.items():
        expected = getattr(config, name)
        if expected is not None and expected != found:
            raise ValueError(
                f"The adapter was made for a base model with `{name}` = {expected!r}, this one has {found!r}. A new "
                "adapter needs a configuration of its own."
            )


def _find_targets(config: PeerGraftConfig, model: PreTrainedModel) -> dict[str, FeedForwardParts]:
    """Find the feed-forwards that get a graft, by name."""
    list_name, _ = find_decoder_layers(model)
    layers = _layer_indices(config, model.config.get_text_config().num_hidden_layers)
    targets = {}
    if config.target_modules is not None:
        by_layer = copy.copy(config)
        by_layer.layers_to_transform = layers
        named = config if isinstance(config.target_modules, str) else by_layer
        for name, module in model.named_modules():
            if (
                f".{PREFIX}layer." not in name
                and ".base_layer" not in name
                and check_target_module_exists(named, name)
            ):
                if not config.is_of_saved_adapter:  # weights of a saved adapter are under the name that it gives
                    name, module = _within_grafted(name, module)
                targets[name] = _recognize(name, module)
        others = [name for name in targets if _layer_of(name, list_name) not in layers]
        if others and config.layers_to_transform is not None:
            raise ValueError(
                f"`layers_to_transform` is {config.layers_to_transform}, but `target_modules` names {others}. It was "
                "filled in when the configuration was first used: make a new configuration for other layers."
            )
        if not targets:
            raise ValueError(f"`target_modules` names no module of layers {layers}, got {config.target_modules}.")
        return targets
    for layer_idx in layers:
        name = _find_feed_forward(f"{list_name}.{layer_idx}", model, layer_idx)
        targets[name] = _recognize(name, model.get_submodule(name))
    return targets


def _find_feed_forward(layer_name, model, layer_idx):
    """The name of the only feed-forward of a layer."""
    layer = model.get_submodule(layer_name)
    children = [_within_grafted(f"{layer_name}.{name}", child) for name, child in layer.named_children()]
    if any(isinstance(child, GraftedFeedForward) for _, child in children):
        raise ValueError(
            f"`layers_to_transform` names layer {layer_idx}, which has no feed-forward any more: a merged graft is in "
            "its place."
        )
    found = [name for name, child in children if recognize_feed_forward(_feed_forward_of(child)) is not None]
    if len(found) != 1:
        raise ValueError(
            f"`layers_to_transform` names layer {layer_idx}, where {len(found)} feed-forwards were recognized, "
            f"expected one: a child of {type(layer).__name__} with two or three linear layers and no adapters on "
            "them. Merge or unload other adapters first, or name the feed-forward in `target_modules`; a mixture of "
            "experts is not supported."
        )
    return found[0]


def _layer_of(name, list_name):
    """The index of the layer that holds a module, `None` if none does."""
    return int(name.removeprefix(f"{list_name}.").split(".")[0]) if name.startswith(f"{list_name}.") else None


def _within_grafted(name, module):
    """Name and module of the feed-forward beside merged grafts, or the arguments if there are none."""
    while isinstance(module, GraftedFeedForward) and module.feed_forward is not None:
        name, module = f"{name}.feed_forward", module.feed_forward
    return name, module


def _layer_indices(config: PeerGraftConfig, num_layers):
    indices = config.layers_to_transform
    if indices is None:
        return [(num_layers - 1) // 2]
    indices = [indices] if isinstance(indices, int) else sorted(set(indices))
    if not indices or any(not 0 <= layer_idx < num_layers for layer_idx in indices):
        raise ValueError(
            f"`layers_to_transform` must be indices of layers, 0 to {num_layers - 1} in this base model, got "
            f"{config.layers_to_transform}."
        )
    return indices


def _feed_forward_of(module):
    return module.base_layer if isinstance(module, PeerGraftLayer) else module


def _recognize(name, module):
    parts = recognize_feed_forward(_feed_forward_of(module))
    if parts is None:
        raise ValueError(
            f"`target_modules` names {name}, a {type(_feed_forward_of(module)).__name__}, expected a feed-forward of "
            "two or three linear layers."
        )
    return parts


def _starts_as_neurons(config: PeerGraftConfig):
    return config.init_from_ffn and not config.is_of_saved_adapter


def _resolve(config, model, targets):
    """
    Fill in what was found in the base model, and refuse what does not fit its feed-forwards.

    The configuration that the caller passed is changed in place: PEFT saves that very object with the adapter, and its
    own methods fill in theirs the same way.
    """
    activation, gated = "gelu", False
    for name, parts in targets.items() if _starts_as_neurons(config) else ():
        activation, gated = base_activation(model.config.get_text_config()), parts.gate is not None
        _check_neurons(
            config, name, whole_feed_forward(_feed_forward_of(model.get_submodule(name))), parts, activation
        )
    found = {**_base_fields(model.config), **_feed_forward_fields(targets), **config.layer_fields(activation, gated)}
    for name, value in found.items():
        setattr(config, name, value)
    config.target_modules = set(targets)


RANDOM_EXPERTS = "With `init_from_ffn=False` experts start at random, without this requirement."


def _check_neurons(config: PeerGraftConfig, name, feed_forward, parts, activation):
    """Check that there is an expert for each neuron, of the neuron's kind."""
    if config.num_experts < parts.intermediate_size:
        size = math.isqrt(parts.intermediate_size - 1) + 1
        raise ValueError(
            f"`num_experts` must be at least {parts.intermediate_size}, the width of {name}, with `init_from_ffn`, "
            f"got {config.num_experts}; the smallest such square is {size**2}. {RANDOM_EXPERTS}"
        )
    gated = parts.gate is not None
    for field, value in (("expert_act", activation), ("gated_experts", gated)):
        if getattr(config, field) not in ("auto", value):
            raise ValueError(
                f"`{field}` must be {value!r} or 'auto' with `init_from_ffn`, as in {name}, got "
                f"{getattr(config, field)!r}. {RANDOM_EXPERTS}"
            )
    if not all(layer.weight.is_floating_point() for layer in parts.linear_layers):
        raise ValueError(
            f"`init_from_ffn` copies neurons of {name}, whose weights must be floating point, got quantized ones of "
            f"{parts.up.weight.dtype}. {RANDOM_EXPERTS}"
        )
    if not computes(feed_forward, activation):
        raise ValueError(
            f"`init_from_ffn` needs a feed-forward that is its linear layers and the activation {activation!r}, but "
            f"{name} computes something else. {RANDOM_EXPERTS}"
        )


def _make_graft(config: PeerGraftConfig, model_config: PreTrainedConfig, parts):
    has_biases = config.init_from_ffn and config.host_has_biases
    peer_config = peer_config_of_base_model(
        model_config.get_text_config(),
        parts.hidden_size + has_biases,
        parts.intermediate_size,
        **{name: getattr(config, name) for name in LAYER_FIELDS},
    )
    return PeerGraft(peer_config, has_biases)


def _check_finite(name, grafts):
    for graft in grafts:
        for parameter_name, parameter in graft.named_parameters():
            if not parameter.isfinite().all():
                raise ValueError(
                    f"{parameter_name} of a graft at {name} has NaN or infinite elements: the adapter seems broken."
                )


register_peer_graft(PeerGraftConfig, PeerGraftModel)
register_target_modules()
call_before_upload(write_pushed_card)

__all__ = ["PeerGraftConfig", "PeerGraftModel"]
