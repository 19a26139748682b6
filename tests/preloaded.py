# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Processes for a test that have imported the libraries before they start: they are forked from one that has done so, and
has run nothing. Importing takes seconds, of a test that may take less.
"""

import atexit
import contextlib
import faulthandler
import functools
import gc
import json
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

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


# What launchers start in place of `python`: it has a process run, and ends as that one does.
PROGRAM = """#!{executable} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"."], [1, 2])
    server.sendall(json.dumps([sys.argv, dict(os.environ), os.getcwd()]).encode() + b"\\n")
    code = int(server.recv(16))
if code < 0:
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@functools.cache
def _folder() -> Path:
    """One that goes with this process."""
    folder = tempfile.TemporaryDirectory(prefix="preloaded-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def context() -> Any:
    """
    What makes such processes. Theirs is the environment in which the first of them was started, except that they do not
    look for the Hub, and that `datasets` caches what it reads in a folder which goes with this process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(_folder() / "datasets")}):
        forkserver.ensure_running()
    return context


@functools.cache
def python() -> str:
    """
    The path of a program that does what `python [-u] FILE ARGUMENTS` and `python [-u] -m MODULE ARGUMENTS` do, in such a
    process: for launchers, which start others, and to which it is `sys.executable`. What libraries read from the
    environment as they are imported has no effect. It has no standard input.
    """
    program, address = _folder() / "python", str(_folder() / "socket")
    program.write_text(PROGRAM.format(executable=sys.executable, address=address))
    program.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        process = context().Process(target=_serve, args=(listener,))
        process.start()
    atexit.register(process.kill)
    return str(program)


def _serve(listener):
    """Forks a process for each call of the program, until the process that started this one ends."""
    parent = multiprocessing.parent_process().sentinel
    while parent not in wait([parent, listener]):
        caller, _ = listener.accept()
        multiprocessing.get_context("fork").Process(target=_answer, args=(caller,)).start()
        caller.close()


def _answer(caller):
    """Has a further process run what a call asks for, and kills it if the program that called is killed."""
    _, standard, _, _ = socket.recv_fds(caller, 1, 2)
    with caller.makefile("rb") as lines:
        (program, *arguments), environment, folder = json.loads(lines.readline())
    sys.executable = program
    arguments = arguments[arguments[0] == "-u" :]
    process = multiprocessing.get_context("fork").Process(target=_run, args=(arguments, environment, standard, folder))
    process.start()
    for descriptor in standard:
        os.close(descriptor)
    if process.sentinel not in wait([caller, process.sentinel]):
        process.kill()
    process.join()
    with contextlib.suppress(BrokenPipeError):
        caller.sendall(str(process.exitcode).encode())


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


def _run(arguments, environment, standard, folder):
    """`standard` is a file for output and errors, or a descriptor for each."""
    if isinstance(standard, Path):
        standard = 2 * [os.open(standard, os.O_WRONLY | os.O_CREAT | os.O_APPEND)]
    for number, descriptor in enumerate(standard, start=1):
        os.dup2(descriptor, number)
    gc.freeze()  # `Trainer` collects garbage, which takes long where all libraries are looked through
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
