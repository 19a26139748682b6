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
"""What is written to a part of a gradient in factors changes the gradient, as it does a dense one."""

import pytest
import torch
from table_gradients import literal_rows, random_parts
from torch import nn
from torch.testing import assert_close

from modeling_peer import RowAdamW
from modeling_peer.expert_operators import expert_up
from modeling_peer.factored_gradient import FactoredGradient


NUM_ROWS, WIDTH = 40, 19  # no multiple of the size of a vector


def random_gradient(seed=0, dtype=torch.float32):
    """A gradient of two parts, and the dense one in float64."""
    parts = random_parts(seed, NUM_ROWS, WIDTH, [(5, 3), (7, 2)], dtype)
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
def test_one_after_another(dtype):
    gradient, _ = random_gradient(dtype=dtype)
    expected = write_some(gradient.to_rows())
    assert write_some(gradient) is gradient
    assert isinstance(gradient, FactoredGradient)
    assert torch.equal(gradient.to_rows(), expected)


def test_of_views_that_are_older_than_others():
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
def test_leave_other_gradients(share):
    gradient, _ = random_gradient()
    view = gradient[:20]
    other = share(gradient)
    before = other.to_rows()
    view.zero_()
    assert torch.equal(other.to_rows(), before) and not gradient.to_rows()[:20].any()
    other[20:] = 0
    assert gradient.to_rows()[20:].any()


def test_before_it_is_clipped_accumulated_and_zeroed():
    gradient, exact = random_gradient()
    gradient[:20] = exact[:20] = 0
    gradient.mul_(0.5).add_(random_gradient(1)[0])
    assert isinstance(gradient, FactoredGradient)
    assert_close(gradient.to_rows().double(), exact / 2 + random_gradient(1)[1], rtol=1e-5, atol=1e-5)
    gradient[3] = 0
    gradient.zero_()
    assert not gradient.to_rows().any()


@pytest.mark.parametrize("how", ["hook", "gradient"])
def test_reach_a_step(how):
    def freeze(gradient):
        gradient = gradient.clone()
        gradient[:20] = 0
        return gradient

    table = nn.Parameter(torch.randn(NUM_ROWS, WIDTH))
    optimizer = RowAdamW([{"params": [table], "rows": True}])
    if how == "hook":
        table.register_hook(freeze)
    indices = torch.arange(NUM_ROWS).view(4, 10)
    expert_up(torch.ones(4, WIDTH), indices, table, "cpu", True).sum().backward()
    if how == "gradient":
        table.grad[:20] = 0
    before = table.detach().clone()
    optimizer.step()
    assert table.ne(before).any(1).tolist() == [False] * 20 + [True] * 20
