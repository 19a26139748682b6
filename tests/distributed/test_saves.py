# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Trainings whose expert tables are split over gloo processes are saved and resumed by the stock `Trainer`, on other
numbers of processes too, and after one of them was killed.
"""

import json
import re
import time

import pytest
import torch
from launches import assert_same, assert_same_training, handed_over, launch_ranks, of_ranks, run, torchrun
from safetensors.torch import load_file
from slow_tests import slow

from modeling_peer.parallel.releases import HAS_PARALLEL_STYLES


SAVED_AT = 3

# Of each launch, the number of processes and the trainings, one after the other. A training of "row" in its name has
# one second moment for each row, one of "graft" in its name these in a graft of a base model.
UNBROKEN = {"whole": {}, "whole-row": {}, "whole-graft": {"is_graft": True}}
ON_TWO = {
    "split": {"group_size": 2},
    "split-again": {"group_size": 2, "resumes": "split"},
    "row-replicas": {"group_size": 2, "beside_replicas": True},
    "row-replicas-again": {"group_size": 2, "beside_replicas": True, "resumes": "row-replicas"},
    "graft": {"group_size": 2, "is_graft": True},
    "graft-replicas": {"group_size": 2, "is_graft": True, "beside_replicas": True, "resumes": "graft"},
    "from-whole": {"group_size": 2, "resumes": "whole"},
    "fsdp-alone": {"resumes": "split"},
    "memory": {"group_size": 2},
}
ON_FOUR = {
    "two-groups": {"group_size": 2},
    "groups": {"group_size": 2, "resumes": "split"},
    "graft-groups": {"group_size": 2, "is_graft": True, "resumes": "graft"},
    "row-four": {"group_size": 4, "beside_replicas": True, "resumes": "row-replicas"},
}
ON_ONE = {
    "one": {"resumes": "split"},
    "row-one": {"resumes": "row-replicas"},
    "from-groups": {"resumes": "two-groups"},
    "graft-one": {"is_graft": True, "resumes": "graft"},
}
LAUNCHES = [(1, UNBROKEN), (2, ON_TWO), (4, ON_FOUR), (1, ON_ONE)]
TRAININGS = {
    name: (processes, training)
    for processes, trainings in LAUNCHES
    for name, training in trainings.items()
    if name != "memory"
}
RESUMED = [name for name, (_, training) in TRAININGS.items() if "resumes" in training]


def jobs(trainings: dict[str, dict]) -> list[str]:
    return [json.dumps({"name": name, **training}) for name, training in trainings.items()]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    if not HAS_PARALLEL_STYLES:
        pytest.skip("memory groups need Transformers 5.24")
    folder = tmp_path_factory.mktemp("saves")
    for processes, trainings in LAUNCHES:
        launch_ranks(processes, "saves.py", folder, *jobs(trainings))
    return folder


def unbroken(output, name):
    kind = next((f"-{kind}" for kind in ("row", "graft") if kind in name), "")
    return handed_over(output, f"whole{kind}-0")


@pytest.mark.parametrize("name", TRAININGS)
def test_losses_and_weights_are_those_of_one_unbroken_process(output, name):
    expected, steps = unbroken(output, name)
    for weights, facts in of_ranks(output, name, TRAININGS[name][0]):
        assert len(facts["losses"]) == 8
        assert_same_training(facts, steps)
        assert_same(weights, expected)


@pytest.mark.parametrize("name", RESUMED)
def test_the_state_of_the_optimizer_is_the_saved_one_to_the_bit(output, name):
    processes, training = TRAININGS[name]
    saved, facts = handed_over(output, f"{training['resumes']}-saved-0")
    kinds = {key.rpartition(".")[2] for key in saved}
    assert kinds == {"exp_avg", "exp_avg_sq", "row_steps", "step"}
    for resumed, found in of_ranks(output, f"{name}-resumed", processes):
        assert resumed.keys() == saved.keys()
        for key, tensor in saved.items():
            assert resumed[key].dtype == tensor.dtype and torch.equal(resumed[key], tensor), key
        assert found["groups"] == facts["groups"]
        assert {group["rounding_seed"] for group in found["groups"]} == {7}


@pytest.mark.parametrize("name", ["split-again", "row-replicas-again"])
def test_as_many_processes_resume_to_the_bit(output, name):
    expected, steps = handed_over(output, f"{name.removesuffix('-again')}-0")
    weights, facts = handed_over(output, f"{name}-0")
    assert facts["losses"] == steps["losses"]
    assert all(torch.equal(weights[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize(
    ("name", "others"), [("graft", {("fsdp",)}), ("graft-groups", {("fsdp",)}), ("graft-replicas", set())]
)
def test_of_a_graft_the_memory_group_splits_tables_and_fsdp_the_base_model(output, name, others):
    _, facts = handed_over(output, f"{name}-0")
    of_tables = {tuple(mesh) for key, (mesh, _) in facts["layout"].items() if "expert_pool" in key}
    of_others = {tuple(mesh) for key, (mesh, _) in facts["layout"].items() if "expert_pool" not in key}
    assert (of_tables, of_others) == ({("ep",)}, others)
    assert not any("router" in key for key in facts["layout"])
    assert max(facts["gradient_norms"]) > 0.1  # steps were clipped


@pytest.mark.parametrize("name", ["graft", "graft-replicas", "graft-groups"])
def test_checkpoints_of_split_grafts_are_ordinary_adapters(output, name):
    expected, found = output / "whole-graft" / "checkpoint-6", output / name / "checkpoint-6"
    adapter = "adapter_model.safetensors"
    assert_same(load_file(found / adapter), load_file(expected / adapter))
    of_rank = {f"rng_state_{rank}.pth" for rank in range(TRAININGS[name][0])}
    files = {file.name for file in expected.iterdir()} - {"rng_state.pth"}
    assert {file.name for file in found.iterdir()} == files | of_rank


@pytest.mark.parametrize("name", ["split", "row-replicas", "groups"])
def test_checkpoints_are_ordinary_ones(output, name):
    """With the whole model in safetensors, and nothing that was only on its way."""
    checkpoint = output / name / "checkpoint-6"
    weights, _ = unbroken(output, name)
    shapes = {key: tensor.shape for key, tensor in load_file(checkpoint / "model.safetensors").items()}
    assert shapes == {key: tensor.shape for key, tensor in weights.items()}
    processes = TRAININGS[name][0]
    assert {file.name for file in checkpoint.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "training_args.bin"),
        *("training_state", "trainer_state.json"),
        *(f"rng_state_{rank}.pth" for rank in range(processes)),
        *(file.name for file in checkpoint.glob("*.py")),
    }


def test_no_process_has_a_whole_table_in_memory(output):
    for _, facts in of_ranks(output, "memory"):
        table = facts["table"]
        assert facts["is_same"]
        for step in ("save", "save_beside_replicas", "save_graft", "resume"):
            assert facts[step] < table / 4, step
        # The two tables, of which a process has half.
        assert table <= facts["load"] + table / 50 and facts["load"] < table * 5 / 4


@slow
def test_a_killed_rank_ends_the_run_by_name_and_the_run_resumes(output):
    job = {"name": "killed", "group_size": 2}
    code, printed = run(torchrun(2), "saves.py", output, json.dumps({**job, "killed": True}))
    assert code != 0
    assert time.time() - float((output / "killed_at").read_text()) < 30
    report = printed[printed.index("Root Cause") :]
    assert re.search(r"rank\s*: 1 ", report)
    assert "SIGKILL" in report
    launch_ranks(2, "saves.py", output, json.dumps({**job, "continues": True}))
    expected, steps = handed_over(output, "split-0")
    for weights, facts in of_ranks(output, "killed"):
        assert facts["resumed_from"] == str(output / "killed" / f"checkpoint-{SAVED_AT}")
        assert facts["losses"] == steps["losses"]
        assert all(torch.equal(weights[key], tensor) for key, tensor in expected.items())
