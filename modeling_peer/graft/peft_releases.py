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
What differs between releases of PEFT, and what grafts rely on in it that is not public: PEFT knows its methods by an
enumeration, which has to be extended first.
"""

import importlib.metadata
import json
from collections.abc import Iterator
from contextlib import contextmanager

from packaging.version import Version

from ..graft_layer import METHOD_NAME


PEFT_TYPE_NAME = METHOD_NAME.upper()

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


def extend(enumeration):
    """Adds a member as `enum` does when it makes the class."""
    member = str.__new__(enumeration, PEFT_TYPE_NAME)
    member._name_ = member._value_ = PEFT_TYPE_NAME
    member._sort_order_ = len(enumeration._member_names_)
    member.__objclass__ = enumeration
    type.__setattr__(enumeration, PEFT_TYPE_NAME, member)
    enumeration._member_names_.append(PEFT_TYPE_NAME)
    enumeration._member_map_[PEFT_TYPE_NAME] = member
    enumeration._value2member_map_[PEFT_TYPE_NAME] = member


def shrink(enumeration):
    if PEFT_TYPE_NAME in enumeration.__dict__:
        type.__delattr__(enumeration, PEFT_TYPE_NAME)
    if PEFT_TYPE_NAME in enumeration._member_names_:
        enumeration._member_names_.remove(PEFT_TYPE_NAME)
    enumeration._member_map_.pop(PEFT_TYPE_NAME, None)
    enumeration._value2member_map_.pop(PEFT_TYPE_NAME, None)


def check_registration(enumeration, registries, expected):
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
