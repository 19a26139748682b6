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
"""Optimizers for models with expert tables, rows that no optimizer moves, and checkpoints to resume from."""

from .frozen_rows import FrozenRows, freeze_rows
from .parameter_groups import expert_parameter_groups, make_optimizer
from .resuming import last_complete_checkpoint
from .row_adamw import RowAdamW
from .split_checkpoint_callback import SplitCheckpointCallback


__all__ = [
    "FrozenRows",
    "RowAdamW",
    "SplitCheckpointCallback",
    "expert_parameter_groups",
    "freeze_rows",
    "last_complete_checkpoint",
    "make_optimizer",
]
