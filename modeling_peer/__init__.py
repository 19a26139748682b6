# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
PEER for Transformers: language models with a million experts of one neuron each.

The files that a checkpoint carries lie directly in this folder and import nothing from its subfolders. Importing the
package registers PEER models and merged grafts with the auto classes of Transformers, and kernels with the expert
registries. It also registers a quantizer and parallel styles with Transformers and, if PEFT is installed, grafts as a
method of PEFT. Everything else is imported when it is first used.
"""

import importlib
import importlib.util
import warnings
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from . import graft_merged, ops, parallel, quantization  # noqa: F401
from .configuration_peer import PeerConfig
from .experts import ALL_EXPERTS_FUNCTIONS, ALL_RETRIEVAL_FUNCTIONS, ExpertsInterface, RetrievalInterface
from .feed_forward import ALL_FEED_FORWARDS, FeedForwardInterface
from .modeling_peer import (
    PeerForCausalLM,
    PeerForQuestionAnswering,
    PeerForSequenceClassification,
    PeerForTokenClassification,
    PeerModel,
    PeerPreTrainedModel,
)
from .optim.query_norm import freeze_query_norm


# Imported on first use, together with what they need: callbacks of `Trainer`, data loaders, progress bars.
_LAZY_NAMES = {
    "analysis.costs": ("ModelCosts", "PartCosts", "model_costs"),
    "analysis.expert_background": ("ExpertBackground",),
    "analysis.expert_mask": ("masked_experts",),
    "analysis.expert_usage": ("ExpertUsageCallback", "ExpertUsageMeter", "measure_usage"),
    "analysis.token_explanation": ("ExpertUse", "TokenExplanation", "explain_tokens"),
    "configurations": ("configuration_path", "list_configurations"),
    "continual.freezing": ("FrozenExperts", "freeze_experts"),
    "continual.gate_fitting": ("GateFit", "fit_gates"),
    "continual.generated_text": ("generate_text",),
    "continual.growth": ("add_experts", "train_added_experts_only"),
    "continual.sparse_finetuning": ("SparseFinetuningCallback",),
    "facts.table": ("Fact", "read_facts"),
    "facts.teaching": ("remove_facts", "teach_facts"),
    "graft.model": ("PeerGraftConfig", "PeerGraftModel"),
    "graft_merged": ("PeerGraftedConfig",),
    "memory.host_tables": ("host_table_device_map",),
    "ops.disk_tables": ("DiskMeter", "keep_tables_on_disk"),
    "optim.parameter_groups": ("expert_parameter_groups", "make_optimizer"),
    "optim.resuming": ("last_complete_checkpoint",),
    "optim.row_adamw": ("RowAdamW",),
    "parallel.memory_group": ("shard_experts",),
    "parallel.split_checkpoint_callback": ("SplitCheckpointCallback",),
    "parallel.split_checkpoints": ("whole_state_dict",),
    "parallel.split_initialization": ("make_split_model",),
    "quantization.quantizer": ("PeerQuantizationConfig", "dequantize_experts", "quantize_experts"),
    "serving.heads": ("keep_heads",),
}
_MODULE_OF_NAME = {name: module for module, names in _LAZY_NAMES.items() for name in names}

# Names left out of `dir()` and `__all__` if PEFT is not installed.
_OF_PEFT = (
    () if importlib.util.find_spec("peft") else ("PeerGraftConfig", "PeerGraftModel", "remove_facts", "teach_facts")
)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF_NAME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF_NAME} - {*_OF_PEFT})


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
    # A checkpoint carries the code it needs: without this package it loads with `trust_remote_code=True`.
    model_class.register_for_auto_class(auto_class.__name__)
# For label smoothing, `Trainer` shifts labels if it finds the class of the model in this mapping.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["peer"] = PeerForCausalLM.__name__

# PEFT loads an adapter only if its method is registered. PEER models work without PEFT, so a failure only warns.
if not _OF_PEFT:
    try:
        importlib.import_module(".graft", __name__)
    except Exception as error:
        warnings.warn(
            "PEER grafts do not work, the rest of modeling_peer does: they could not be made a method of PEFT. "
            f"{type(error).__name__}: {error}",
            stacklevel=2,
        )

__version__ = "0.1.0"

__all__ = [
    "ALL_EXPERTS_FUNCTIONS",
    "ALL_FEED_FORWARDS",
    "ALL_RETRIEVAL_FUNCTIONS",
    "ExpertsInterface",
    "FeedForwardInterface",
    "PeerConfig",
    "PeerForCausalLM",
    "PeerForQuestionAnswering",
    "PeerForSequenceClassification",
    "PeerForTokenClassification",
    "PeerModel",
    "PeerPreTrainedModel",
    "RetrievalInterface",
    "freeze_query_norm",
    *(name for name in _MODULE_OF_NAME if name not in _OF_PEFT),
]
