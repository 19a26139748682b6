# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Registration of PEER grafts as a method of PEFT, and the private parts of PEFT that grafts use.

PEFT 0.21 is the oldest release that grafts work with. No later release is refused for its version.
"""

import importlib.metadata
from typing import Any

from packaging.version import Version
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners import tuners_utils
from peft.utils import constants, register_peft_method

from ..graft_layer import METHOD_NAME, PREFIX


PEFT_TYPE_NAME = METHOD_NAME.upper()

OLDEST_PEFT = "0.21"

# Private methods that grafts override. If PEFT no longer called one, they would fail later and silently.
PRIVATE_METHODS = {
    "BaseTuner": (
        "_create_and_replace",  # puts a graft at a feed-forward; without it nothing would be injected
        "_replace_module",  # PEFT's own assumes a linear layer
        "_unload_and_optionally_merge",  # merges grafts; without it they would be lost on saving
        "_get_adapter_state_dict",  # puts gathered tables in the place of a process's columns
        "_remove_adapter_name_from_key",  # without it a saved adapter would have keys that no other name can load
    ),
    "BaseTunerLayer": (
        "_move_adapter_to_device_of_base_layer",  # PEFT's own moves single parameters, not modules of modules
    ),
}

# Modules of a PEER model that LoRA and IA³ adapt if a configuration names none: linear layers only, as for Llama.
# `mlp.down_proj` matches dense feed-forwards, but not the table `mlp.expert_pool.down_proj`.
DEFAULT_TARGETS = {
    "LORA_TARGET_MODULES": ["q_proj", "v_proj"],
    "IA3_TARGET_MODULES": ["k_proj", "v_proj", "mlp.down_proj"],
    "IA3_FEEDFORWARD_MODULES": ["mlp.down_proj"],
}


def register_peer_graft(config_class: type, model_class: type) -> None:
    """
    Register grafts as a method of PEFT if that is not done yet. Also tell PEFT which modules of a PEER model its own
    methods adapt if a configuration names none.

    Raises:
        `ImportError`: for a release of PEFT that is too old, or that no longer has a method that grafts override.
        `KeyError`: if PEFT has another method of this name.
    """
    version = importlib.metadata.version("peft")
    used = [(base, name) for base, names in PRIVATE_METHODS.items() for name in names]
    missing = [name for base, name in used if not hasattr(getattr(tuners_utils, base), name)]
    if missing or Version(version).release < Version(OLDEST_PEFT).release:
        raise ImportError(f"Grafts need PEFT {OLDEST_PEFT} or later, found {version}, without {missing}.")
    mapping: dict[Any, Any] = PEFT_TYPE_TO_CONFIG_MAPPING
    if mapping.get(PEFT_TYPE_NAME) is config_class:
        return
    if PEFT_TYPE_NAME not in PeftType.__members__:
        _extend(PeftType)
    for table, names in DEFAULT_TARGETS.items():
        getattr(constants, f"TRANSFORMERS_MODELS_TO_{table}_MAPPING", {}).setdefault("peer", list(names))
    register_peft_method(name=METHOD_NAME, config_cls=config_class, model_cls=model_class, prefix=PREFIX)


def _extend(enumeration):
    """Add the method to PEFT's enumeration, as `register_peft_method` accepts only names of its members."""
    member = str.__new__(enumeration, PEFT_TYPE_NAME)
    member._name_ = member._value_ = PEFT_TYPE_NAME
    member._sort_order_ = len(enumeration._member_names_)
    member.__objclass__ = enumeration
    type.__setattr__(enumeration, PEFT_TYPE_NAME, member)
    enumeration._member_names_.append(PEFT_TYPE_NAME)
    enumeration._member_map_[PEFT_TYPE_NAME] = member
    enumeration._value2member_map_[PEFT_TYPE_NAME] = member
