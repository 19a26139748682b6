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
"""
Two gloo processes on the CPU compute what one process computes: under DDP, FSDP2, tensor and pipeline parallelism.

The scripts in `tests/distributed/` run what is tested, in few launches, and hand over
tensors and facts; the tests here look at them.
"""

import math
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from kernels_used import INFERENCE, TRAINING
from launches import (
    LAUNCH_FILES,
    accelerate_launch,
    assert_same,
    assert_same_training,
    handed_over,
    launch,
    launch_ranks,
)
from safetensors.torch import load_file
from tiny_models import tiny_config
from transformers import PreTrainedModel, Trainer, TrainingArguments

from common.model_arguments import DistributedArguments
from common.training import OptimizerArguments, make_optimizers
from modeling_peer import PeerForCausalLM
from modeling_peer.library_releases import is_at_least


TRAINING_CASES = ["right", "left", "accumulated", "shared_pool", "checkpointed", "moe", "rows"]
MICRO_BATCHES = 8
MODELS = [
    "dense",
    "moe",
    "pkm",
    "peer",
    "rms_norm",
    "gated_experts",
    "shared_expert",
    "shared_pool",
    "tied_embeddings",
    "grown",
    "odd_width",
]
WITH_EXPERT_TABLES = [name for name in MODELS if name not in ("dense", "moe")]


def chunk_length(size: int, rank: int) -> int:
    """How much of a dimension of this size one of two processes holds: the first one more where it is odd."""
    return math.ceil(size / 2) if rank == 0 else size // 2


@pytest.fixture(scope="module")
def joint(tmp_path_factory) -> Path:
    """What one process makes of the joint batch."""
    folder = tmp_path_factory.mktemp("joint")
    launch_ranks(1, "train.py", folder)
    return folder


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    launch(accelerate_launch(), "train.py", folder)
    return folder


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory) -> Path:
    if not hasattr(PreTrainedModel, "is_distributed_loading_by_transformers"):
        pytest.skip("before 5.19 `Trainer` puts a model that Transformers has sharded into DDP as well")
    folder = tmp_path_factory.mktemp("fsdp")
    launch_ranks(2, "train.py", folder, "--fsdp")
    return folder


@pytest.fixture(scope="module")
def tensor_parallel(tmp_path_factory) -> Path:
    if not is_at_least("Transformers", "5.23"):
        pytest.skip("tensor parallelism of experts needs Transformers 5.23")
    folder = tmp_path_factory.mktemp("tensor_parallel")
    launch_ranks(2, "tensor_parallel.py", folder)
    return folder


@pytest.fixture(scope="module")
def pipeline_parallel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline_parallel")
    launch_ranks(2, "pipeline_parallel.py", folder)
    return folder


@pytest.mark.parametrize("name", TRAINING_CASES)
@pytest.mark.parametrize("rank", [0, 1])
def test_ddp_trains_as_one_process_on_the_joint_batch(joint, ddp, name, rank):
    expected_state, expected = handed_over(joint, f"{name}-0")
    state, facts = handed_over(ddp, f"{name}-{rank}")
    assert (facts["wrapper"], facts["processes"]) == ("DistributedDataParallel", 2)
    assert_same_training(facts, expected)
    assert_same(state, expected_state)


@pytest.mark.parametrize("rank", [0, 1])
def test_ddp_keeps_gradients_of_tables_in_factors(joint, ddp, rank):
    """Those of the two tables of the shared pool, at every step, with an optimizer that takes them only."""
    for name in ("rows", "accumulated"):
        steps = {folder: handed_over(folder, f"{name}-{rank if folder is ddp else 0}")[1] for folder in (joint, ddp)}
        for facts in steps.values():
            assert facts["in_factors"] == [2 if name == "rows" else 0] * len(facts["losses"])


@pytest.mark.parametrize("name", TRAINING_CASES)
def test_ddp_ranks_see_different_numbers_of_tokens(joint, ddp, name):
    """Or an average of each rank's moments would do."""
    first, second, both = (
        handed_over(folder, f"{name}-{rank}")[1]["tokens"] for folder, rank in ((ddp, 0), (ddp, 1), (joint, 0))
    )
    assert all(a != b and a + b == c for a, b, c in zip(first, second, both, strict=True))


@pytest.mark.parametrize("name", [name for name in TRAINING_CASES if name != "moe"])  # it has no query norm
def test_each_micro_batch_counts_once_in_the_statistics(joint, ddp, name):
    """Under activation checkpointing too, where a layer's forward runs twice."""
    for folder in (joint, ddp):
        state, _ = handed_over(folder, f"{name}-0")
        counts = [tensor.item() for key, tensor in state.items() if key.endswith("num_batches_tracked")]
        assert counts
        assert set(counts) == {MICRO_BATCHES}


