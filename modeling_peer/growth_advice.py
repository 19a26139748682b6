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
"""Advice to users who train a grown model: one that has got more experts by [`add_experts`]."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch

from .expert_table import ExpertTable
from .feed_forward_peer import PeerFeedForward


# The attribute under which a module keeps the states of those of its parameters that have frozen rows. `freeze_rows`
# in the folder `optim` writes it, and this file reads it: a checkpoint carries this file and no folder, so the name
# is defined here.
FROZEN_ROWS = "_frozen_rows"

# The attribute under which a base model keeps how many of its additions have been checked.
CHECKED_ADDITIONS = "_checked_additions"


class _CheckedAdditions(int):
    """A number of additions. In a copy of the model, by `copy.deepcopy` or pickle, which has no freezes, it is 0."""

    def __reduce__(self):
        return int, ()


def advise_on_added_experts(model: Any) -> None:
    """
    Warn if a base model that has got more experts also trains experts that it had before, to be called before a
    training forward.

    [`add_experts`] leaves only the added experts to be trained. A model that was loaded or copied since does not know
    of that, and would forget what they were added to keep. The model is checked once after each addition, in its
    first training forward, as later ones should not pay for it.
    """
    additions = model.config.expert_additions
    if not additions:
        return
    # Not where `torch.compile` traces: the check runs in no compiled forward, and the mark would compile it twice.
    if not torch.compiler.is_compiling():
        if model.__dict__.get(CHECKED_ADDITIONS, 0) == len(additions):
            return
        model.__dict__[CHECKED_ADDITIONS] = _CheckedAdditions(len(additions))
    if any(_trains_any_row(table, num_old) for table, num_old in _old_rows(model, additions[-1])):
        _warn(
            "The grown model trains the experts it had before the last `add_experts` too. That only added "
            "experts are trained is not saved or copied with a model: call `train_added_experts_only(model)` "
            "before an optimizer gets it. If all experts are to be trained, silence this by "
            '`warnings.filterwarnings("ignore", message="The grown model trains")`.'
        )


def _old_rows(model, addition) -> Iterator[tuple[ExpertTable, int]]:
    """The tables that the model had before an addition, its last, and how many first rows of each are that old."""
    for layer in model.layers.modules():
        if not isinstance(layer, PeerFeedForward):
            continue
        pool = model.expert_pool if layer.expert_pool is None else layer.expert_pool
        pools, num_added = [pool, *pool.added], 0
        if layer.layer_idx in addition["layers"]:
            if addition["mode"] == "protected":
                pools.pop()
            else:
                num_added = addition["num_experts"]
        for each in pools:
            for table in each.children():
                if isinstance(table, ExpertTable):
                    yield table, table.num_embeddings - num_added


def _trains_any_row(table, num_rows):
    """Whether any of the first rows of a table is trained."""
    if not table.weight.requires_grad:
        return False
    freezes = table.__dict__.get(FROZEN_ROWS, ())
    return not any(state.name == "weight" and bool(state.mask[:num_rows].all()) for state in freezes)


@torch.compiler.assume_constant_result  # run, not traced, where `torch.compile` traces the forward
def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)
