# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Two and four gloo processes whose expert tables are split over memory groups compute what one process computes of the
joint batch: with FSDP2 for the rest, under DistributedDataParallel, and in two groups of two.
"""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from kernels_used import TRAINING
from launches import assert_same, assert_same_training, handed_over, launch_ranks, of_ranks
from memory_group import LOOPS, ON_FOUR
from memory_group_bytes import memory_group_bytes
from safetensors.torch import load_file
from slow_tests import REASON, RUN_SLOW
from train import CASES

from modeling_peer.parallel.releases import HAS_PARALLEL_STYLES


# Number of processes and of those in a group.
RUNS = [(2, 2), (4, 2), (4, 4)]
CASES_OF_LOOPS = [
    (run, name)
    for run in RUNS
    for name in (LOOPS if run[0] == 2 else ON_FOUR["loops"])
    if name != "replicated" or run == (4, 2)
]
CASES_OF_TRAINERS = [
    (run, name) for run in RUNS for name in (CASES if run[0] == 2 else ON_FOUR["trainers"]) if name != "moe"
]

# The collectives of a layer, and in which of its passes.
COLLECTIVES = {
    "indices": ("forward", "all_gather"),
    "hidden states": ("forward", "all_to_all"),
    "dot products": ("forward", "reduce_scatter"),
    "weighted activations": ("forward", "all_gather"),
    "outputs": ("forward", "all_to_all"),
    "output gradients": ("backward", "all_to_all"),
    "weight gradients": ("backward", "reduce_scatter"),
    "neuron gradients": ("backward", "all_gather"),
    "hidden state gradients": ("backward", "all_to_all"),
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Where the results are of one process on the joint batch, and of a number of processes in groups of a size."""
    if not HAS_PARALLEL_STYLES:
        pytest.skip("memory groups need Transformers 5.24")
    folders: dict[tuple[int, int], Path] = {}

    def folder(num_processes: int, group_size: int) -> Path:
        if num_processes == 4 and not RUN_SLOW:
            pytest.skip(REASON)
        key = num_processes, group_size
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("{}-{}".format(*key))
            launch_ranks(num_processes, "memory_group.py", folders[key], "--group-size", str(group_size))
        return folders[key]

    return folder


@pytest.fixture
def ranks(launched, run):
    """A function that returns what the processes of a run handed over under a name."""
    return lambda name, folder=".": of_ranks(launched(*run) / folder, name, run[0])


@pytest.fixture
def whole(launched):
    """The same of one process on the joint batch."""
    return lambda name: handed_over(launched(1, 1), f"{name}-0")


each_run = pytest.mark.parametrize("run", RUNS)


@pytest.mark.parametrize(("run", "name"), CASES_OF_LOOPS)
def test_steps_are_those_of_one_process_on_the_joint_batch(ranks, whole, run, name):
    """Losses, norms before clipping, which are one number on all ranks, and weights and statistics after the steps."""
    expected, steps = whole(f"loop-{name}")
    assert steps["in_factors"][0] in (1, 2, 3, 4)
    norms = ranks(f"loop-{name}")[0][1]["gradient_norms"]
    assert min(norms) > 0.5  # every step was clipped
    for state, facts in ranks(f"loop-{name}"):
        assert len(facts["losses"]) == 6
        assert facts["gradient_norms"] == norms
        assert facts["in_factors"] == steps["in_factors"]
        assert_same_training(facts, steps)
        assert_same(state, expected)


