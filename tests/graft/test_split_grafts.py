# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Models whose tables are split over two processes: copies of them, and merged grafts that are saved. How grafts train and are
saved there is in `test_saves.py`.
"""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from graft_models import grafted
from tiny_models import random_tokens, tiny_config
from transformers import AutoModelForCausalLM
from two_processes import leave_together, run_on_two_processes

from modeling_peer import PeerForCausalLM, shard_experts, whole_state_dict
from modeling_peer.experts import expert_tables
from modeling_peer.parallel import split_checkpoints
from modeling_peer.parallel.releases import HAS_PARALLEL_STYLES


# As GPT-2 has biases, tables are 25 wide, of which the last process has 12.
WITH_BIASES = {"base_model": "gpt2", "placement": "in_place", "num_experts": 10**2}


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


def work(rank, folder):
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(copies(rank), f"{folder}/{rank}")
    save(shard_experts(grafted(**WITH_BIASES), 2).merge_and_unload(), f"{folder}/merged")
    leave_together()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the results of both processes are, and the model that they saved."""
    if not HAS_PARALLEL_STYLES:
        pytest.skip("memory groups need Transformers 5.24")
    folder = tmp_path_factory.mktemp("split")
    run_on_two_processes(work, str(folder))
    return folder


def test_a_model_with_merged_grafts_that_are_split_is_saved_as_any_other(folder):
    expected = grafted(**WITH_BIASES).merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(folder / "merged").state_dict()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["graft", "memory"])
def test_a_copy_of_a_split_model_has_tables_of_its_own(folder, name):
    expected = copies()[name]
    assert not torch.allclose(expected["copy"], expected["model"], atol=1e-2)
    assert not any(expected["gradients"][0]) and all(expected["gradients"][1])
    for rank in (0, 1):
        found = torch.load(folder / str(rank))[name]
        for key in ("copy", "model"):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)
        assert found["gradients"] == expected["gradients"]
