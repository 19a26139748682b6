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
Processes for a test that have imported the libraries before they start: they are forked from one that has done so, and
has run nothing. Importing takes seconds, of a test that may take less.
"""

import faulthandler
import multiprocessing
import os
import runpy
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch


LIBRARIES = [
    "accelerate",
    "datasets",
    "peft",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "transformers.trainer",
    "modeling_peer",
]


def context() -> Any:
    """What makes such processes. Theirs is the environment in which the first of them was started."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(LIBRARIES)
    return forkserver


def start_python(
    arguments: list[str | Path], environment: dict[str, str], output: Path, folder: Path | None = None
) -> ForkServerProcess:
    """
    Starts what `python ARGUMENTS` would run.

    Args:
        arguments (`list`): `["-m", MODULE, ARGUMENT, ...]`, or `[FILE, ARGUMENT, ...]`.
        environment (`dict[str, str]`): That of the process. What libraries read as they are imported has no effect.
        output (`Path`): The file that gets what the process prints. It may be that of other processes too.
        folder (`Path`, *optional*): The working directory.
    """
    process = context().Process(target=_run, args=([*map(str, arguments)], environment, output, folder or Path.cwd()))
    process.start()
    return process


def _run(arguments, environment, output, folder):
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    faulthandler.enable()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    path = environment.get("PYTHONPATH", "").split(os.pathsep)
    if arguments[0] == "-m":
        sys.path[:0] = ["", *path]
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[:0] = [str(Path(arguments[0]).parent), *path]
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