@pytest.mark.parametrize(("run", "name"), [case for case in CASES_OF_LOOPS if case[1] != "replicated"])
def test_a_rank_holds_columns_of_tables_and_a_part_of_the_rest(ranks, whole, run, name):
    num_processes, group_size = run
    for rank, (_, facts) in enumerate(ranks(f"loop-{name}")):
        tables = {key for key in facts["layout"] if "expert_pool." in key or ".values." in key}
        assert tables
        for key, (mesh, shape) in facts["layout"].items():
            num_rows, *others = whole(f"loop-{name}")[0][key].shape
            if key in tables:
                assert (mesh, shape) == (["ep"], [num_rows, others[0] // group_size])
            else:
                # FSDP2's: chunks of rows, of which the last may be smaller or empty.
                chunk = math.ceil(num_rows / num_processes)
                held = max(min(chunk, num_rows - rank * chunk), 0)
                assert (mesh, shape[0]) == (["fsdp"], held)


@each_run
def test_frozen_experts_stay_to_the_bit(ranks):
    """Every second one, from the middle of the training on."""
    for state, _ in ranks("loop-frozen"):
        tables = [key for key in state if key.startswith("frozen.")]
        assert tables
        for key in tables:
            after = state[key.removeprefix("frozen.")]
            assert torch.equal(after[::2], state[key][::2]) and after[1::2].ne(state[key][1::2]).any()


@pytest.mark.parametrize("run", [(4, 2)])
def test_replicas_of_all_are_split_in_parts_of_the_processes(ranks):
    """With `dp_replicate_size` = 2 on four processes."""
    for _, facts in ranks("loop-replicated"):
        meshes = {("ep" if "expert_pool" in key else "rest", *mesh) for key, (mesh, _) in facts["layout"].items()}
        assert meshes == {("ep", "ep"), ("rest", "dp_replicate", "fsdp")}


@pytest.mark.parametrize(("run", "name"), CASES_OF_TRAINERS)
def test_stock_trainer_trains_as_one_process_on_the_joint_batch(launched, ranks, whole, run, name):
    _, expected = whole(name)
    for _, facts in ranks(name):
        assert (facts["wrapper"], facts["processes"]) == ("FSDPPeerForCausalLM", run[0])
        assert facts["in_factors"] == expected["in_factors"]
        assert_same_training(facts, expected)
    saved, joint = (load_file(launched(*each) / name / "model.safetensors") for each in (run, (1, 1)))
    assert_same(saved, joint)


@each_run
@pytest.mark.parametrize("name", ["left", "rows"])
def test_stock_trainer_with_replicas_of_the_rest(ranks, whole, run, name):
    """Under DistributedDataParallel, that is."""
    expected_state, expected = whole(name)
    for state, facts in ranks(name, "ddp"):
        assert (facts["wrapper"], facts["processes"]) == ("DistributedDataParallel", run[0])
        assert facts["in_factors"] == expected["in_factors"]
        assert set(facts["layout"]) == {key for key in expected_state if "expert_pool" in key or "values" in key}
        assert_same_training(facts, expected)
        assert_same(state, expected_state)


@each_run
@pytest.mark.parametrize("name", ["accumulated", "rows", "rows-ddp"])
def test_replicas_of_columns_are_averaged_once_for_each_optimizer_step(ranks, whole, run, name):
    """Of two micro-batches each."""
    steps = len(whole(name.removesuffix("-ddp"))[1]["losses"]) if run == (4, 2) else 0  # there is one group otherwise
    assert all(facts["average_gradients"] == steps for _, facts in ranks(f"{name}-exchanges"))


@pytest.mark.parametrize("run", [(4, 2)])
def test_replicas_of_columns_exchange_factors_or_rows(ranks):
    """Whatever is fewer bytes."""
    few, many = (ranks(f"loop-{name}")[0][1]["exchanges"] for name in ("shared_pool", "many_experts"))
    assert few == {"average_gradients": 6, "_average_factors": 0, "_average_rows": 18}
    assert many == {"average_gradients": 6, "_average_factors": 18, "_average_rows": 0}


@each_run
def test_new_weights_do_not_depend_on_the_number_of_processes(ranks, whole, run):
    expected, _ = whole("new")
    table = expected["model.layers.0.mlp.expert_pool.up_proj.weight"]
    for actual, facts in ranks("new"):
        assert facts["training"]
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())
        # No process has memory for more of a table than its columns.
        assert facts["largest"] == table.numel() // run[1]


@each_run
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("configuration", "`num_experts_per_head` 2 and 3"),
        ("group", "`ep_size`"),
        ("tensor_parallel", "`tp_size`"),
        ("unknown", "ep_sizes"),
        ("parts", "`shard_experts`"),
        ("seed", "`torch.manual_seed`"),
        ("tables", "`num_experts` 16 and 25"),
        ("frozen", "frozen"),
        ("hooks", "hooks"),
    ],
)
def test_what_cannot_be_grouped_is_refused_by_all(ranks, name, message):
    assert all(message in messages[name] for _, messages in ranks("refusals"))


@each_run
def test_evaluation_and_generation_are_those_of_one_process(ranks, whole):
    for tensors, _ in ranks("outputs"):
        assert_same(tensors, whole("outputs")[0])


@each_run
def test_pools_run_where_a_rank_has_no_token(ranks, whole):
    of_all = [tensors for tensors, _ in ranks("pools")]
    assert len(of_all[-1]["peer.output"]) == 0
    for key, tensor in whole("pools")[0].items():
        parts = [tensors[key] for tensors in of_all]
        for found in [torch.cat(parts)] if key.startswith(("peer.", "pkm.")) else parts:
            assert_same({key: found}, {key: tensor})


@each_run
@pytest.mark.parametrize(("pools", "dtype"), [("pools", torch.float32), ("pools-bfloat16", torch.bfloat16)])
def test_bytes_that_are_received_are_those_of_the_formula(ranks, run, pools, dtype):
    for name, num_up_tables in (("peer", 2), ("pkm", 0)):
        expected = {"forward": Counter(), "backward": Counter()}
        for key, nbytes in memory_group_bytes(16, 5, run[1], dtype.itemsize, num_up_tables).items():
            direction, collective = COLLECTIVES[key]
            expected[direction][collective] += nbytes
        for _, facts in ranks(pools):
            for direction, counted in expected.items():
                # Of a group whose ranks have different numbers of tokens, each exchanges as many as any.
                found = {key: nbytes / facts["num_tokens"] for key, nbytes in facts[name][direction].items()}
                assert found == {key: nbytes for key, nbytes in counted.items() if nbytes}


@each_run
def test_hidden_states_are_exchanged_while_experts_are_retrieved(ranks):
    """Of a grown layer, for each of its two generations."""
    generation = ["hidden states start", "retrieval", "indices", "weighted activations", "outputs"]
    assert all(facts["events"] == 2 * generation for _, facts in ranks("order"))


@each_run
def test_gradients_in_bfloat16_are_those_of_one_process_within_its_rounding(ranks, whole):
    for actual, _ in ranks("bfloat16"):
        for key, tensor in whole("bfloat16")[0].items():
            error = (actual[key].double() - tensor.double()).norm() / tensor.double().norm()
            assert error < 4 * torch.finfo(torch.bfloat16).eps, (key, error)


@pytest.mark.parametrize("run", [(2, 2)])
def test_experts_ran_on_the_native_kernels(ranks):
    assert {tuple(call) for call in ranks("right")[0][1]["kernels"]} == TRAINING
