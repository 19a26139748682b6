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
Models of the library whose grafts are a part of them: their configuration, which the auto classes find under
`model_type` "peer_grafted", and their classes, made from the host's.
"""

import copy
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

from .graft_layer import (
    LAYER_FIELDS,
    GraftedFeedForward,
    PeerGraft,
    find_decoder_layers,
    peer_config_of_host,
    watch_decoder,
)


MODEL_TYPE = "peer_grafted"

# What names of classes start with that are made from a host's.
CLASS_PREFIX = "PeerGrafted"

# The auto classes of a decoder, and where each looks a model up by its configuration.
AUTO_CLASSES = {
    AutoModel: modeling_auto.MODEL_MAPPING,
    AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForSequenceClassification: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForTokenClassification: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModelForQuestionAnswering: modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
}


class PeerGraftedConfig(PreTrainedConfig):
    """
    What the auto classes look up for a model with grafts of its own. Reading one gives an instance of the host's
    configuration class, extended by

    - `host_model_type` (`str`): the host's own `model_type`;
    - `peer_grafts` (`dict[str, dict]`): for each feed-forward with grafts, named as in the base model, `in_place`, whether
      it is gone, and `grafts`, the sizes and options of each.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in the library. Raises `ValueError` if the library does not have the host."""
        host_model_type = config_dict.get("host_model_type")
        if host_model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"`host_model_type` is {host_model_type!r}, which this release of Transformers does not have; a model with "
                "grafts is made of the library's."
            )
        host_class: Any = CONFIG_MAPPING[host_model_type]
        return grafted_config_class(host_class).from_dict(config_dict, **kwargs)


def host_model_type(config: PreTrainedConfig) -> str:
    """The `model_type` of a host, also where it has grafts."""
    return getattr(config, "host_model_type", config.model_type)


@cache
def grafted_config_class(host_class: Any) -> Any:
    """The configuration class of a host with grafts. The auto classes find its models from now on."""
    name = f"{CLASS_PREFIX}{host_class.__name__}"
    config_class = type(name, (host_class,), {"__module__": __name__, "model_type": MODEL_TYPE})
    for auto_class, mapping in AUTO_CLASSES.items():
        host_model_class = mapping.get(host_class, None)
        if isinstance(host_model_class, type):
            auto_class.register(
                config_class, _grafted_model_class(host_model_class, config_class, auto_class.__name__)
            )
    return config_class


def _grafted_model_class(host_class, config_class, auto_class_name):
    def __init__(self, config, *args, **kwargs):
        host_class.__init__(self, config, *args, **kwargs)
        _add_grafts(self)

    name = f"{CLASS_PREFIX}{host_class.__name__}"
    namespace = {"__module__": __name__, "config_class": config_class, "__init__": __init__}
    model_class = type(name, (host_class,), namespace)
    # A saved model carries the code it needs.
    model_class.register_for_auto_class(auto_class_name)
    return model_class


def _grafted_class_of(host_class, config_class, host_model_class):
    """The class of models with grafts that stands where the auto classes find the host's."""
    mapping = next(each for each in AUTO_CLASSES.values() if each.get(host_class, None) is host_model_class)
    return mapping[config_class]


def __getattr__(name):
    """Finds the classes that are made from a host's by their names, as `pickle` does."""
    made_from = getattr(transformers, name.removeprefix(CLASS_PREFIX), None) if name.startswith(CLASS_PREFIX) else None
    if made_from is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if issubclass(made_from, PreTrainedConfig):
        return grafted_config_class(made_from)
    host_class = made_from.config_class
    return _grafted_class_of(host_class, grafted_config_class(host_class), made_from)


def _add_grafts(model):
    """Builds what `config.peer_grafts` says."""
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
    watch_decoder(find_decoder_layers(model)[1])


def _graft_of(config, has_biases, **fields):
    graft = PeerGraft(peer_config_of_host(config.get_text_config(), **fields), has_biases)
    graft.init_weights()
    return graft


def _describe(graft):
    fields = {name: getattr(graft.config, name) for name in ("hidden_size", "intermediate_size", *LAYER_FIELDS)}
    return {"has_biases": graft.output_bias is not None, **fields}


def check_mergeable(model: PreTrainedModel) -> None:
    """Raises `ValueError` for a model that no auto class of the library knows: it could not be loaded again."""
    host_class: Any = type(model.config)
    of_library = model.config.model_type == MODEL_TYPE or host_class.__module__.startswith("transformers.")
    known = [mapping.get(host_class, None) for mapping in AUTO_CLASSES.values()]
    if not of_library or type(model) not in known:
        raise ValueError(
            f"Grafts become a part of models of the library that its auto classes find; none of "
            f"{[auto_class.__name__ for auto_class in AUTO_CLASSES]} finds {type(model).__name__}."
        )


def merge_grafts(model: PreTrainedModel) -> PreTrainedModel:
    """
    Makes a model whose layers hold [`GraftedFeedForward`] one that is saved and loaded with them. Parameters of grafts get
    the dtype of the model, as they would when it is loaded. Raises `ValueError` as [`check_mergeable`] does.
    """
    check_mergeable(model)
    _give_own_config(model)
    if model.config.model_type != MODEL_TYPE:
        host_class: Any = type(model.config)
        config_class = grafted_config_class(host_class)
        model.config.host_model_type = host_class.model_type
        model.config.__class__ = config_class
        model.__class__ = _grafted_class_of(host_class, config_class, type(model))
    grafts = {}
    for name, module in model.base_model.named_modules():
        if isinstance(module, GraftedFeedForward):
            module.is_merged = True
            grafts[name] = {"in_place": module.feed_forward is None, "grafts": [_describe(g) for g in module.grafts]}
            for parameter in module.grafts.parameters():
                parameter.data = parameter.data.to(model.dtype)
    model.config.peer_grafts = grafts
    model.config.auto_map = {"AutoConfig": f"{__name__.rpartition('.')[2]}.{PeerGraftedConfig.__name__}"}
    watch_decoder(find_decoder_layers(model)[1])
    return model


def _give_own_config(model):
    """Another model may share the configuration: this one and its modules get a copy."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    module: Any
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and id(config) in copies:
            module.config = copies[id(config)]


AutoConfig.register(MODEL_TYPE, PeerGraftedConfig, exist_ok=True)
