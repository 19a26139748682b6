# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Frozen experts in a training on two processes, each of which gets half of the rows of each batch."""

import pytest
import torch
from rows_by_hand import FROZEN, random_module
from tiny_models import random_tokens, tiny_config
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.testing import assert_close
from trainer_worker import copy_of_state
from two_processes import run_on_two_processes, save_parts

from modeling_peer import PeerForCausalLM, RowAdamW, expert_parameter_groups, freeze_experts
from modeling_peer.optim.frozen_rows import freeze_rows


BATCHES = [random_tokens(4, 12, seed=seed) for seed in range(8)]


def joint_model():
    torch.manual_seed(0)
    return PeerForCausalLM(tiny_config("peer", "pkm")).train()


def frozen_training(factored, rank=0, world_size=1, **wrapping):
    """What is left of a model after three steps, a freeze of every second expert, and five more; and the norms."""
    model = joint_model()
    groups = expert_parameter_groups(model, learning_rate=1e-2, weight_decay=0.1)
    # With a small eps, Adam turns the rounding of a vanishing gradient into a step of full size.
    if factored:
        optimizer = RowAdamW(groups, eps=1e-3)
    else:
        optimizer = torch.optim.AdamW(
            [p for group in groups for p in group["params"]], lr=1e-2, eps=1e-3, weight_decay=0.1
        )
    wrapped = DistributedDataParallel(model, **wrapping) if world_size > 1 else model
    norms, before = [], None
    for step, batch in enumerate(BATCHES):
        if step == 3:
            freeze_experts(model, range(0, 36, 2))
            before = copy_of_state(model)
        optimizer.zero_grad()
        own = batch.chunk(world_size)[rank]
        wrapped(input_ids=own, labels=own).loss.backward()
        norms.append(clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
    return {"before": before, "after": copy_of_state(model), "norms": torch.stack(norms)}


def data_parallel(rank):
    return {
        "dense": frozen_training(False, rank, 2),
        "factored": frozen_training(True, rank, 2),
        "view": frozen_training(False, rank, 2, gradient_as_bucket_view=True),
    }


def fully_sharded(rank):
    """A model that is sharded after a freeze is refused, and so is a freeze after that; rows are where they were."""
    model = joint_model()
    freeze_experts(model, range(0, 36, 2))
    fully_shard(model)
    before = {name: tensor.full_tensor().clone() for name, tensor in model.state_dict().items() if "_proj" in name}
    backward_and_refused_step(model, rank)
    after = model.state_dict()
    assert all(torch.equal(after[name].full_tensor(), tensor) for name, tensor in before.items())
    with pytest.raises(ValueError, match="splits over processes cannot be frozen"):
        freeze_experts(model, range(0, 36, 2))


def flat(rank):
    """The first FSDP takes parameters out of their modules."""
    model = joint_model()
    freeze_experts(model, range(0, 36, 2))
    model = FullyShardedDataParallel(model, use_orig_params=False, device_id=torch.device("cpu"))
    backward_and_refused_step(model, rank)


def backward_and_refused_step(model, rank):
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    own = BATCHES[0].chunk(2)[rank]
    model(input_ids=own, labels=own).loss.backward()
    with pytest.raises(RuntimeError, match="another parameter has taken its place"):
        optimizer.step()


def tensor_parallel(rank):
    module = random_module()
    mesh = init_device_mesh("cpu", (2,))
    module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(1)]))
    with pytest.raises(ValueError, match="splits over processes cannot be frozen"):
        freeze_rows(module, "weight", FROZEN)


def test_split_tables_are_refused(tmp_path):
    run_on_two_processes(save_parts, str(tmp_path), (fully_sharded, flat, tensor_parallel))


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    run_on_two_processes(save_parts, str(folder), (data_parallel,))
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("layout", ["dense", "factored", "view"])
def test_data_parallel_training_holds_them_and_is_that_of_the_joint_batch(distributed, layout, rank):
    found = torch.load(distributed / f"data_parallel-{rank}")[layout]
    tables = [name for name in found["before"] if "expert_pool" in name or "values" in name]
    assert len(tables) == 3
    for name in tables:
        before, after = found["before"][name], found["after"][name]
        assert torch.equal(after[::2], before[::2])
        assert after.ne(before).any(1).sum() > 12
    expected = frozen_training(layout == "factored")
    assert_close(found["norms"], expected["norms"], rtol=1e-4, atol=1e-5)
    assert_close(found["after"], expected["after"], rtol=1e-4, atol=1e-5)
