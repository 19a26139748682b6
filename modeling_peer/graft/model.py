# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""PEER grafts as adapters of PEFT: the layer around a feed-forward, and the tuner that puts it into a base model."""

import copy
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from ..fact_graft import make_graft
from ..graft_layer import (
    LAYER_FIELDS,
    PREFIX,
    GraftedFeedForward,
    PeerGraft,
    base_activation,
    find_decoder_layers,
    peer_config_of_base_model,
    sum_of_branches,
    watch_decoder,
)
from ..graft_merged import check_mergeable, merge_grafts
from ..memory.advice import advise_huge_pages
from ..memory.host_tables import advise_tables
from ..parallel.columns import is_split
from ..parallel.gradient_exchange import leave_tables_out_of_ddp
from ..parallel.split_checkpoints import state_dict_to_save
from ..quantization.table import QuantizedTable, has_quantized_tables
from .base_feed_forward import FeedForwardParts, recognize_feed_forward, whole_feed_forward
from .config import PeerGraftConfig
from .initialization import init_graft


# Every name in the path of a graft's weight or buffer, whatever its options.
GRAFT_PARTS = {
    *("router", "query_proj", "query_norm", "key_norm", "sub_keys", "weight", "bias", "running_mean", "running_var"),
    *("num_batches_tracked", "expert_pool", "up_proj", "gate_proj", "down_proj", "output_bias"),
    *("gate", "subjects", "questions", "tokens", "names", "keys", "threshold"),
    *("expert_subjects", "expert_questions", "expert_tokens"),
}


