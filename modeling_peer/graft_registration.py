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
PEER grafts as a method of PEFT. PEFT knows its methods by an enumeration that has to be extended first; what that relies
on is looked after here alone.
"""

import importlib.metadata
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from packaging.version import Version


METHOD_NAME = "peer_graft"
PEFT_TYPE_NAME = METHOD_NAME.upper()
PREFIX = f"{METHOD_NAME}_"

OLDEST_PEFT = (0, 21)
TESTED_PEFT = "0.21"


@contextmanager
def asking_for_peft() -> Iterator[None]:
    """For imports of PEFT. Raises `ImportError` that says what to install if it is not there."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ImportError(
            "Grafts are a method of PEFT, which is not installed: `pip install modeling-peer[graft]`."
        ) from error


def check_release() -> None:
    """Raises `ImportError` if PEFT is older than 0.21."""
    version = importlib.metadata.version("peft")
    if Version(version).release < OLDEST_PEFT:
        raise ImportError(f"Grafts were tested with PEFT {TESTED_PEFT} and need it or a later one, found {version}.")


def register_peer_graft(config_class: type, model_class: type) -> None:
    """
    Makes grafts a method of PEFT, once, and looks whether they are: the enumeration finds the new member by name and by
    value, each registry has it, and a configuration comes back from its file.

    Args:
        config_class (`type`): [`PeerGraftConfig`].
        model_class (`type`): [`PeerGraftModel`].

    Raises:
        `ImportError`: if PEFT works otherwise than expected, or has a method of this name already. It is left as it was.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType, register_peft_method

    registries: tuple[dict[Any, Any], ...] = (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    version = importlib.metadata.version("peft")
    registered = registries[0].get(PEFT_TYPE_NAME)
    if registered is config_class:
        return
    if registered is not None or PEFT_TYPE_NAME in PeftType.__members__:
        raise ImportError(f"PEFT {version} has a method `{PEFT_TYPE_NAME}` already, of {registered}.")
    try:
        _extend(PeftType)
        register_peft_method(name=METHOD_NAME, config_cls=config_class, model_cls=model_class, prefix=PREFIX)
        _check_registration(PeftType, registries, (config_class, PREFIX, model_class))
    except Exception as error:
        for registry in registries:
            registry.pop(PEFT_TYPE_NAME, None)
        _shrink(PeftType)
        raise ImportError(
            f"Grafts cannot be made a method of PEFT {version}; they were tested with {TESTED_PEFT}: {error}"
        ) from error


def _extend(enumeration):
    """Adds a member as `enum` does when it makes the class."""
    member = str.__new__(enumeration, PEFT_TYPE_NAME)
    member._name_ = member._value_ = PEFT_TYPE_NAME
    member._sort_order_ = len(enumeration._member_names_)
    member.__objclass__ = enumeration
    type.__setattr__(enumeration, PEFT_TYPE_NAME, member)
    enumeration._member_names_.append(PEFT_TYPE_NAME)
    enumeration._member_map_[PEFT_TYPE_NAME] = member
    enumeration._value2member_map_[PEFT_TYPE_NAME] = member


def _shrink(enumeration):
    if PEFT_TYPE_NAME in enumeration.__dict__:
        type.__delattr__(enumeration, PEFT_TYPE_NAME)
    if PEFT_TYPE_NAME in enumeration._member_names_:
        enumeration._member_names_.remove(PEFT_TYPE_NAME)
    enumeration._member_map_.pop(PEFT_TYPE_NAME, None)
    enumeration._value2member_map_.pop(PEFT_TYPE_NAME, None)


def _check_registration(enumeration, registries, expected):
    from peft import PeftConfig

    member = enumeration(PEFT_TYPE_NAME)
    if not (member is enumeration[PEFT_TYPE_NAME] is getattr(enumeration, PEFT_TYPE_NAME) is list(enumeration)[-1]):
        raise RuntimeError(f"`PeftType` has no member {PEFT_TYPE_NAME} of its own.")
    if json.loads(json.dumps(member)) != PEFT_TYPE_NAME:
        raise RuntimeError(f"`PeftType.{PEFT_TYPE_NAME}` is not written as its name.")
    for registry, value in zip(registries, expected, strict=True):
        if registry[PEFT_TYPE_NAME] is not value:
            raise RuntimeError(f"{registry[PEFT_TYPE_NAME]} is registered in place of {value}.")
    config = expected[0](layers_to_transform=[1])
    written = json.dumps(config.to_dict())
    found = PeftConfig.from_peft_type(**json.loads(written))
    if type(found) is not type(config) or found != config:
        raise RuntimeError(f"a configuration came back as {found} from {written}.")
