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
"""Continual learning without catastrophic forgetting: added experts, frozen experts, sparse memory finetuning."""

from .freezing import FrozenExperts, freeze_experts
from .gate_fitting import GateFit, fit_gates
from .generated_text import generate_text
from .growth import Addition, add_experts, train_added_experts_only
from .sparse_finetuning import SparseFinetuningCallback, tf_idf


__all__ = [
    "Addition",
    "FrozenExperts",
    "GateFit",
    "SparseFinetuningCallback",
    "add_experts",
    "fit_gates",
    "freeze_experts",
    "generate_text",
    "tf_idf",
    "train_added_experts_only",
]
