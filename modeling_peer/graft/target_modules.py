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
Which modules of a PEER model the other methods of PEFT adapt: defaults of LoRA and IA³, and never an expert table.

PEFT finds modules by the ends of their names, and the tables of experts are called `up_proj`, `down_proj` and
`gate_proj` as the linear layers of a dense feed-forward are. A table is no linear layer: it looks up rows. As with the
experts of other models, which are parameters, lists of `target_modules` leave the tables out, and `target_parameters`
adapts them.
"""

import re
from typing import Any

from torch import nn
from transformers.utils import logging

from ..expert_table import ExpertTable
from .peft_releases import call_before_injection, set_default_targets


logger = logging.get_logger(__name__)

# As for Llama. Of the down-projections those of dense feed-forwards: `mlp.expert_pool.down_proj` is a table.
DEFAULT_TARGETS = {
    "LORA_TARGET_MODULES": ["q_proj", "v_proj"],
    "IA3_TARGET_MODULES": ["k_proj", "v_proj", "mlp.down_proj"],
    "IA3_FEEDFORWARD_MODULES": ["mlp.down_proj"],
}


def register_target_modules() -> None:
    """Give PEFT the default targets of PEER models, and let it leave out expert tables."""
    set_default_targets("peer", DEFAULT_TARGETS)
    call_before_injection(leave_out_tables)


def leave_out_tables(config: Any, model: nn.Module) -> None:
    """
    Add the expert tables that `target_modules` of an adapter match to its `exclude_modules`, which are saved with it.

    Args:
        config (`PeftConfig`): The configuration of an adapter.
        model (`nn.Module`): Its base model, of any kind.

    Raises:
        `ValueError`: if `target_modules` name tables only, or a table by the name of its pool too.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = getattr(config, "target_modules", None)
    if not targets or not hasattr(config, "exclude_modules"):
        return
    # A table that an adapter of its parameter wraps already is a `base_layer` of what has its name.
    tables = {
        re.sub(r"(\.base_layer)+$", "", name)
        for name, module in model.named_modules()
        if isinstance(module, ExpertTable)
    }
    matched = {name for name in tables if check_target_module_exists(config, name)}
    if not matched:
        return
    named = [] if isinstance(targets, str) else sorted(each for each in targets if _names_a_table(each, matched))
    if named or not any(
        check_target_module_exists(config, name) for name, _ in model.named_modules() if name not in tables
    ):
        parameters = sorted({f"expert_pool.{name.rpartition('.')[2]}.weight" for name in matched})
        raise ValueError(
            f"`target_modules` names tables of experts, found {named or targets!r}: they look up rows and are no "
            f"linear layers. To adapt them, name their parameters instead: `target_parameters={parameters}`."
        )
    logger.warning_once(
        "Expert tables are left out of `target_modules`, which adapt linear layers. `target_parameters` of LoRA "
        "adapts tables."
    )
    if isinstance(config.exclude_modules, str):
        config.exclude_modules = "|".join([f"(?:{config.exclude_modules})", *map(re.escape, sorted(matched))])
    else:
        config.exclude_modules = {*(config.exclude_modules or ()), *matched}


def _names_a_table(target, tables):
    """Whether a name of `target_modules` is that of a table and of its pool, rather than that of any projection."""
    return "." in target and any(name == target or name.endswith(f".{target}") for name in tables)
