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

from modeling_peer import PeerForCausalLM, RowAdamW, expert_parameter_groups
from modeling_peer.continual.freezing import freeze_experts
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
    """The error of a model that is sharded after a freeze, and that of one before; rows are where they were."""
    errors = []
    model = joint_model()
    freeze_experts(model, range(0, 36, 2))
    fully_shard(model)
    before = {name: tensor.full_tensor().clone() for name, tensor in model.state_dict().items() if "_proj" in name}
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    own = BATCHES[0].chunk(2)[rank]
    model(input_ids=own, labels=own).loss.backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        errors.append(str(error))
    after = model.state_dict()
    assert all(torch.equal(after[name].full_tensor(), tensor) for name, tensor in before.items())
    try:
        freeze_experts(model, range(0, 36, 2))
    except ValueError as error:
        errors.append(str(error))
    return errors


def flat(rank):
    """The same of the first FSDP, which takes parameters out of their modules."""
    model = joint_model()
    freeze_experts(model, range(0, 36, 2))
    model = FullyShardedDataParallel(model, use_orig_params=False, device_id=torch.device("cpu"))
    own = BATCHES[0].chunk(2)[rank]
    model(input_ids=own, labels=own).loss.backward()
    try:
        torch.optim.AdamW(model.parameters(), weight_decay=0.1).step()
    except RuntimeError as error:
        return [str(error)]
    return []


def tensor_parallel(rank):
    module = random_module()
    mesh = init_device_mesh("cpu", (2,))
    module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(1)]))
    try:
        freeze_rows(module, "weight", FROZEN)
    except ValueError as error:
        return [str(error)]
    return []


PARTS = (data_parallel, fully_sharded, flat, tensor_parallel)


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    run_on_two_processes(save_parts, str(folder), PARTS)
    return folder


@pytest.mark.parametrize("rank", [0, 1])
class TestDistributed:
    @pytest.mark.parametrize("layout", ["dense", "factored", "view"])
    def test_data_parallel_training_holds_them_and_is_that_of_the_joint_batch(self, distributed, layout, rank):
        found = torch.load(distributed / f"data_parallel-{rank}")[layout]
        tables = [name for name in found["before"] if "expert_pool" in name or "values" in name]
        assert len(tables) == 3
        for name in tables:
            before, after = found["before"][name], found["after"][name]
            assert torch.equal(after[::2], before[::2])
            assert after.ne(before).any(1).sum() > 12
        expected = frozen_training(layout == "factored")
        assert_close(found["norms"], expected["norms"], rtol=1e-4, atol=1e-5)
        for name, tensor in expected["after"].items():
            assert_close(found["after"][name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")

    def test_split_tables_are_refused(self, distributed, rank):
        late, early = torch.load(distributed / f"fully_sharded-{rank}")
        assert "another parameter has taken its place" in late and "splits over processes cannot be frozen" in early
        assert "another parameter has taken its place" in torch.load(distributed / f"flat-{rank}")[0]
        assert "splits over processes cannot be frozen" in torch.load(distributed / f"tensor_parallel-{rank}")[0]