def test_neither_padding_side_nor_checkpointing_changes_training(joint):
    plain_state, plain = handed_over(joint, "shared_pool-0")
    state, facts = handed_over(joint, "checkpointed-0")
    assert_same_training(facts, plain)
    assert_same(state, plain_state)


@pytest.mark.parametrize("name", ["bare", "bare-checkpointed"])
@pytest.mark.parametrize("rank", [0, 1])
def test_ddp_gradients_are_those_of_the_joint_batch(joint, ddp, name, rank):
    gradients, _ = handed_over(ddp, f"{name}-{rank}")
    expected, _ = handed_over(joint, "bare-0")
    assert_same(gradients, expected)


@pytest.mark.parametrize("name", TRAINING_CASES)
@pytest.mark.parametrize("rank", [0, 1])
def test_fsdp_shards_every_parameter(joint, fsdp, name, rank):
    _, facts = handed_over(fsdp, f"{name}-{rank}")
    whole = PeerForCausalLM.from_pretrained(joint / name)
    expected = {key: [chunk_length(len(p), rank), *p.shape[1:]] for key, p in whole.named_parameters()}
    assert facts["local_shapes"] == expected


# Under FSDP, `Trainer` makes its own optimizer.
@pytest.mark.parametrize("name", [name for name in TRAINING_CASES if name != "rows"])
def test_fsdp_trains_as_one_process_on_the_joint_batch(joint, fsdp, name):
    for rank in (0, 1):
        _, facts = handed_over(fsdp, f"{name}-{rank}")
        assert (facts["wrapper"], facts["processes"]) == ("FSDPPeerForCausalLM", 2)
        assert_same_training(facts, handed_over(joint, f"{name}-0")[1])
    assert_same(load_file(fsdp / name / "model.safetensors"), load_file(joint / name / "model.safetensors"))


@pytest.mark.parametrize("name", TRAINING_CASES)
def test_fsdp_checkpoint_reloads_in_one_process(fsdp, name):
    tensors, _ = handed_over(fsdp, f"{name}-0")
    logits = tensors.pop("logits")
    with torch.no_grad():
        reloaded = PeerForCausalLM.from_pretrained(fsdp / name)(**tensors).logits
    assert_same({"logits": reloaded}, {"logits": logits})


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
@pytest.mark.parametrize("rank", [0, 1])
def test_tensor_parallel_outputs_are_those_of_one_process(tensor_parallel, name, rank):
    expected, _ = handed_over(tensor_parallel, f"{name}-whole-0")
    actual, _ = handed_over(tensor_parallel, f"{name}-{rank}")
    for key in ("logits", "tokens", "padded_tokens", "loss"):
        assert_same({key: actual[key]}, {key: expected[key]})


@pytest.mark.parametrize("name", MODELS)
def test_tensor_parallel_gradients_are_those_of_one_process(tensor_parallel, name):
    expected, _ = handed_over(tensor_parallel, f"{name}-whole-0")
    (first, facts), (second, _) = (handed_over(tensor_parallel, f"{name}-{rank}") for rank in (0, 1))
    gradients = [key for key in expected if key.startswith("gradient.")]
    assert gradients
    for key in gradients:
        shards = [first[key], second[key]]
        sharded = facts.get(key.removeprefix("gradient."))
        if sharded:
            assert_same({key: joined(shards, sharded["dim"], sharded["blocks"])}, {key: expected[key]})
        else:
            for shard in shards:
                assert_same({key: shard}, {key: expected[key]})


def test_tensor_parallel_statistics_are_those_of_one_process(tensor_parallel):
    compared = 0
    for name in MODELS:
        expected, _ = handed_over(tensor_parallel, f"{name}-whole-0")
        for rank in (0, 1):
            actual, _ = handed_over(tensor_parallel, f"{name}-{rank}")
            for key in expected:
                if key.startswith("statistic."):
                    assert_same({key: actual[key]}, {key: expected[key]})
                    compared += 1
    assert compared


@pytest.mark.parametrize("name", WITH_EXPERT_TABLES)
@pytest.mark.parametrize("rank", [0, 1])
def test_tensor_parallel_shards_the_width_of_expert_tables(tensor_parallel, name, rank):
    _, facts = handed_over(tensor_parallel, f"{name}-{rank}")
    whole = PeerForCausalLM.from_pretrained(tensor_parallel / f"start-{rank}" / name)
    tables = {key: p.shape for key, p in whole.named_parameters() if "expert_pool" in key or "values" in key}
    assert tables
    for key, (num_experts, width) in tables.items():
        assert facts[key] == {"dim": 1, "blocks": 1, "shape": [num_experts, chunk_length(width, rank)]}


