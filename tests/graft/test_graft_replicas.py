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
"""Grafts under DistributedDataParallel: gradients of their tables in factors, as of one process on the joint batch."""

import os

import pytest
import torch
import torch.distributed as dist
from graft_models import grafted
from tiny_models import random_tokens
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer
from two_processes import leave_together, run_on_two_processes

from modeling_peer import RowAdamW, expert_parameter_groups, shard_experts
from modeling_peer.factored_gradient import FactoredGradient
from modeling_peer.library_releases import is_at_least


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(wrap, rank=0, world_size=1, group_size=1):
    """The trained weights and the norms of three clipped steps, and how many gradients came in factors."""
    model = grafted()
    if group_size > 1:
        shard_experts(model, group_size)
    # With a small eps, Adam turns the rounding of a vanishing gradient into a step of full size.
    optimizer = RowAdamW(expert_parameter_groups(model.train(), learning_rate=1e-2), eps=1e-2)
    wrapped, norms = wrap(model), []
    for seed in range(3):
        optimizer.zero_grad()
        tokens = random_tokens(4, 12, seed=seed).chunk(world_size)[rank]
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        local = [each.to_local() if isinstance(each, DTensor) else each for each in gradients]
        in_factors = sum(isinstance(each, FactoredGradient) for each in local)
        # As `Trainer` clips where some parameters are split and others are not.
        norms.append(Trainer._mixed_mesh_grad_norm(None, model, 0.05).item())
        optimizer.step()
    trained = {name: whole(each.detach()) for name, each in model.named_parameters() if each.requires_grad}
    return trained, norms, in_factors


def train_a_half(rank, folder, group_size=1):
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(train(DistributedDataParallel, rank, 2, group_size), f"{folder}/{rank}")
    leave_together()


@pytest.mark.parametrize("group_size", [1, 2])
def test_replicas_train_as_one_process_on_the_joint_batch(tmp_path, group_size):
    """With the tables of the grafts in both, and split over both."""
    if group_size > 1 and not is_at_least("Transformers", "5.24"):
        pytest.skip("memory groups need Transformers 5.24")
    expected, norms, in_factors = train(lambda model: model)
    assert in_factors == 2
    run_on_two_processes(train_a_half, str(tmp_path), group_size)
    for rank in (0, 1):
        found, found_norms, found_in_factors = torch.load(tmp_path / str(rank))
        assert found_in_factors == 2
        torch.testing.assert_close(torch.tensor(found_norms), torch.tensor(norms), rtol=1e-5, atol=0)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
