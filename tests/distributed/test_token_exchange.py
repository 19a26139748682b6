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
"""What a memory group does in one process, in a group of gloo that the tests join for their time."""

import logging
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from cases import tiny_config, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.testing import assert_close
from two_processes import run_on_two_processes, save_parts

from modeling_peer import shard_experts
from modeling_peer.expert_operators import run_expert_pool
from modeling_peer.expert_table import ExpertDownProjection
from modeling_peer.forward_pass import ForwardPass
from modeling_peer.library_releases import is_at_least, timeout_of_default_group
from modeling_peer.memory_group import ExpertValuesExchange
from modeling_peer.process_groups import group_of_all
from modeling_peer.token_exchange import exchange_tokens


TIMEOUT = timedelta(hours=3)


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    if not is_at_least("Transformers", "5.24"):
        pytest.skip("memory groups need Transformers 5.24")
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1, timeout=TIMEOUT)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_groups_of_all_ranks_have_the_time_out_of_the_default_group(group):
    assert timeout_of_default_group() == TIMEOUT
    own = group_of_all("a test")
    assert own is not group and group_of_all("a test") is own
    assert own._get_backend(torch.device("cpu")).options._timeout == TIMEOUT


def test_in_one_process_a_model_stays_whole():
    model = tiny_model(tiny_config("peer", "pkm"))
    tables = {name: (weight, weight.detach().clone()) for name, weight in model.named_parameters()}
    assert shard_experts(model, 1) is model
    assert model.model.memory_group is None
    for name, weight in model.named_parameters():
        same, values = tables[name]
        assert weight is same and torch.equal(weight, values)


def test_one_process_is_no_group_of_two():
    with pytest.raises(ValueError, match="`ep_size` must divide"):
        shard_experts(tiny_model(tiny_config("peer")), 2)


def test_a_forward_pass_is_of_one_number_of_tokens(group):
    forward_pass = ForwardPass(learns=True)
    assert exchange_tokens(group, torch.zeros(3, 4), 4, forward_pass).most_tokens == 3
    assert exchange_tokens(group, torch.zeros(2, 4), 4, forward_pass).most_tokens == 3  # another has more
    message = "A layer runs 4 tokens, and an earlier one of the forward pass told a memory group of 3 at most: do not"
    with pytest.raises(ValueError, match=message):
        exchange_tokens(group, torch.zeros(4, 4), 4, forward_pass)


def table_in_a_group(expert_kernels):
    """A table of values, and what a group of one process makes of it."""
    torch.manual_seed(0)
    table, split = (
        ExpertDownProjection(tiny_config("pkm", expert_kernels=expert_kernels), 9, 0.2).requires_grad_(False)
        for _ in range(2)
    )
    split.load_state_dict(table.state_dict() | {"weight": table.weight.normal_()})
    style, mesh = ExpertValuesExchange(), init_device_mesh("cpu", (1,), mesh_dim_names=("ep",))
    style.shard_param(split, "weight", mesh)
    return table, style.install_forward(split, mesh)


def test_literal_algorithm_is_replaced_with_a_warning(caplog):
    table, split = table_in_a_group("eager")
    weights, indices = torch.rand(3, 4), torch.randint(9, (3, 4))
    with caplog.at_level(logging.WARNING):
        output = split(weights, indices)
    torch.testing.assert_close(output, table(weights, indices))
    assert 'A memory group runs `expert_kernels="torch"` instead of "eager"' in caplog.text


def test_other_kernels_are_not(caplog):
    _, split = table_in_a_group("torch")
    with caplog.at_level(logging.WARNING):
        split(torch.rand(3, 4), torch.randint(9, (3, 4)))
    assert "instead of" not in caplog.text


UNEVEN, WIDTH, PART = (5, 2), 7, 4  # tokens of each process, columns of whole tables, and of the first process


def run_pool(rank: int | None) -> list[torch.Tensor]:
    """The output of a pool and all of its gradients: of one of two processes, or of one with the tokens of both."""
    torch.manual_seed(0)
    hidden_states, up, down = torch.randn(sum(UNEVEN), WIDTH), torch.randn(9, WIDTH), torch.randn(9, WIDTH)
    indices, weights = torch.randint(9, (sum(UNEVEN), 3)), torch.rand(sum(UNEVEN), 3)
    if rank is not None:
        indices, hidden_states, weights = (
            each.split(UNEVEN)[rank] for each in (indices.int(), hidden_states, weights)
        )
        up, down = (each.split(PART, dim=1)[rank] for each in (up, down))
    inputs = [each.clone().requires_grad_() for each in (hidden_states, weights, up, down)]
    hidden_states, weights, up, down = inputs
    exchange = {} if rank is None else {"exchange": exchange_tokens(dist.group.WORLD, hidden_states, WIDTH)}
    output = run_expert_pool(hidden_states, indices, weights, up, None, down, torch.relu, "torch", **exchange)
    output.square().sum().backward()
    return [output.detach(), *(each.grad for each in inputs)]


def test_two_processes_with_different_numbers_of_tokens(tmp_path):
    run_on_two_processes(save_parts, str(tmp_path), (run_pool,))
    of_ranks = [torch.load(tmp_path / f"run_pool-{rank}") for rank in (0, 1)]
    of_tokens, of_tables = zip(*(each[:3] for each in of_ranks), strict=True), [each[3:] for each in of_ranks]
    found = [*map(torch.cat, of_tokens), *(2 * torch.cat(each, dim=1) for each in zip(*of_tables, strict=True))]
    assert_close(found, run_pool(None))  # gradients of tables are the mean over the two
