# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Two gloo processes on the CPU compute what one process computes: under DDP, FSDP2, tensor and pipeline parallelism.

The scripts in `tests/distributed/` run what is tested, in few launches, and hand over
tensors and facts; the tests here look at them.
"""

import math
from pathlib import Path

import pytest
import torch
from cases import MODELS
from kernels_used import INFERENCE, TRAINING
from launches import accelerate_launch, assert_same, assert_same_training, handed_over, launch, launch_ranks, of_ranks
from safetensors.torch import load_file
from train import CASES

from modeling_peer import PeerForCausalLM
from modeling_peer.parallel.releases import HAS_PARALLEL_STYLES


WITH_EXPERT_TABLES = [name for name in MODELS if name not in ("dense", "moe")]


def chunk_length(size: int, rank: int) -> int:
    """How much of a dimension of this size one of two processes holds: the first one more where it is odd."""
    return math.ceil(size / 2) if rank == 0 else size // 2


def fixture_of(name, start):
    """A fixture of a name: the folder in which a launch has left its results."""

    @pytest.fixture(scope="module", name=name)
    def launched(tmp_path_factory) -> Path:
        if name == "tensor_parallel" and not HAS_PARALLEL_STYLES:
            pytest.skip("tensor parallelism of experts needs Transformers 5.24")
        folder = tmp_path_factory.mktemp(name)
        start(folder)
        return folder

    return launched


joint = fixture_of("joint", lambda folder: launch_ranks(1, "train.py", folder))  # on the joint batch
ddp = fixture_of("ddp", lambda folder: launch(accelerate_launch(), "train.py", folder))
fsdp = fixture_of("fsdp", lambda folder: launch_ranks(2, "train.py", folder, "--fsdp"))
tensor_parallel = fixture_of("tensor_parallel", lambda folder: launch_ranks(2, "model_parallel.py", folder, "tensor"))
pipeline_parallel = fixture_of(
    "pipeline_parallel", lambda folder: launch_ranks(2, "model_parallel.py", folder, "pipeline")
)


@pytest.mark.parametrize("name", CASES)
def test_ddp_trains_as_one_process_on_the_joint_batch(joint, ddp, name):
    """With gradients of tables in factors for an optimizer that takes them."""
    expected_state, expected = handed_over(joint, f"{name}-0")
    for state, facts in of_ranks(ddp, name):
        assert (facts["wrapper"], facts["processes"]) == ("DistributedDataParallel", 2)
        assert facts["in_factors"] == [2 if name == "rows" else 0] * len(facts["losses"])
        assert_same_training(facts, expected)
        assert_same(state, expected_state)


# Under FSDP, `Trainer` makes its own optimizer.
@pytest.mark.parametrize("name", [name for name in CASES if name != "rows"])
def test_fsdp_trains_as_one_process_on_the_joint_batch(joint, fsdp, name):
    whole = PeerForCausalLM.from_pretrained(joint / name)
    for rank, (_, facts) in enumerate(of_ranks(fsdp, name)):
        shapes = {key: [chunk_length(len(p), rank), *p.shape[1:]] for key, p in whole.named_parameters()}
        assert (facts["wrapper"], facts["processes"]) == ("FSDPPeerForCausalLM", 2)
        assert {key: shape for key, (_, shape) in facts["layout"].items()} == shapes
        # Earlier releases log the norm of what each process holds.
        logs = ("losses", "gradient_norms") if HAS_PARALLEL_STYLES else ("losses",)
        assert_same_training(facts, handed_over(joint, f"{name}-0")[1], logs)
    assert_same(load_file(fsdp / name / "model.safetensors"), load_file(joint / name / "model.safetensors"))


def test_fsdp_checkpoint_carries_its_code(joint, fsdp):
    """The same files and the same configuration as from one process, so that it loads without this package too."""
    sharded, whole = fsdp / "shared_pool", joint / "shared_pool"
    assert {path.name for path in sharded.iterdir()} == {path.name for path in whole.iterdir()}
    assert (sharded / "config.json").read_text() == (whole / "config.json").read_text()


def joined(shards: list[torch.Tensor], dim: int, blocks: int) -> torch.Tensor:
    """The whole of which each process holds a slice, or a slice of each of several packed blocks."""
    parts = [shard.chunk(blocks, dim) for shard in shards]
    return torch.cat([part[block] for block in range(blocks) for part in parts], dim)


@pytest.mark.parametrize("name", MODELS)
def test_tensor_parallelism_computes_what_one_process_does(tensor_parallel, name):
    """Logits, tokens and loss; gradients, or this process's slices of them; and statistics of the query norm."""
    expected, _ = handed_over(tensor_parallel, f"{name}-whole-0")
    (first, layout), (second, _) = of_ranks(tensor_parallel, name)
    for key, tensor in expected.items():
        parts = [first[key], second[key]]
        sharded = layout.get(key.removeprefix("gradient.")) if key.startswith("gradient.") else None
        for found in [joined(parts, sharded["dim"], sharded["blocks"])] if sharded else parts:
            assert_same({key: found}, {key: tensor})


