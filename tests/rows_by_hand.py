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
"""For tests of frozen rows: small modules, all kinds of optimizers, and what freezing does by the letter."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.optimization import Adafactor

from modeling_peer import RowAdamW
from modeling_peer.expert_operators import expert_up
from modeling_peer.factored_gradient import FactoredGradient


NUM_ROWS, WIDTH = 11, 5
FROZEN = torch.arange(NUM_ROWS) % 3 != 1


def rows_by_row_adamw(parameter):
    return RowAdamW([{"params": [parameter], "rows": True}], lr=0.05, weight_decay=0.1)


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW([p], lr=0.05, weight_decay=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW([p], lr=0.05, weight_decay=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW([p], lr=0.05, weight_decay=0.1, fused=True),
    "RowAdamW": rows_by_row_adamw,
    "RowAdamW without rows": lambda p: RowAdamW([p], lr=0.05, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD([p], lr=0.05),
    "SGD upwards": lambda p: torch.optim.SGD([p], lr=0.05, maximize=True),
    "SGD with decay": lambda p: torch.optim.SGD([p], lr=0.05, weight_decay=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD([p], lr=0.05, momentum=0.9),
    "Adafactor": lambda p: Adafactor([p], lr=0.05, relative_step=False, weight_decay=0.1),
}
# Optimizers of gradients that are not dense.
OF_SPARSE_GRADIENTS = {
    "RowAdamW": rows_by_row_adamw,
    "SGD": OPTIMIZERS["SGD"],
    "SGD with momentum": OPTIMIZERS["SGD with momentum"],
    "SparseAdam": lambda p: torch.optim.SparseAdam([p], lr=0.05),
}


def random_parameter(shape=(NUM_ROWS, WIDTH)):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def random_module(shape=(NUM_ROWS, WIDTH)):
    module = nn.Module()
    module.weight = random_parameter(shape)
    return module


def backward(parameter, step, layout="dense"):
    """Of something with a gradient in every row, or in some, some of them more than once: sparse, or in factors."""
    generator = torch.Generator().manual_seed(step)
    if layout == "sparse":
        rows = torch.randint(len(parameter), (8,), generator=generator)
        F.embedding(rows, parameter, sparse=True).square().sum().backward()
    elif layout == "factored":
        rows = torch.randint(len(parameter), (4, 2), generator=generator)
        tokens = torch.randn(4, parameter.shape[1], generator=generator)
        expert_up(tokens, rows, parameter, "cpu", True).square().sum().backward()
    else:
        (parameter * torch.randn(parameter.shape, generator=generator)).square().sum().backward()


def without_rows(gradient, rows):
    """A copy of a gradient in its layout that is zero in the frozen rows, where `rows` is True."""
    if isinstance(gradient, FactoredGradient):
        parts = gradient._factors
        kept = [torch.where(rows[each.entries.indices], 0.0, each.coefficients) for each in parts]
        return FactoredGradient(
            gradient,
            [each._replace(coefficients=coefficients) for each, coefficients in zip(parts, kept, strict=True)],
        )
    if not gradient.is_sparse:
        return torch.where(rows[:, None], 0.0, gradient)
    values = torch.where(rows[gradient._indices()[0], None], 0.0, gradient._values())
    return torch.sparse_coo_tensor(gradient._indices().clone(), values, gradient.shape, check_invariants=True)
