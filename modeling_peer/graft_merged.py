# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Models of Transformers with merged grafts: their configuration, which the auto classes find under the `model_type`
"peer_grafted", and their classes, derived from those of the base model.
"""

import copy
from dataclasses import asdict
from functools import cache
from typing import Any

import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from .fact_graft import FactGraft, make_graft
from .graft_layer import LAYER_FIELDS, GraftedFeedForward, peer_config_of_base_model, watch_decoder
from .modeling_peer import ExtensibleCheckpoints, check_package
from .router import AddedRouter


MODEL_TYPE = "peer_grafted"

# Prefix of the names of classes that are derived from those of a base model.
CLASS_PREFIX = "PeerGrafted"

# The auto classes of a decoder, and the mapping in which each finds a model by its configuration.
AUTO_CLASSES = {
    AutoModel: modeling_auto.MODEL_MAPPING,
    AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForSequenceClassification: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForTokenClassification: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModelForQuestionAnswering: modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
}


class PeerGraftedConfig(PreTrainedConfig):
    """
    The configuration that the auto classes find for a model with merged grafts. Reading one gives an instance of the
    base model's configuration class, extended by

    - `host_model_type` (`str`): the base model's own `model_type`;
    - `peer_grafts` (`dict[str, dict]`): for each feed-forward with grafts, by its name in the model without a head,
      `in_place`, whether a graft took its place, and `grafts`, the sizes and options of each.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in Transformers. Raises `KeyError` if this release of Transformers does not have the base model."""
        base_class: Any = CONFIG_MAPPING[config_dict["host_model_type"]]
        return grafted_config_class(base_class).from_dict(config_dict, **kwargs)


# Any model of Transformers can be a base model, so classes with grafts are made when they are needed, once each.
@cache
def grafted_config_class(base_class: Any) -> Any:
    """Make the configuration class of a base model with grafts, and register its models with the auto classes."""
    name = f"{CLASS_PREFIX}{base_class.__name__}"
    config_class = type(name, (base_class,), {"__module__": __name__, "model_type": MODEL_TYPE})
    for auto_class, mapping in AUTO_CLASSES.items():
        base_model_class = mapping.get(base_class, None)
        if isinstance(base_model_class, type):
            auto_class.register(
                config_class, _grafted_model_class(base_model_class, config_class, auto_class.__name__)
            )
    return config_class


def _grafted_model_class(base_class, config_class, auto_class_name):
    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        check_package(config)
        base_class.__init__(self, config, *args, **kwargs)
        _add_grafts(self)

    name = f"{CLASS_PREFIX}{base_class.__name__}"
    namespace = {"__module__": __name__, "config_class": config_class, "__init__": __init__}
    model_class = type(name, (ExtensibleCheckpoints, base_class), namespace)
    # A saved model carries the code it needs.
    model_class.register_for_auto_class(auto_class_name)
    return model_class


def _grafted_class_of(base_class, base_model_class):
    """The class with grafts that the auto classes find in place of the base model's class."""
    mapping = next(each for each in AUTO_CLASSES.values() if each.get(base_class, None) is base_model_class)
    return mapping[grafted_config_class(base_class)]


def __getattr__(name):
    """
    Find a class derived from one of a base model by its name.

    Two callers have only the name, in a process where the class may not exist yet: `pickle`, and the auto classes with
    `trust_remote_code=True`, which look up the names in the `auto_map` of a checkpoint in this module.
    """
    base_class = getattr(transformers, name.removeprefix(CLASS_PREFIX), None) if CLASS_PREFIX in name else None
    if base_class is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if issubclass(base_class, PreTrainedConfig):
        return grafted_config_class(base_class)
    return _grafted_class_of(base_class.config_class, base_class)