@pytest.mark.parametrize("name", WITH_EXPERT_TABLES)
def test_tensor_parallelism_splits_the_width_of_expert_tables(tensor_parallel, name):
    whole = load_file(tensor_parallel / "start-0" / name / "model.safetensors")
    tables = {key: table.shape for key, table in whole.items() if "expert_pool" in key or "values" in key}
    assert tables
    for rank, (_, facts) in enumerate(of_ranks(tensor_parallel, name)):
        for key, (num_experts, width) in tables.items():
            assert facts[key] == {"dim": 1, "blocks": 1, "shape": [num_experts, chunk_length(width, rank)]}


@pytest.mark.parametrize("second_moment", ["full", "row"])
def test_tensor_parallel_training_by_rows_is_that_of_one_process(tensor_parallel, second_moment):
    """Norms before clipping, which all ranks report alike, and the weights after some clipped steps."""
    expected, whole = handed_over(tensor_parallel, f"rows-{second_moment}-whole-0")
    norms = []
    for actual, facts in of_ranks(tensor_parallel, f"rows-{second_moment}"):
        assert whole["in_factors"] == facts["in_factors"] == 4  # gates, up and down projections of a pool, values
        torch.testing.assert_close(torch.tensor(facts["norms"]), torch.tensor(whole["norms"]), rtol=1e-5, atol=0)
        assert_same(actual, expected)
        norms.append(facts["norms"])
    assert norms[0] == norms[1]


@pytest.mark.parametrize("name", MODELS)
def test_tensor_parallel_checkpoint_is_whole(tensor_parallel, name):
    """What a split model saves after a backward is what was loaded, but for the statistics that it gathered."""
    saved, start = (
        load_file(tensor_parallel / folder / name / "model.safetensors") for folder in ("saved", "start-0")
    )
    # Of tied weights Transformers gathers and saves both.
    assert saved.keys() - start.keys() == ({"lm_head.weight"} if name == "tied_embeddings" else set())
    for key, tensor in start.items():
        if "query_norm" not in key:
            assert torch.equal(saved[key], tensor), key


@pytest.mark.parametrize("name", MODELS)
def test_pipeline_parallel_outputs_are_those_of_one_process(pipeline_parallel, name):
    expected, _ = handed_over(pipeline_parallel, f"{name}-whole-0")
    for tensors, _ in of_ranks(pipeline_parallel, name):
        assert_same(tensors, expected)


@pytest.mark.parametrize("name", MODELS)
def test_pipeline_parallel_stages_hold_their_own_layers(pipeline_parallel, name):
    stages = [stage for _, stage in of_ranks(pipeline_parallel, name)]
    layers = [{key.split(".")[2] for key in stage["parameters"] if "layers" in key} for stage in stages]
    assert all(layers)
    assert not layers[0] & layers[1]
    assert [stage["unloaded"] for stage in stages] == [[], []]
    if name == "shared_pool":
        # No stage owns the pool, each has a copy.
        assert all("model.expert_pool.up_proj.weight" in stage["parameters"] for stage in stages)


@pytest.mark.parametrize(
    "run, name, expected",
    [
        ("ddp", "right", TRAINING),
        ("ddp", "checkpointed", TRAINING),
        ("fsdp", "right", TRAINING),
        ("tensor_parallel", "peer", TRAINING),
        ("tensor_parallel", "odd_width", TRAINING),
        ("pipeline_parallel", "peer", INFERENCE),
    ],
)
def test_experts_ran_on_the_native_kernels(request, run, name, expected):
    ranks = of_ranks(request.getfixturevalue(run), name)
    used = [{tuple(call) for call in facts["kernels"]} for _, facts in ranks]
    assert any(used)
    # A stage of a pipeline may have no experts.
    assert [each for each in used if each or run != "pipeline_parallel"] == [expected] * sum(map(bool, used))
