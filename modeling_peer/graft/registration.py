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
"""Registration of PEER grafts as a method of PEFT."""

import importlib.metadata
from typing import Any

from ..graft_layer import METHOD_NAME, PREFIX
from .peft_releases import PEFT_TYPE_NAME, check_registration, extend, shrink


def register_peer_graft(config_class: type, model_class: type) -> None:
    """
    Make grafts a method of PEFT, once, and check it: the enumeration finds the new member by name and by value, each
    registry has it, and a configuration is the same when it is written and read.

    Args:
        config_class (`type`): [`PeerGraftConfig`].
        model_class (`type`): [`PeerGraftModel`].

    Raises:
        `ImportError`: if PEFT works otherwise than expected, or already has a method of this name. PEFT is left as it
            was.
    """
    version = importlib.metadata.version("peft")
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
        from peft.utils import PeftType, register_peft_method
    except ImportError as error:
        raise ImportError(f"Grafts cannot be registered as a method of PEFT {version}: {error}") from error

    registries: tuple[dict[Any, Any], ...] = (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    registered = registries[0].get(PEFT_TYPE_NAME)
    if registered is config_class:
        return
    if registered is not None or PEFT_TYPE_NAME in PeftType.__members__:
        raise ImportError(f"PEFT {version} already has a method `{PEFT_TYPE_NAME}`, of {registered}.")
    try:
        extend(PeftType)
        register_peft_method(name=METHOD_NAME, config_cls=config_class, model_cls=model_class, prefix=PREFIX)
        check_registration(PeftType, registries, (config_class, PREFIX, model_class))
    except Exception as error:
        for registry in registries:
            registry.pop(PEFT_TYPE_NAME, None)
        shrink(PeftType)
        reason = f"{type(error).__name__}: {error}"
        raise ImportError(f"Grafts cannot be registered as a method of PEFT {version}: {reason}") from error
