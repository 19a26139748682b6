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
"""For tests of gradients of expert tables: their rows whatever their layout, factors of given ones, and who takes factors."""

import torch
from torch import nn

from modeling_peer.expert_table import ExpertTable
from modeling_peer.factored_gradient import TAKER, Entries, FactoredGradient, Factors


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient as a dense tensor, whether it is dense, sparse by rows or in factors."""
    return gradient.to_rows() if isinstance(gradient, FactoredGradient) else gradient.to_dense()


def in_factors(gradient: torch.Tensor, kernels: str = "cpu") -> FactoredGradient:
    """A dense gradient in factors, exactly: an entry for each row that is not zero, the last one first."""
    rows = gradient.ne(0).any(1).nonzero()[:, 0].flip(0)
    tokens = gradient[rows].to(torch.promote_types(gradient.dtype, torch.float32))
    entries = Entries(rows[:, None], len(gradient), kernels)
    return FactoredGradient(gradient, [Factors(tokens.new_ones(len(rows), 1), tokens, entries)])


def tables_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The expert tables of a model by their names, each once."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, ExpertTable)}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in tables}


def refuse_factors(model: nn.Module) -> None:
    """Make the gradients of a model's tables dense, whatever optimizer lives."""
    for table in tables_of(model).values():
        vars(table).pop(TAKER, None)