def _add_grafts(model):
    """Build the grafts that `config.peer_grafts` describes."""
    base_model = model.base_model
    if any(isinstance(module, GraftedFeedForward) for module in base_model.modules()):
        return  # an auto class made the base model, with its grafts
    for name, description in model.config.peer_grafts.items():
        parent_name, _, child_name = name.rpartition(".")
        parent = base_model.get_submodule(parent_name)
        feed_forward = None if description["in_place"] else getattr(parent, child_name)
        grafts = [_graft_of(model.config, **fields) for fields in description["grafts"]]
        grafted = GraftedFeedForward(feed_forward, grafts)
        grafted.is_merged = True
        setattr(parent, child_name, grafted)
    watch_decoder(model)


def _graft_of(config: PreTrainedConfig, has_biases, fact_sizes=None, facts=None, has_gate=False, **fields):
    peer_config = peer_config_of_base_model(config.get_text_config(), **fields)
    graft = make_graft(peer_config, has_biases, fact_sizes, facts, has_gate)
    graft.init_weights()
    return graft


def _describe(graft):
    fields = {name: getattr(graft.config, name) for name in ("hidden_size", "intermediate_size", *LAYER_FIELDS)}
    if isinstance(graft, FactGraft):
        fields |= {"fact_sizes": asdict(graft.router.sizes), "facts": graft.facts}
    own = {"has_biases": graft.output_bias is not None, "has_gate": isinstance(graft.router, AddedRouter)}
    return own | fields


def check_mergeable(model: PreTrainedModel) -> None:
    """Raise `ValueError` for a model that no auto class of Transformers finds: it could not be loaded again."""
    base_class: Any = type(model.config)
    of_transformers = model.config.model_type == MODEL_TYPE or base_class.__module__.startswith("transformers.")
    known = [mapping.get(base_class, None) for mapping in AUTO_CLASSES.values()]
    if not of_transformers or type(model) not in known:
        raise ValueError(
            "Grafts are merged into models of Transformers that its auto classes find; none of "
            f"{[auto_class.__name__ for auto_class in AUTO_CLASSES]} finds {type(model).__name__}."
        )


def merge_grafts(model: PreTrainedModel) -> PreTrainedModel:
    """
    Convert a model whose layers hold [`GraftedFeedForward`] so that it is saved and loaded with its grafts. Parameters
    of grafts get the dtype of the model, as they would when it is loaded.

    Returns the model itself, now of a class with grafts. Raises `ValueError` as [`check_mergeable`] does.
    """
    check_mergeable(model)
    base_class: Any = type(model.config)
    if model.config.model_type == MODEL_TYPE:
        _give_own_config(model, base_class)
    else:
        _give_own_config(model, grafted_config_class(base_class))
        model.config.host_model_type = base_class.model_type
        # A checkpoint names the class of the model and carries its code. The class is assigned, as FSDP2 and
        # parametrizations of torch do, so that the caller, hooks and wrappers of `forward` keep the same model.
        model.__class__ = _grafted_class_of(base_class, type(model))
    grafts = {}
    for name, module in model.base_model.named_modules():
        if isinstance(module, GraftedFeedForward):
            module.is_merged = True
            grafts[name] = {"in_place": module.feed_forward is None, "grafts": [_describe(g) for g in module.grafts]}
            for parameter in module.grafts.parameters():
                parameter.data = parameter.data.to(model.dtype)
    model.config.peer_grafts = grafts
    model.config.auto_map = {"AutoConfig": f"{__name__.rpartition('.')[2]}.{PeerGraftedConfig.__name__}"}
    watch_decoder(model)
    return model


def _give_own_config(model, config_class):
    """Give a model and its modules a copy of its configuration, as another model may share the original."""
    config = config_class.__new__(config_class)
    copies: dict[int, Any] = {id(model.config): config}
    config.__dict__.update(copy.deepcopy(model.config.__dict__, copies))
    module: Any
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = copies.get(id(module.config), module.config)


AutoConfig.register(MODEL_TYPE, PeerGraftedConfig, exist_ok=True)
