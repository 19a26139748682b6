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
What differs between releases of PEFT, and all that grafts use of it that is not public.

PEFT 0.21 is the oldest release that grafts work with; no release is refused for being new. What they rely on is
checked when they are registered, so a release that lacks any of it is named in one warning, and the rest of the
package works.
"""

import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager

from packaging.version import Version

from ..graft_layer import METHOD_NAME


PEFT_TYPE_NAME = METHOD_NAME.upper()

OLDEST_PEFT = "0.21"

# Methods that PEFT calls, or that grafts call, under names that PEFT may change. A tuner that overrides a method that
# nobody calls any more would fail later and silently, so a release without one of them is refused at registration.
# Not in this table, as PEFT defines it for some methods only: `_enable_peft_forward_hooks`, by which `PeftModel` hands
# on `adapter_names` of a batch's rows. If PEFT no longer calls it, these reach the base model, which refuses or
# ignores them.
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

# What `create_or_update_model_card` of PEFT, by a template of huggingface_hub, leaves to be filled in: how to load an
# adapter. If the template changes, the card of an adapter keeps the new placeholder and does not name the package.
CARD_PLACEHOLDER = "Use the code below to get started with the model.\n\n[More Information Needed]"


def is_peft_installed() -> bool:
    """Whether PEFT can be found, of whatever release, working or not."""
    return importlib.util.find_spec("peft") is not None


@contextmanager
def asking_for_peft() -> Iterator[None]:
    """For imports of PEFT: raise `ImportError` that says what to install if it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ImportError(
            "Grafts are a method of PEFT, which is not installed: install the extra `graft` of modeling-peer: "
            '`pip install ".[graft]"` in a clone, or `pip install peft`.'
        ) from error


def check_release() -> None:
    """Raise `ImportError` for a release of PEFT that is too old, or has no more what grafts use of it."""
    from peft.tuners import tuners_utils

    version = importlib.metadata.version("peft")
    if Version(version).release < Version(OLDEST_PEFT).release:
        raise ImportError(f"Grafts need PEFT {OLDEST_PEFT} or later, found {version}.")
    missing = [
        f"{class_name}.{name}"
        for class_name, names in PRIVATE_METHODS.items()
        for name in names
        if not hasattr(getattr(tuners_utils, class_name, None), name)
    ]
    if missing:
        raise ImportError(f"Grafts use methods of PEFT that PEFT {version} does not have: {', '.join(missing)}.")


def extend(enumeration) -> None:
    """
    Add a member to the enumeration of PEFT's methods, as `enum` does when it makes the class: `register_peft_method`
    takes no other names, and an enumeration cannot be extended otherwise. [`check_registration`] notices if it did not
    work.
    """
    member = str.__new__(enumeration, PEFT_TYPE_NAME)
    member._name_ = member._value_ = PEFT_TYPE_NAME
    member._sort_order_ = len(enumeration._member_names_)
    member.__objclass__ = enumeration
    type.__setattr__(enumeration, PEFT_TYPE_NAME, member)
    enumeration._member_names_.append(PEFT_TYPE_NAME)
    enumeration._member_map_[PEFT_TYPE_NAME] = member
    enumeration._value2member_map_[PEFT_TYPE_NAME] = member


def shrink(enumeration) -> None:
    """Undo [`extend`], also where it failed halfway."""
    if PEFT_TYPE_NAME in enumeration.__dict__:
        type.__delattr__(enumeration, PEFT_TYPE_NAME)
    if PEFT_TYPE_NAME in enumeration._member_names_:
        enumeration._member_names_.remove(PEFT_TYPE_NAME)
    enumeration._member_map_.pop(PEFT_TYPE_NAME, None)
    enumeration._value2member_map_.pop(PEFT_TYPE_NAME, None)


def check_registration(enumeration, registries, expected) -> None:
    """Raise `RuntimeError` if PEFT does not find the method by name and value, or loses fields of a configuration."""
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
