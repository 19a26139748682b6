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
"""What replicas exchange of the gradients of tables: as few bytes as they can, and as many as are counted."""

from unittest import mock

import pytest
import torch
from test_communication import received
from tiny_models import random_tokens, tiny_config

from modeling_peer import PeerForCausalLM, RowAdamW, communication_costs, expert_parameter_groups, gradient_exchange
from modeling_peer.expert_table import ExpertTable


# Models whose replicas exchange gradients of tables.
EXCHANGED = [{}, {"gated_experts": True}, {"share_experts_across_layers": True}]


def tables_with_gradients(config, dtype, num_tokens):
    """The tables of a model after a backward, and the optimizer that takes their factors as long as it lives."""
    torch.manual_seed(0)
    model = PeerForCausalLM(config).to(dtype)
    optimizer = RowAdamW(expert_parameter_groups(model, learning_rate=1e-3))
    tokens = random_tokens(3, num_tokens // 3)
    model(tokens, labels=tokens).loss.backward()
    return list({m.weight: None for m in model.modules() if isinstance(m, ExpertTable)}), optimizer


def average(tables, num_ranks):
    """Averages the gradients of tables as if other ranks had the same: bytes of each collective, and what is summed."""
    moved, sums = [], []

    def gather(part, group):
        if part.dtype != torch.int64:  # of those, numbers of tokens
            moved.append((num_ranks - 1) * part.nbytes)
        return part.expand(num_ranks, *part.shape[1:]).clone()

    def all_reduce(rows, group):
        sums.append(rows)
        moved.append(2 * (num_ranks - 1) * rows.nbytes // num_ranks)

    ranks = mock.Mock(all_reduce=all_reduce, get_world_size=lambda group: num_ranks)
    with mock.patch.multiple(gradient_exchange, _gather=gather, dist=ranks):
        gradient_exchange.average_gradients(tables, None)
    return moved, sums


@pytest.mark.parametrize("num_tokens", [6, 450, 900])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", EXCHANGED, ids=str)
def test_replicas_exchange_what_they_do(fields, dtype, num_ranks, num_tokens):
    """The code of the exchange runs on tensors as they come, without other ranks."""
    config = tiny_config("peer", "pkm", "peer", num_experts=32**2, **fields)
    tables, optimizer = tables_with_gradients(config, dtype, num_tokens)
    moved, sums = average(tables, num_ranks) if num_ranks > 1 else ([], [])
    costs = communication_costs(config, num_ranks, tokens_per_rank=num_tokens, dtype=dtype)
    of_tables = [size for (name, _), size in received(costs["ddp_factors"]).items() if "rest" not in name]
    if num_tokens >= 450 and config.share_experts_across_layers:
        # Factors of two layers may have been summed, to fewer rows than are counted.
        assert sum(moved) <= sum(of_tables)
        return
    assert sum(of_tables) == sum(moved)
    if not sums:
        factors = [table.grad.factors for table in tables]
        size = sum(each.coefficients.nbytes + each.tokens.nbytes for each in factors)
        size += sum({id(each.entries): each.entries.indices.nbytes for each in factors}.values())
        assert costs["ddp_factors"].tables.gradients == size
    elif len(sums) == len(tables):
        assert costs["ddp_factors"].tables.gradients == sum(table.nbytes for table in tables)
    del optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", EXCHANGED, ids=str)
def test_replicas_move_the_fewer_bytes(fields, dtype):
    """Of each model with one pool: of factors and dense sums, whatever is fewer, up to where that changes."""
    config = tiny_config("peer", num_experts=32**2, **fields)
    chosen = set()
    for num_tokens in range(30, 900, 60):
        sizes = {}
        for name, smaller in (("factors", True), ("sums", False), ("chosen", None)):
            tables, optimizer = tables_with_gradients(config, dtype, num_tokens)
            decide = gradient_exchange._factors_are_smaller if smaller is None else mock.Mock(return_value=smaller)
            with mock.patch.object(gradient_exchange, "_factors_are_smaller", decide):
                sizes[name] = sum(average(tables, num_ranks=4)[0])
            assert optimizer.param_groups
        assert sizes["chosen"] == min(sizes["factors"], sizes["sums"]), num_tokens
        chosen.add("factors" if sizes["factors"] < sizes["sums"] else "sums")
    assert chosen == {"factors", "sums"}
