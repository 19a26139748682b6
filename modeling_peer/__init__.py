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
"""PEER for Transformers: language models with a million experts of one neuron each."""

import contextlib

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .analysis.costs import ModelCosts, PartCosts, model_costs
from .analysis.expert_background import ExpertBackground
from .analysis.expert_mask import masked_experts
from .analysis.expert_usage import ExpertUsageCallback, ExpertUsageMeter, measure_usage
from .configuration_peer import PeerConfig
from .continual.freezing import FrozenExperts, freeze_experts
from .continual.gate_fitting import GateFit, fit_gates
from .continual.growth import Addition, add_experts, train_added_experts_only
from .continual.sparse_finetuning import SparseFinetuningCallback
from .expert_kernels import ALL_EXPERT_KERNELS, ExpertKernelsInterface
from .feed_forward import ALL_FEED_FORWARDS, FeedForwardInterface
from .graft_merged import PeerGraftedConfig
from .modeling_peer import (
    PeerForCausalLM,
    PeerForQuestionAnswering,
    PeerForSequenceClassification,
    PeerForTokenClassification,
    PeerModel,
    PeerPreTrainedModel,
)
from .named_configurations import configuration_path, list_configurations
from .optim.resuming import last_complete_checkpoint
from .optim.row_adamw import RowAdamW, expert_parameter_groups


# Where PEFT is, `PeftModel.from_pretrained` is to know grafts; where it is not, asking for them says what is missing.
with contextlib.suppress(ImportError):
    from .graft.model import PeerGraftConfig as PeerGraftConfig
    from .graft.model import PeerGraftModel as PeerGraftModel


def __getattr__(name):
    if name in ("PeerGraftConfig", "PeerGraftModel"):
        from .graft import model as graft_model

        return getattr(graft_model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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

__version__ = "0.1.0"

__all__ = [
    "ALL_EXPERT_KERNELS",
    "ALL_FEED_FORWARDS",
    "Addition",
    "ExpertBackground",
    "ExpertKernelsInterface",
    "ExpertUsageCallback",
    "ExpertUsageMeter",
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
    "RowAdamW",
    "SparseFinetuningCallback",
    "add_experts",
    "configuration_path",
    "expert_parameter_groups",
    "fit_gates",
    "freeze_experts",
    "last_complete_checkpoint",
    "list_configurations",
    "masked_experts",
    "measure_usage",
    "model_costs",
    "train_added_experts_only",
]