class PeerGraftLayer(nn.Module, BaseTunerLayer):
    """
    Wraps a feed-forward of a base model: adds the outputs of active grafts beside it, and skips it for a graft in its
    place.
    """

    adapter_layer_names = (f"{PREFIX}layer",)
    other_param_names = (f"{PREFIX}placement",)

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.peer_graft_layer = nn.ModuleDict()
        self.peer_graft_placement: dict[str, str] = {}

    def add_graft(self, adapter_name: str, graft: PeerGraft, placement: str) -> None:
        """Add a graft, on the device of the feed-forward and with parameters of its dtype."""
        dtype = next(self.base_layer.parameters()).dtype
        # Running statistics of queries stay in float32. So does the whole graft in a model quantized to integers.
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

    def branches(self, adapter_names: list[str] | None = None) -> tuple[nn.Module | None, list[PeerGraft]]:
        """
        The feed-forward, or `None` if a graft is in its place, and the grafts of the named adapters, by default of the
        active ones. Raises `ValueError` if several grafts are in its place.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        replacing = [name for name in names if self.peer_graft_placement.get(name) == "in_place"]
        if len(replacing) > 1:
            raise ValueError(f"Only one of the adapters {replacing} can be in place of a feed-forward.")
        grafts: list[Any] = [self.peer_graft_layer[name] for name in names if name in self.peer_graft_layer]
        return None if replacing else self.base_layer, grafts

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """
        As in PEFT; quantized tables and gates learn nothing. Raises `ValueError` as [`~PeerGraftLayer.branches`] does.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.branches(names)
        for name, graft in self.peer_graft_layer.items():
            for path, module in graft.named_modules():
                learns = name in names and not inference_mode and ".gate." not in path
                for parameter in module.parameters(recurse=False) if not isinstance(module, QuantizedTable) else ():
                    if parameter.is_leaf:  # under FSDP1 these may be views of its own parameters
                        parameter.requires_grad_(learns)
        self._active_adapter = names

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        if self.disable_adapters:
            return self.base_layer(hidden_states, **kwargs)
        return sum_of_branches(*self.branches(), hidden_states, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise `NotImplementedError`: a graft has no weights of the base model that could take it up."""
        raise NotImplementedError("A graft is not merged into weights: `merge_and_unload` keeps it as a module.")

    unmerge = merge

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module that stays in the base model: its feed-forward, with the grafts if `merge` is true."""
        feed_forward, grafts = self.branches(adapter_names) if merge else (None, [])
        return GraftedFeedForward(feed_forward, grafts) if grafts else self.base_layer


class PeerGraftModel(BaseTuner):
    """
    A base model with grafts, see [`PeerGraftConfig`].

    Grafts of a bfloat16 base model are in float32 unless `autocast_adapter_dtype` is `False`, as in all of PEFT;
    `load_adapter` of Transformers keeps the dtype of the base model.

    Padding is taken from the attention mask that the base model's decoder gets. Where that is no mask of tokens, as in
    a multimodal Gemma 3, padding counts in the query BatchNorm and in measures of expert usage.

    Several adapters may be active at a layer, one of them in place of its feed-forward. `merge_and_unload` returns a
    model without PEFT in which the grafts are modules, see [`PeerGraftedConfig`].

    Raises:
        `ValueError`: for a layer that does not exist or whose feed-forward is not recognized, an adapter of another
            base model, or experts that do not fit the feed-forward. The base model is left as it was.
    """

    prefix = PREFIX
    tuner_layer_cls = PeerGraftLayer
    target_module_mapping: dict[str, list[str]] = {}

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DistributedDataParallel reads this from the `PeftModel` that it wraps, which gets it from here.
        return [f"base_model.{name}" for name in leave_tables_out_of_ddp(self)]

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT. Raises `ValueError` before anything changes, as [`~PeerGraftLayer.branches`] does."""
        for layer in self.model.modules():
            if isinstance(layer, PeerGraftLayer):
                layer.branches([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        """As in PEFT, after every check that may refuse the adapter."""
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"A graft needs a base model of Transformers, got {type(model).__name__}.")
        # PEFT tells the weights of adapters apart by parts of their names.
        parts = {part for name in model.state_dict() if PREFIX not in name for part in name.split(".")}
        if adapter_name in parts | GRAFT_PARTS or "." in adapter_name or not adapter_name:
            raise ValueError(
                f"`adapter_name` must not be empty, have a dot, or be the name of a part of the model, got "
                f"{adapter_name!r}."
            )
        config = self.peft_config[adapter_name]
        config.check()
        _check_base_model(config, _of_base_model(model.config.get_text_config()))
        _resolve(config, model, _find_targets(config, model))
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        watch_decoder(model)

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ):
        layer = target if isinstance(target, PeerGraftLayer) else PeerGraftLayer(target)
        starts_as_neurons = peft_config.starts_as_neurons
        parts = recognize_feed_forward(whole_feed_forward(layer.base_layer) if starts_as_neurons else layer.base_layer)
        has_biases = peft_config.init_from_ffn and peft_config.host_has_biases
        fields = {name: getattr(peft_config, name) for name in LAYER_FIELDS}
        sizes = parts.hidden_size + has_biases, parts.intermediate_size
        config = peer_config_of_base_model(self.model.config.get_text_config(), *sizes, **fields)
        graft = make_graft(config, has_biases, peft_config.fact_sizes, peft_config.facts, peft_config.has_gate)
        advise_tables(graft, advise_huge_pages)
        if any(parameter.is_meta for parameter in graft.parameters()):
            pass  # saved weights come
        elif peft_config.fact_sizes is None:
            init_graft(graft, parts, peft_config.placement, starts_as_neurons)
        else:
            graft.init_weights()
        layer.add_graft(adapter_name, graft, peft_config.placement)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent, child_name, new_module, child):
        # PEFT's method assumes that the replaced module is a linear layer.
        setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        if not merge:
            return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        check_mergeable(self.model)
        layers = [module for module in self.model.modules() if isinstance(module, PeerGraftLayer)]
        grafts = [graft for layer in layers for graft in layer.branches(adapter_names)[1]]
        if not grafts:
            raise ValueError(
                "`merge_and_unload` found no graft of the named or active adapters: `unload` leaves out all."
            )
        if any(has_quantized_tables(graft) for graft in grafts):
            raise ValueError("`merge_and_unload` needs expert tables in floating point: quantize them afterward.")
        if safe_merge and not all(each.isfinite().all() for graft in grafts for each in graft.parameters()):
            raise ValueError("A graft has NaN or infinite elements.")
        # Without names, layers of other methods merge their own active adapters.
        return merge_grafts(super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None:
            raise ValueError("Grafts do not support `adapter_names` for each row of a batch.")
        yield

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        layers = [module for module in model.modules() if isinstance(module, PeerGraftLayer)]
        if any(has_quantized_tables(nn.ModuleList(layer.branches([adapter_name])[1])) for layer in layers):
            raise ValueError(
                "The state dict of an adapter needs expert tables in floating point: `dequantize_experts`."
            )
        own = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if not any(is_split(tensor) for tensor in own.values()):
            return own
        # Only the first process has the gathered tensors.
        whole = state_dict_to_save(model, None) or {}
        return {name: whole[name] for name in own if name in whole}

    @classmethod
    def _remove_adapter_name_from_key(cls, key, adapter_name):
        # PEFT's method expects the name at the end of the key, and a graft has nested modules.
        return key.replace(f".{PREFIX}layer.{adapter_name}.", f".{PREFIX}layer.", 1)


def _find_targets(config: PeerGraftConfig, model: PreTrainedModel) -> dict[str, FeedForwardParts]:
    """Find the feed-forwards that get a graft, by name."""
    list_name, _ = find_decoder_layers(model)
    layers = _layer_indices(config, model.config.get_text_config().num_hidden_layers)
    if config.target_modules is None:
        names = [_find_feed_forward(f"{list_name}.{layer_idx}", model, layer_idx) for layer_idx in layers]
        return {name: _recognize(name, model.get_submodule(name)) for name in names}
    by_layer = copy.copy(config)
    by_layer.layers_to_transform = layers
    targets = {}
    for name, module in model.named_modules():
        own = f".{PREFIX}layer." not in name and ".base_layer" not in name
        if own and check_target_module_exists(by_layer, name):
            if not config.is_of_saved_adapter:  # weights of a saved adapter are under the name that it gives
                name, module = _within_grafted(name, module)
            targets[name] = _recognize(name, module)
    if not targets:
        raise ValueError(f"`target_modules` names no module of layers {layers}, got {config.target_modules}.")
    return targets


def _find_feed_forward(layer_name, model, layer_idx):
    """The name of the only feed-forward of a layer."""
    layer = model.get_submodule(layer_name)
    children = [_within_grafted(f"{layer_name}.{name}", child) for name, child in layer.named_children()]
    found = [name for name, child in children if recognize_feed_forward(child) is not None]
    if len(found) != 1:
        raise ValueError(
            f"`layers_to_transform` names layer {layer_idx}, where {len(found)} feed-forwards of two or three linear "
            "layers without adapters were found, expected one: merge other adapters first, or give `target_modules`."
        )
    return found[0]


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


def _recognize(name, module):
    parts = recognize_feed_forward(module)
    if parts is None:
        raise ValueError(
            f"`target_modules` names {name}, a {type(module).__name__}, expected a feed-forward of two or three "
            "linear layers."
        )
    return parts


def _resolve(config, model, targets):
    """
    Fill in the fields of a configuration that depend on the base model. Raises `ValueError` if others do not fit it.

    The configuration that the caller passed is changed in place, as PEFT's own methods do: PEFT saves this object with
    the adapter.
    """
    text_config = model.config.get_text_config()
    found = {
        **_of_base_model(text_config),
        "host_intermediate_size": max(parts.intermediate_size for parts in targets.values()),
        "host_has_biases": any(parts.has_biases for parts in targets.values()),
    }
    _check_base_model(config, found)
    activation, gated = "gelu", False
    for name, parts in targets.items() if config.starts_as_neurons else ():
        activation, gated = base_activation(text_config), parts.gate is not None
        _check_neurons(config, name, parts, activation)
    for name, value in {**found, **config.layer_fields(activation, gated)}.items():
        setattr(config, name, value)
    config.target_modules = set(targets)


def _of_base_model(text_config):
    return {
        "host_model_type": getattr(text_config, "host_model_type", text_config.model_type),
        "host_hidden_size": text_config.hidden_size,
        "host_num_layers": text_config.num_hidden_layers,
    }


def _check_base_model(config, found):
    """Raise `ValueError` if an adapter is of a base model with other fields."""
    for name, value in found.items():
        if getattr(config, name) not in (None, value):
            raise ValueError(
                f"The adapter is of a base model with `{name}` = {getattr(config, name)!r}, this one has {value!r}. A "
                "new adapter needs a configuration of its own."
            )


def _check_neurons(config: PeerGraftConfig, name, parts, activation):
    """Check that there is an expert for each neuron, of the neuron's kind."""
    if config.num_experts < parts.intermediate_size:
        raise ValueError(
            f"`num_experts` must be at least {parts.intermediate_size}, the width of {name}, with `init_from_ffn`, "
            f"got {config.num_experts}."
        )
    for field, value in (("expert_act", activation), ("gated_experts", parts.gate is not None)):
        if getattr(config, field) not in ("auto", value):
            raise ValueError(
                f"`{field}` must be {value!r} or 'auto' with `init_from_ffn`, as in {name}, got "
                f"{getattr(config, field)!r}."
            )
    is_float = all(layer.weight.is_floating_point() for layer in parts.linear_layers)
    if not is_float or activation not in ACT2FN:
        raise ValueError(
            f"`init_from_ffn` needs linear layers in floating point and an activation of Transformers, but {name} has "
            f"{parts.up.weight.dtype} and {activation!r}."
        )
