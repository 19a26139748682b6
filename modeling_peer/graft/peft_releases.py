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
What differs between releases of PEFT, and all that is used of it that is not public.

PEFT 0.21 is the oldest release that grafts work with; no release is refused for being new. What they rely on is
checked when they are registered, so a release that lacks any of it is named in one warning, and the rest of the
package works.
"""

import functools
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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


def set_default_targets(model_type: str, targets: dict[str, list[str]]) -> None:
    """
    Tell PEFT which modules of a type of model its methods adapt if a configuration names none. A table that a release
    does not have is left out: users then have to name modules.

    Args:
        model_type (`str`): As in the configuration of the model.
        targets (`dict[str, list[str]]`): Ends of names of modules, by the part of the name of PEFT's table.
    """
    from peft.utils import constants

    for table, names in targets.items():
        defaults = getattr(constants, f"TRANSFORMERS_MODELS_TO_{table}_MAPPING", {})
        defaults.setdefault(model_type, list(names))


def call_before_injection(function: Callable[[Any, Any], None]) -> None:
    """
    Have PEFT call `function(config, model)` before any of its methods looks for the modules of a base model that an
    adapter's configuration names. PEFT has no hook for that, so `BaseTuner.inject_adapter`, which all methods share,
    is wrapped, once. If PEFT calls it otherwise, the function is not called, and expert tables that `target_modules`
    match fail in the first forward.
    """
    from peft.tuners.tuners_utils import BaseTuner

    inject_adapter: Any = BaseTuner.inject_adapter
    if getattr(inject_adapter, "is_wrapped_for_peer", False):
        inject_adapter = inject_adapter.__wrapped__

    @functools.wraps(inject_adapter)
    def inject_after_call(self, model, adapter_name, *args, **kwargs):
        function(self.peft_config[adapter_name], model)
        return inject_adapter(self, model, adapter_name, *args, **kwargs)

    wrapped: Any = inject_after_call
    wrapped.is_wrapped_for_peer = True
    BaseTuner.inject_adapter = wrapped  # type: ignore[method-assign]


def call_before_upload(function: Callable[[Any, str], None]) -> None:
    """
    Have `push_to_hub` of PEFT call `function(model, folder)` on what it is about to upload. It saves an adapter, then
    writes a card of Transformers over the one that was saved, and has no hook. If Transformers uploads otherwise, the
    function is not called, and a pushed adapter does not say which package it needs.
    """
    from peft import PeftModel

    inherited = getattr(super(PeftModel, PeftModel), "_upload_modified_files", None)
    if inherited is None:
        return

    @functools.wraps(inherited)
    def upload_after_call(self, working_dir, *args, **kwargs):
        function(self, working_dir)
        return inherited(self, working_dir, *args, **kwargs)

    PeftModel._upload_modified_files = upload_after_call  # type: ignore[method-assign]
