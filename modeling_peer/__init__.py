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
PEER for Transformers: language models with a million experts of one neuron each.

Importing the package registers PEER models and merged grafts with the auto classes of Transformers and, where PEFT is
installed, grafts as a method of PEFT, and which modules of a PEER model its other methods adapt. Everything else is
imported when it is first used.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_peer import PeerConfig
from .expert_kernels import ALL_EXPERT_KERNELS, ExpertKernelsInterface
from .feed_forward import ALL_FEED_FORWARDS, FeedForwardInterface
from .graft.peft_releases import is_peft_installed
from .graft_merged import PeerGraftedConfig
from .memory_group import shard_experts
from .modeling_peer import (
    PeerForCausalLM,
    PeerForQuestionAnswering,
    PeerForSequenceClassification,
    PeerForTokenClassification,
    PeerModel,
    PeerPreTrainedModel,
)
from .named_configurations import configuration_path, list_configurations
from .quantization import PeerQuantizationConfig, dequantize_experts, quantize_experts
from .query_norm import freeze_query_norm
from .table_memory import host_table_device_map


if TYPE_CHECKING:
    from .analysis.collectives import memory_group_bytes
    from .analysis.communication import CommunicationCosts, DesignCosts, communication_costs
    from .analysis.costs import ModelCosts, PartCosts, model_costs
    from .analysis.expert_background import ExpertBackground
    from .analysis.expert_mask import masked_experts
    from .analysis.expert_usage import ExpertUsageCallback, ExpertUsageMeter, measure_usage
    from .analysis.token_explanation import ExpertUse, TokenExplanation, explain_tokens
    from .continual.freezing import FrozenExperts, freeze_experts
    from .continual.gate_fitting import GateFit, fit_gates
    from .continual.generated_text import generate_text
    from .continual.growth import Addition, add_experts, train_added_experts_only
    from .continual.sparse_finetuning import SparseFinetuningCallback
    from .graft.config import PeerGraftConfig as PeerGraftConfig
    from .graft.model import PeerGraftModel as PeerGraftModel
    from .graft.trainer_card import complete_model_card
    from .optim.parameter_groups import expert_parameter_groups, make_optimizer
    from .optim.resuming import last_complete_checkpoint
    from .optim.row_adamw import RowAdamW
    from .optim.split_checkpoint_callback import SplitCheckpointCallback
    from .split_checkpoints import whole_state_dict


# Imported when first asked for, and what they need with them: callbacks of `Trainer`, data loaders, progress bars.
_LAZY_NAMES = {
    "analysis.collectives": ("memory_group_bytes",),
    "analysis.communication": ("CommunicationCosts", "DesignCosts", "communication_costs"),
    "analysis.costs": ("ModelCosts", "PartCosts", "model_costs"),
    "analysis.expert_background": ("ExpertBackground",),
    "analysis.expert_mask": ("masked_experts",),
    "analysis.expert_usage": ("ExpertUsageCallback", "ExpertUsageMeter", "measure_usage"),
    "analysis.token_explanation": ("ExpertUse", "TokenExplanation", "explain_tokens"),
    "continual.freezing": ("FrozenExperts", "freeze_experts"),
    "continual.gate_fitting": ("GateFit", "fit_gates"),
    "continual.generated_text": ("generate_text",),
    "continual.growth": ("Addition", "add_experts", "train_added_experts_only"),
    "continual.sparse_finetuning": ("SparseFinetuningCallback",),
    "graft.model": ("PeerGraftConfig", "PeerGraftModel"),
    "graft.trainer_card": ("complete_model_card",),
    "optim.parameter_groups": ("expert_parameter_groups", "make_optimizer"),
    "optim.resuming": ("last_complete_checkpoint",),
    "optim.row_adamw": ("RowAdamW",),
    "optim.split_checkpoint_callback": ("SplitCheckpointCallback",),
    "split_checkpoints": ("whole_state_dict",),
}
_MODULE_OF_NAME = {name: module for module, names in _LAZY_NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF_NAME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The names that can be read: grafts are left out where PEFT is missing, as reading them raises `ImportError`."""
    missing = () if is_peft_installed() else _LAZY_NAMES["graft.model"]
    return sorted({*globals(), *_MODULE_OF_NAME} - {*missing})


# On import, as spawned ranks and data workers rely on it.
AutoConfig.register("peer", PeerConfig, exist_ok=True)
PeerConfig.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, PeerModel),
    (AutoModelForCausalLM, PeerForCausalLM),
    (AutoModelForSequenceClassification, PeerForSequenceClassification),
    (AutoModelForTokenClassification, PeerForTokenClassification),
    (AutoModelForQuestionAnswering, PeerForQuestionAnswering),
):
    auto_class.register(PeerConfig, model_class, exist_ok=True)
    # A saved checkpoint carries the code it needs, and loads with `trust_remote_code=True` where this package is not.
    model_class.register_for_auto_class(auto_class.__name__)

# PEFT finds an adapter's method only if it was registered before. Without PEFT there is nothing to register with.
if is_peft_installed():
    try:
        importlib.import_module(".graft.model", __name__)
    except Exception as error:  # whatever is wrong with PEFT, PEER models do not need it
        warnings.warn(
            "PEER grafts do not work: PEFT is installed, but they could not be made one of its methods, so adapters "
            "that are grafts can be neither made nor loaded. The rest of modeling_peer works. "
            f"{type(error).__name__}: {error}",
            stacklevel=2,
        )

__version__ = "0.1.0"

__all__ = [
    "ALL_EXPERT_KERNELS",
    "ALL_FEED_FORWARDS",
    "Addition",
    "CommunicationCosts",
    "DesignCosts",
    "ExpertBackground",
    "ExpertKernelsInterface",
    "ExpertUsageCallback",
    "ExpertUsageMeter",
    "ExpertUse",
    "FeedForwardInterface",
    "FrozenExperts",
    "GateFit",
    "ModelCosts",
    "PartCosts",
    "PeerConfig",
    "PeerForCausalLM",
    "PeerForQuestionAnswering",
    "PeerForSequenceClassification",
    "PeerForTokenClassification",
    "PeerGraftedConfig",
    "PeerModel",
    "PeerPreTrainedModel",
    "PeerQuantizationConfig",
    "RowAdamW",
    "SparseFinetuningCallback",
    "SplitCheckpointCallback",
    "TokenExplanation",
    "add_experts",
    "communication_costs",
    "complete_model_card",
    "configuration_path",
    "dequantize_experts",
    "expert_parameter_groups",
    "explain_tokens",
    "fit_gates",
    "freeze_experts",
    "freeze_query_norm",
    "generate_text",
    "host_table_device_map",
    "last_complete_checkpoint",
    "list_configurations",
    "make_optimizer",
    "masked_experts",
    "measure_usage",
    "memory_group_bytes",
    "model_costs",
    "quantize_experts",
    "shard_experts",
    "train_added_experts_only",
    "whole_state_dict",
]
