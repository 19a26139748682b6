# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the launch files of memory groups say is executed, on gloo processes of this machine: `examples/run_clm.py` trains
from scratch and from a checkpoint as one process does on the joint batch, with tables that are split.
"""

import functools
import os
import re
import subprocess

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from launches import LAUNCH_FILES, accelerate_launch, launch, of_ranks
from preloaded import python
from safetensors.torch import load_file
from tiny_models import tiny_config
from transformers import Trainer, TrainingArguments
from two_processes import free_port

from common.model_arguments import DistributedArguments
from common.training import OptimizerArguments, make_optimizers
from modeling_peer import PeerForCausalLM
from modeling_peer.parallel.releases import HAS_PARALLEL_STYLES


LAUNCHER = ["sh", str(LAUNCH_FILES / "memory_group.sh")]
SLURM = ["bash", str(LAUNCH_FILES / "memory_group.sbatch")]

HIDDEN_SIZE, ROWS_PER_STEP = 32, 4
SMALL = f"vocab_size=300,hidden_size={HIDDEN_SIZE},intermediate_size=48,num_experts=64,num_experts_per_head=4"
FLAGS = (
    *("--use_cpu", "--do_train", "--block_size", "32", "--max_steps", "4", "--logging_steps", "1"),
    *("--learning_rate", "1e-3", "--train_sampling_strategy", "sequential", "--report_to", "none"),
    *("--save_strategy", "no"),
)

# As the script of that name, which is not beside every Python.
TORCHRUN = """#!/bin/sh
exec {python} -m torch.distributed.run "$@"
"""
# Stands for Slurm's: two nodes, both of them this machine.
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
"$@" & first=$!
"$@" & second=$!
wait $first && wait $second
"""
SCONTROL = """#!/bin/sh
[ "$1 $2 $3" = "show hostnames localhost,elsewhere" ] && printf 'localhost\\nelsewhere\\n'
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not HAS_PARALLEL_STYLES:
        pytest.skip("memory groups need Transformers 5.24")
    folder = tmp_path_factory.mktemp("launches")
    (folder / "bin").mkdir()
    (folder / "numbers.txt").write_text("".join(f"{i} and {i + 1} are {2 * i + 1}\n" for i in range(400)))
    for name, text in (("torchrun", TORCHRUN.format(python=python())), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """A function that returns what each process hands over of a run of a name, which is made once, and what it prints."""
    scratch = ("--config_name", "peer-tiny", "--config_overrides", SMALL)
    checkpoint = ("--model_name_or_path", folder / "joint" / "model")
    two_nodes = {"SLURM_JOB_NODELIST": "localhost,elsewhere", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "2"}
    saves = ("--save_strategy", "steps", "--save_steps", "2")
    # The command, the number of processes, flags, and variables of the environment.
    runs = {
        "joint": ([python()], 1, scratch, {}),
        "continued": ([python()], 1, checkpoint, {}),
        "torchrun": (LAUNCHER, 2, (*scratch, *saves), {"GPUS_PER_NODE": "2"}),
        "accelerate": (accelerate_launch(), 2, (*scratch, "--ep_size", "2"), {}),
        "slurm": (SLURM, 4, checkpoint, {"SLURM_JOB_ID": str(free_port()), **two_nodes}),
    }

    @functools.cache
    def run_clm(name):
        command, num_processes, flags, variables = runs[name]
        batch = ("--per_device_train_batch_size", str(ROWS_PER_STEP // num_processes))
        data = ("--train_file", folder / "numbers.txt", "--output_dir", folder / name / "model")
        variables = {"PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]]), **variables}
        resumes = ["--resumes"] if name == "torchrun" else []  # it is run twice more
        arguments = [folder / name, *resumes, *FLAGS, *flags, *batch, *data]
        output = launch(command, "watched_run_clm.py", *arguments, environment=variables)
        return of_ranks(folder / name, "run", num_processes), output

    run_clm("joint")  # whose checkpoint others start from
    return run_clm


RUNS = {"torchrun": "joint", "accelerate": "joint", "slurm": "continued"}


@pytest.mark.parametrize(("name", "expected"), RUNS.items())
def test_training_is_that_of_one_process_on_the_joint_batch(run, folder, name, expected):
    """From the same weights at the start, drawn or of a checkpoint; and the model is saved whole."""
    ((state, steps),), _ = run(expected)
    ranks, _ = run(name)
    starts = [key for key in state if key.startswith("start.")]
    assert len(steps["losses"]) == 4 and any("expert_pool" in key for key in starts)
    for tensors, facts in ranks:
        for log in ("losses", "gradient_norms"):
            torch.testing.assert_close(torch.tensor(facts[log]), torch.tensor(steps[log]), rtol=1e-3, atol=0)
        assert tensors.keys() == state.keys()
        assert all(torch.equal(tensors[key], state[key]) for key in starts)
    saved = load_file(folder / name / "model" / "model.safetensors")
    assert all(torch.equal(ranks[0][0][key], tensor) for key, tensor in saved.items())


@pytest.mark.parametrize("name", RUNS)
def test_tables_are_split(run, name):
    ranks, output = run(name)
    for _, facts in ranks:
        assert facts["processes"] == len(ranks)
        for key, (num_rows, *width) in facts["shapes"].items():
            mesh, held = facts["layout"][key]
            if "expert_pool" in key:
                assert (mesh, held) == (["ep"], [num_rows, HIDDEN_SIZE // 2])
            else:
                assert mesh == ["fsdp"] and held[1:] == width and held[0] <= -(-num_rows // len(ranks))
    number = r"([\d,]+)"
    said, *_ = re.findall(rf"A model of {number} parameters, {number} of them in this process", output)
    whole, held = (int(each.replace(",", "")) for each in said)
    assert whole / len(ranks) <= held < 0.6 * whole


def test_the_same_command_resumes_and_ends(run, folder):
    """Without its last checkpoint it trains the last two steps again, to the bit; with it, there is nothing to do."""
    ranks, printed = run("torchrun")
    model = folder / "torchrun" / "model"
    assert f"Resuming training from {model}/checkpoint-2" in printed
    assert f"{model}/checkpoint-4 is the end of this training" in printed
    resumed, finished = (of_ranks(folder / "torchrun", name) for name in ("resumed", "finished"))
    for (expected, steps), (again, facts), (end, _) in zip(ranks, resumed, finished, strict=True):
        assert facts["losses"] == steps["losses"]
        assert facts["gradient_norms"] == steps["gradient_norms"]
        for key, tensor in expected.items():
            assert torch.equal(again[key], tensor) and torch.equal(end[key], tensor), key
    assert (model / "checkpoint-4" / "training_state" / ".metadata").exists()


def test_a_memory_group_is_within_a_node_by_default(run):
    ranks, _ = run("slurm")
    nodes = [facts["node"] for _, facts in ranks]
    assert sorted(nodes) == [0, 0, 1, 1]
    for rank, (_, facts) in enumerate(ranks):
        assert rank in facts["group"]
        assert len(facts["group"]) == 2
        assert {nodes[member] for member in facts["group"]} == {facts["node"]}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"GROUP_SIZE": "3"}, "GROUP_SIZE=3 does not divide NNODES * GPUS_PER_NODE = 8"),
        ({"GPUS_PER_NODE": "2", "GROUP_SIZE": "4"}, "GROUP_SIZE=4 does not divide NNODES * GPUS_PER_NODE = 2"),
        ({"NNODES": "2"}, "NNODES=2 needs RDZV_ENDPOINT"),
    ],
)
def test_what_cannot_be_launched_is_refused(variables, message):
    done = subprocess.run([*LAUNCHER, "script.py"], env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr


def arguments_of_torchrun(tmp_path, **variables):
    """The arguments that the launch file gives to torchrun."""
    (tmp_path / "torchrun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"} | variables
    command = [*LAUNCHER, "script.py", "--do_train"]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()


def test_a_node_of_eight_is_one_group_and_variables_reach_torchrun(tmp_path):
    words = arguments_of_torchrun(tmp_path)
    assert words[:4] == ["--nnodes", "1", "--nproc_per_node", "8"]
    assert words[-4:] == ["script.py", "--do_train", "--ep_size", "8"]
    variables = {"NNODES": "3", "GPUS_PER_NODE": "4", "GROUP_SIZE": "2", "RDZV_ENDPOINT": "node:1234", "RDZV_ID": "7"}
    assert arguments_of_torchrun(tmp_path, **variables) == [
        *("--nnodes", "3", "--nproc_per_node", "4", "--rdzv_backend", "c10d", "--rdzv_endpoint", "node:1234"),
        *("--rdzv_id", "7", "script.py", "--do_train", "--ep_size", "2"),
    ]


def test_a_memory_group_may_have_the_processes_of_several_nodes(tmp_path):
    words = arguments_of_torchrun(tmp_path, NNODES="8", GROUP_SIZE="32", RDZV_ENDPOINT="node:1234")
    assert words[:4] == ["--nnodes", "8", "--nproc_per_node", "8"]
    assert words[-2:] == ["--ep_size", "32"]


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
    """FSDP2 shards by decoder layer."""
    arguments, environment = launched_with(launch_file, monkeypatch)
    assert (arguments.num_processes, arguments.num_machines) == (8, 1)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert (arguments.multi_gpu, arguments.use_fsdp) == (launch_file == "ddp.yaml", launch_file == "fsdp2.yaml")
    if arguments.use_fsdp:
        plugin = FullyShardedDataParallelPlugin()
        assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
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
    with pytest.raises(ValueError, match="--ep_size"):
        DistributedArguments(ep_size=2).make_config(launched_by_fsdp2, tiny_config("peer"))
