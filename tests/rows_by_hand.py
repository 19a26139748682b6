# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""For tests of frozen rows: small modules, all kinds of optimizers, and what freezing does by the letter."""

import torch
from torch import nn
from transformers.optimization import Adafactor

from modeling_peer import RowAdamW
from modeling_peer.ops.experts import run_expert_pool
from modeling_peer.ops.factored_gradient import FactoredGradient
from modeling_peer.ops.gradient_factors import Factors


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


def random_parameter(shape=(NUM_ROWS, WIDTH)):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def random_module(shape=(NUM_ROWS, WIDTH)):
    module = nn.Module()
    module.weight = random_parameter(shape)
    return module


def backward(parameter, step, layout="dense"):
    """Of something with a gradient in every row, or, in factors, in some, some of them more than once."""
    generator = torch.Generator().manual_seed(step)
    if layout == "factored":
        rows = torch.randint(len(parameter), (4, 2), generator=generator)
        weights = torch.randn(4, 2, generator=generator)
        takes_factors = rows_by_row_adamw(parameter)
        run_expert_pool(None, rows, weights, None, None, parameter, None, "cpu").square().sum().backward()
        del takes_factors
        assert isinstance(parameter.grad, FactoredGradient)
    else:
        (parameter * torch.randn(parameter.shape, generator=generator)).square().sum().backward()


def without_rows(gradient, rows):
    """A copy of a gradient in its layout that is zero in the frozen rows, where `rows` is True."""
    if isinstance(gradient, FactoredGradient):
        factors = gradient.factors
        held = rows[factors.assignments.rows].view_as(factors.coefficients)
        kept = torch.where(held, 0.0, factors.coefficients)
        return FactoredGradient(gradient, [Factors(kept, factors.tokens, factors.assignments)])
    return torch.where(rows[:, None], 0.0, gradient)
