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
"""Advice to users who train a model that has got more experts."""

import warnings
from typing import Any

import torch

from .expert_table import ExpertTable
from .feed_forward_peer import PeerFeedForward


# The attribute under which a module keeps which rows of its parameters are frozen: empty, or not there, if none are.
FROZEN_ROWS = "_frozen_rows"


def advise_on_added_experts(model: Any) -> None:
    """
    Warns if a base model that has got more experts also trains the ones it had before, to be called before a training
    forward. [`add_experts`] leaves only the added experts to be trained; a model that was loaded or copied since does
    not know of that, and would forget what they were added to keep. Python shows the warning once.
    """
    additions = model.config.expert_additions
    if not additions:
        return
    for layer in model.layers.modules():
        if isinstance(layer, PeerFeedForward) and layer.layer_idx in additions[-1]["layers"]:
            pool = model.expert_pool if layer.expert_pool is None else layer.expert_pool
            if any(isinstance(table, ExpertTable) and _trains_all_rows(table) for table in pool.children()):
                _warn(
                    "The grown model trains the experts it had before the last `add_experts` too. That only added "
                    "experts are trained is not saved or copied with a model: call `train_added_experts_only(model)` "
                    "before an optimizer gets it. If all experts are to be trained, silence this by "
                    '`warnings.filterwarnings("ignore", message="The grown model trains")`.'
                )
                return


def _trains_all_rows(table):
    return table.weight.requires_grad and not getattr(table, FROZEN_ROWS, ())


@torch.compiler.assume_constant_result  # run, not traced, where `torch.compile` traces the forward
def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)
