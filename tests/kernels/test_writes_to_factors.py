# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What is written to parts of a gradient in factors is the gradient from then on."""

import pytest
import torch
from table_gradients import dense, literal_rows, random_parts
from torch import nn

from modeling_peer import RowAdamW
from modeling_peer.ops.experts import run_expert_pool
from modeling_peer.ops.factored_gradient import FactoredGradient


NUM_ROWS, WIDTH = 40, 19  # no multiple of the size of a vector


def random_gradient(dtype=torch.float32):
    """A gradient of several parts, and the dense one in float64."""
    parts = random_parts(0, NUM_ROWS, WIDTH, [(5, 3), (7, 2)], dtype, "cpu")
    table = torch.empty(NUM_ROWS, WIDTH, dtype=dtype)
    return FactoredGradient(table, parts), literal_rows(parts, NUM_ROWS, WIDTH)


def write_some(gradient):
    gradient[:20] = 0
    gradient[3] = torch.arange(WIDTH)
    gradient[20:25].mul_(2)
    gradient.T[4].fill_(0.5)
    for row in gradient.unbind()[30:33]:
        row.add_(1)
    gradient.detach()[35:].zero_()
    return gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_writes_one_after_another(dtype):
    gradient, _ = random_gradient(dtype=dtype)
    expected = write_some(gradient.to_rows())
    assert write_some(gradient) is gradient
    assert isinstance(gradient, FactoredGradient)
    assert torch.equal(gradient.to_rows(), expected)


def test_views_that_are_older_than_others():
    gradient, _ = random_gradient()
    first, second = gradient[:20], gradient[20:]
    first.fill_(1.0)
    second.fill_(2.0)
    gradient.clamp_(max=1.5)
    assert torch.equal(gradient.to_rows()[:, 0], torch.tensor([1.0] * 20 + [1.5] * 20))
    first.zero_()
    assert gradient.sum() == 1.5 * 20 * WIDTH


@pytest.mark.parametrize(
    "share", [torch.clone, lambda g: FactoredGradient(g, []).add_(g), lambda g: FactoredGradient(g, []).copy_(g)]
)
def test_writes_leave_other_gradients(share):
    gradient, _ = random_gradient()
    view = gradient[:20]
    other = share(gradient)
    before = dense(other).clone()
    view.zero_()
    assert torch.equal(dense(other), before) and not gradient.to_rows()[:20].any()
    other[20:] = 0
    assert gradient.to_rows()[20:].any()


@pytest.mark.parametrize("how", ["hook", "gradient"])
def test_writes_reach_a_step(how):
    def freeze(gradient):
        gradient = gradient.clone()
        gradient[:20] = 0
        return gradient

    table = nn.Parameter(torch.randn(NUM_ROWS, WIDTH))
    optimizer = RowAdamW([{"params": [table], "rows": True}])
    if how == "hook":
        table.register_hook(freeze)
    indices = torch.arange(NUM_ROWS).view(4, 10)
    run_expert_pool(None, indices, torch.ones(4, 10), None, None, table, None, "cpu").sum().backward()
    if how == "gradient":
        table.grad[:20] = 0
    before = table.detach().clone()
    optimizer.step()
    assert table.ne(before).any(1).tolist() == [False] * 20 + [True] * 20
