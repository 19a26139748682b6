# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Grafts on two processes, beside DistributedDataParallel or FSDP2 for their base model: as one process on the joint batch.
"""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from graft_models import base_model_of, grafted, grafts_of
from peft import PeftModel
from tiny_models import random_tokens, tiny_config
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, Trainer
from two_processes import leave_together, run_on_two_processes

from modeling_peer import (
    PeerForCausalLM,
    RowAdamW,
    expert_parameter_groups,
    shard_experts,
    whole_state_dict,
)
from modeling_peer.experts import expert_tables
from modeling_peer.ops.factored_gradient import FactoredGradient
from modeling_peer.parallel import split_checkpoints
from modeling_peer.parallel.columns import is_split
from modeling_peer.parallel.releases import HAS_PARALLEL_STYLES


STEPS = 10
CLIPPING = 0.03

LAYERS = {"llama": "layers", "gpt2": "h"}
# As GPT-2 has biases, tables are 25 wide.
WITH_BIASES = {"base_model": "gpt2", "placement": "in_place", "num_experts": 10**2}

# Of each case, the graft, the number of processes of a memory group, and what else is not as usual.
REPLICAS = {"whole tables": {"group_size": 1}}
GROUPS = {
    "split tables": {},
    "biases and a moment for each row": {"graft": WITH_BIASES, "second_moment": "row"},
    "fsdp2": {"beside_fsdp": True},
    "fsdp2 and biases": {"graft": WITH_BIASES, "beside_fsdp": True},
}
CASES = REPLICAS | (GROUPS if HAS_PARALLEL_STYLES else {})

needs_groups = pytest.mark.skipif(not HAS_PARALLEL_STYLES, reason="memory groups need Transformers 5.24")


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fully_sharded(model):
    """The model with its layers and all else under FSDP2, except for the tables."""
    from torch.distributed.fsdp import fully_shard

    tables = set(tables_of(model))
    for layer in grafts_of(model)[0].decoder_forward.decoder.get_submodule(LAYERS[model.config.model_type]):
        fully_shard(layer, ignored_params=tables)
    return fully_shard(model, ignored_params=tables)


def train(rank=None, graft=None, group_size=2, second_moment="full", beside_fsdp=False, folder=None):
    """Weights, norms and losses of clipped steps, and how many gradients came in factors; `rank=None`: one process."""
    model = grafted(**(graft or {})).train()
    num_processes = 1 if rank is None else 2
    if rank is not None and group_size > 1:
        shard_experts(model, group_size)
    if rank is not None and beside_fsdp:
        fully_sharded(model)
    # With a small eps, Adam turns the rounding of a vanishing gradient into a step of full size.
    groups = expert_parameter_groups(model, learning_rate=1e-2, weight_decay=0.1)
    optimizer = RowAdamW(groups, eps=1e-2, second_moment=second_moment)
    is_replica = rank is not None and not beside_fsdp
    wrapped = DistributedDataParallel(model) if is_replica else model
    norms, losses, in_factors = [], [], []
    for seed in range(STEPS):
        optimizer.zero_grad()
        tokens = random_tokens(4, 12, seed=seed).chunk(num_processes)[rank or 0]
        loss = wrapped(input_ids=tokens, labels=tokens).loss
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        local = [each.to_local() if isinstance(each, DTensor) else each for each in gradients]
        in_factors.append(sum(isinstance(each, FactoredGradient) for each in local))
        losses.append(mean_over_processes(loss.detach(), rank))
        norms.append(clip(model).item())
        optimizer.step()
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {
        "weights": {name: whole(parameter) for name, parameter in trained.items()},
        "columns": {name: tuple(each.to_local().shape) for name, each in trained.items() if is_split(each)},
        "split": [name for name, each in trained.items() if isinstance(each, DTensor)],
        "norms": norms,
        "losses": losses,
        "in factors": in_factors,
    }
    if folder is not None:
        save(model, folder)
    return found


def clip(model):
    """As `Trainer` clips, also where some parameters are split and others are not. Returns the norm before."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return Trainer._mixed_mesh_grad_norm(None, model, CLIPPING)
    return clip_grad_norm_(model.parameters(), CLIPPING)


def mean_over_processes(loss, rank):
    if rank is None:
        return loss.item()
    dist.all_reduce(loss)
    return loss.item() / 2


