# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""For tests of `RowAdamW`: tables, gradients of some of their rows, and steps with these."""

import functools

import torch
from torch import nn
from torch.testing import assert_close

from modeling_peer import RowAdamW


assert_same = functools.partial(assert_close, rtol=0, atol=0)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ADAMW_OPTIONS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
OPTIONS = {**ADAMW_OPTIONS, "rounding_seed": 7}
NUM_ROWS, WIDTH = 11, 37  # no multiple of the size of a vector


def random_table(dtype=torch.float32, num_rows=NUM_ROWS, width=WIDTH):
    return nn.Parameter(torch.randn(num_rows, width, generator=torch.Generator().manual_seed(0)).to(dtype))


def rows_of(table, **options):
    return RowAdamW([{"params": [table], "rows": True}], **{**OPTIONS, **options})


def random_gradients(number, dtype=torch.float32, seed=1, num_rows=NUM_ROWS, width=WIDTH):
    """Dense gradients of random rows, the last row never among them."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        gradient = torch.randn(num_rows, width, generator=generator)
        yield (
            gradient
            * (torch.rand(num_rows, 1, generator=generator) < 0.5)
            * (torch.arange(num_rows) < num_rows - 1)[:, None]
        ).to(dtype)


def take_steps(optimizer, table, gradients):
    for gradient in gradients:
        table.grad = gradient
        optimizer.step()


def copied(optimizer, table):
    return {name: value.clone() for name, value in optimizer.state[table].items()} | {"table": table.detach().clone()}