@pytest.mark.parametrize("second_moment", ["full", "row"])
@pytest.mark.parametrize("rank", [0, 1])
def test_tensor_parallel_training_by_rows_is_that_of_one_process(tensor_parallel, second_moment, rank):
    """Norms before clipping, which all ranks report alike, and the weights after some clipped steps."""
    expected, whole = handed_over(tensor_parallel, f"rows-{second_moment}-whole-0")
    actual, facts = handed_over(tensor_parallel, f"rows-{second_moment}-{rank}")
    assert whole["in_factors"] == facts["in_factors"] == 4  # gates, up and down projections of a pool, values
    torch.testing.assert_close(torch.tensor(facts["norms"]), torch.tensor(whole["norms"]), rtol=1e-5, atol=0)
    assert facts["norms"] == handed_over(tensor_parallel, f"rows-{second_moment}-{1 - rank}")[1]["norms"]
    assert_same(actual, expected)


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
    for rank in (0, 1):
        assert_same(handed_over(pipeline_parallel, f"{name}-{rank}")[0], expected)


@pytest.mark.parametrize("name", MODELS)
def test_pipeline_parallel_stages_hold_their_own_layers(pipeline_parallel, name):
    stages = [handed_over(pipeline_parallel, f"{name}-{rank}")[1] for rank in (0, 1)]
    layers = [{key.split(".")[2] for key in stage["parameters"] if "layers" in key} for stage in stages]
    assert all(layers)
    assert not layers[0] & layers[1]
    assert [stage["unloaded"] for stage in stages] == [[], []]
    if name == "shared_pool":
        # No stage owns the pool, each has a copy.
        assert all("model.expert_pool.up_proj.weight" in stage["parameters"] for stage in stages)


def launched_with(launch_file: str, monkeypatch) -> tuple:
    """Accelerate's arguments and environment for a launch file, of which the environment is set."""
    command = ["--config_file", str(LAUNCH_FILES / launch_file), "--main_process_port", "0", "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    environment = prepare_multi_gpu_env(arguments)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    return arguments, environment


@pytest.mark.parametrize("launch_file", ["ddp.yaml", "fsdp2.yaml"])
def test_accelerate_parses_launch_file(launch_file, monkeypatch):
    arguments, environment = launched_with(launch_file, monkeypatch)
    assert (arguments.num_processes, arguments.num_machines) == (8, 1)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert (arguments.multi_gpu, arguments.use_fsdp) == (launch_file == "ddp.yaml", launch_file == "fsdp2.yaml")


def test_fsdp2_launch_file_shards_by_decoder_layer(monkeypatch):
    launched_with("fsdp2.yaml", monkeypatch)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.transformer_cls_names_to_wrap == PeerForCausalLM._no_split_modules
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert not plugin.cpu_ram_efficient_loading


@pytest.fixture
def launched_by_fsdp2(monkeypatch, tmp_path):
    """Training arguments in the environment of that launch file, of a process that has a GPU as far as Accelerate knows."""
    launched_with("fsdp2.yaml", monkeypatch)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU
    yield arguments
    AcceleratorState._reset_state(reset_partial_state=True)


def test_fsdp2_launch_file_leaves_the_optimizer_to_the_trainer(launched_by_fsdp2):
    """The arguments of `Trainer` do not say that it is FSDP, and it refuses any other optimizer than its own."""
    model = PeerForCausalLM(tiny_config("peer", "dense"))
    optimizers = make_optimizers(OptimizerArguments(), launched_by_fsdp2, model, is_new=True)
    trainer = Trainer(model, launched_by_fsdp2, optimizers=optimizers)
    assert not launched_by_fsdp2.fsdp and trainer.is_fsdp_enabled and trainer.optimizer is None


def test_memory_groups_are_refused_beside_the_fsdp2_launch_file(launched_by_fsdp2):
    with pytest.raises(ValueError, match="--ep_size 2 applies FSDP2 itself: leave out --fsdp, .*memory_group.sh"):
        DistributedArguments(ep_size=2).make_config(launched_by_fsdp2, tiny_config("peer"))


@pytest.mark.parametrize("rank", [0, 1])
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
def test_experts_ran_on_the_native_kernels(request, run, name, expected, rank):
    _, facts = handed_over(request.getfixturevalue(run), f"{name}-{rank}")
    used = {tuple(call) for call in facts["kernels"]}
    assert used <= expected
    if run != "pipeline_parallel" or used:  # a stage may have no experts
        assert used == expected