def save(model, folder):
    """Saves a model whose tables are split, in chunks of four rows."""
    with pytest.raises(ValueError, match="shard_experts"):
        model.save_pretrained(folder)
    chunk_elements, split_checkpoints.CHUNK_ELEMENTS = split_checkpoints.CHUNK_ELEMENTS, 100
    state_dict = whole_state_dict(model, folder)
    split_checkpoints.CHUNK_ELEMENTS = chunk_elements
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state_dict)
    else:
        assert state_dict == {}


def copies(rank=None):
    """
    Outputs of models and of copies of them that have other tables, and which of them have gradients after a backward
    through the copy.
    """
    found = {}
    torch.manual_seed(0)
    for name, model in {
        "graft": grafted(**WITH_BIASES),
        "memory": PeerForCausalLM(tiny_config("peer", "pkm")),
    }.items():
        if rank is not None:
            shard_experts(model, 2)
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for table in tables_of(copied):
                table.mul_(2)
        tokens = random_tokens(2, 9)
        output = copied(input_ids=tokens, labels=tokens)
        output.loss.backward()
        found[name] = {
            "copy": output.logits.detach(),
            "model": model(input_ids=tokens).logits.detach(),
            "gradients": [[table.grad is not None for table in tables_of(each)] for each in (model, copied)],
        }
    return found


def tables_of(model):
    return [table.weight for table in expert_tables(model).values()]


def work(rank, folder, has_groups):
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for name, case in CASES.items():
        # To be saved only if tables are split.
        found[name] = train(rank, **case, folder=f"{folder}/{name}" if name in GROUPS else None)
    if has_groups:
        found["copies"] = copies(rank)
        save(shard_experts(grafted(**WITH_BIASES), 2).merge_and_unload(), f"{folder}/merged")
    torch.save(found, f"{folder}/{rank}")
    leave_together()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the results of both processes are, and the adapters that they saved."""
    folder = tmp_path_factory.mktemp("replicas")
    run_on_two_processes(work, str(folder), HAS_PARALLEL_STYLES)
    return folder


def of_rank(folder, rank):
    return torch.load(folder / str(rank))


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_one_process_on_the_joint_batch(folder, name):
    expected = train(**CASES[name])
    assert len(expected["norms"]) == STEPS and min(expected["norms"]) > CLIPPING
    for rank in (0, 1):
        found = of_rank(folder, rank)[name]
        assert found["in factors"] == expected["in factors"]
        for log in ("norms", "losses"):
            torch.testing.assert_close(torch.tensor(found[log]), torch.tensor(expected[log]), rtol=1e-5, atol=0)
        torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-4, atol=1e-5)
    assert found["norms"] == of_rank(folder, 0)[name]["norms"]


@needs_groups
@pytest.mark.parametrize("name", GROUPS)
def test_split_grafts_have_columns_of_tables_and_are_saved_as_any_other(folder, name):
    """Tables are no parameters of FSDP2, which splits all others."""
    base_model = base_model_of(CASES[name].get("graft", {}).get("base_model", "llama"))
    loaded = PeftModel.from_pretrained(base_model, folder / name, is_trainable=True)
    parameters = {name: each.detach() for name, each in loaded.named_parameters() if each.requires_grad}
    assert not (folder / name / "adapter_model.bin").exists()
    for rank in (0, 1):
        found = of_rank(folder, rank)[name]
        torch.testing.assert_close(found["weights"], parameters, rtol=0, atol=0)
        assert set(found["split"]) == set(parameters if "fsdp2" in name else found["columns"])
        # Of 25 columns, the last process has 12.
        assert found["columns"] == {
            each: (len(table), table.shape[1] // 2 + (table.shape[1] % 2 and rank == 0))
            for each, table in parameters.items()
            if "expert_pool" in each
        }


@needs_groups
def test_a_model_with_merged_grafts_that_are_split_is_saved_as_any_other(folder):
    expected = grafted(**WITH_BIASES).merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(folder / "merged").state_dict()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@needs_groups
@pytest.mark.parametrize("name", ["graft", "memory"])
def test_a_copy_of_a_split_model_has_tables_of_its_own(folder, name):
    expected = copies()[name]
    assert not torch.allclose(expected["copy"], expected["model"], atol=1e-2)
    assert not any(expected["gradients"][0]) and all(expected["gradients"][1])
    for rank in (0, 1):
        found = of_rank(folder, rank)["copies"][name]
        for key in ("copy", "model"):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)
        assert found["gradients"] == expected["gradients"]
