# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""How the distributed tests launch the scripts beside them, and what they compare of what these hand over."""

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from preloaded import python, start_python
from safetensors.torch import load_file
from two_processes import free_port


ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent
LAUNCH_FILES = ROOT / "configuration" / "launch"
TIMEOUT = 150


def torchrun(num_processes: int) -> list[str]:
    """
    A command that launches a script in this many processes of this machine. They are not forked, and so reported in the
    order in which they end, to the millisecond.
    """
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]


def accelerate_launch() -> list[str]:
    """A command that launches a script in two processes of this machine, by the launch file for DDP."""
    launcher = [python(), "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH_FILES / "ddp.yaml")]
    return [*launcher, "--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no"]


def _environment(changes):
    folders = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(folders),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "PYTHONFAULTHANDLER": "1",
        **changes,
    }


def run(
    command: list[str], script: str, *arguments: str | Path, environment: dict[str, str] | None = None
) -> tuple[int, str]:
    """
    Runs a script of `tests/distributed/` with one thread a process and no GPU; its exit code and what it prints. Fails
    if it takes too long.
    """
    process = subprocess.Popen(
        [*command, SCRIPTS / script, *arguments],
        env=_environment(environment or {}),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        # The launcher's children are of its session, and would outlive it.
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{script} took longer than {TIMEOUT} s:\n{output[-10000:]}")
    return process.returncode, output


def launch(command: list[str], script: str, *arguments: str | Path, environment: dict[str, str] | None = None) -> str:
    """Runs a script as [`run`] does, and fails with its output, which it returns, if the script does."""
    code, output = run(command, script, *arguments, environment=environment)
    assert code == 0, f"{script} failed:\n{output[-10000:]}"
    return output


def launch_ranks(num_processes: int, script: str, folder: Path, *arguments: str) -> None:
    """
    Runs a script of `tests/distributed/` in this many processes, as torchrun does, in ones that need not import the
    libraries. Fails with what they print if one of them fails or takes too long, or if it leaves others waiting.
    `folder`, for results, is the first argument of the script.
    """
    ranks = {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes, "MASTER_PORT": free_port()}
    output, processes = folder / f"{script}-{num_processes}.log", []
    for rank in range(num_processes):
        own = ranks | {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        environment = _environment({name: str(value) for name, value in own.items()} if num_processes > 1 else {})
        processes.append(start_python([SCRIPTS / script, folder, *arguments], environment, output))
    deadline = time.monotonic() + TIMEOUT
    while any(each.exitcode is None for each in processes) and time.monotonic() < deadline:
        wait([each.sentinel for each in processes if each.exitcode is None], deadline - time.monotonic())
        if any(each.exitcode for each in processes):
            break
    codes = [each.exitcode for each in processes]
    for each in processes:
        each.kill()
        each.join()
    assert codes == [0] * num_processes, f"{script} ended with {codes}:\n{output.read_text()[-10000:]}"


def handed_over(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict]:
    return load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.json").read_text())


def of_ranks(folder: Path, name: str, number: int = 2) -> list[tuple[dict[str, torch.Tensor], dict]]:
    """What each of a number of processes handed over."""
    return [handed_over(folder, f"{name}-{rank}") for rank in range(number)]


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal to float32 accuracy, on the scale of each tensor."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        atol = 2e-5 * tensor.abs().max().item() if tensor.is_floating_point() else 0
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def assert_same_training(actual: dict, expected: dict, logs: tuple[str, ...] = ("losses", "gradient_norms")) -> None:
    for log in logs:
        torch.testing.assert_close(torch.tensor(actual[log]), torch.tensor(expected[log]), rtol=1e-5, atol=0)
