# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""For tests on two processes of this machine: what they find is left in a folder."""

import contextlib
import os
import random
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from preloaded import context


# Below those that Linux hands out itself, one of which another connection can take before rank 0 listens on it.
PORTS = range(20000, 30000)


def free_port() -> int:
    """A port that nobody listens on, for rank 0. A seed that a test sets has no part in the choice."""
    for port in random.SystemRandom().sample(PORTS, k=100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port
    raise OSError("no port is free")


def run_on_two_processes(work: Callable[..., None], *arguments: Any) -> None:
    """Runs `work(rank, *arguments)` as ranks 0 and 1 and asserts that both came to their end."""
    processes = [context().Process(target=work, args=(rank, *arguments)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)  # models are compiled in some
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]


def save_parts(rank: int, folder: str, parts: tuple[Callable[[int], Any], ...]) -> None:
    """The work of one of two ranks in a group of gloo: what each of `parts` returns goes to `folder/{its name}-{rank}`."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for part in parts:
        torch.save(part(rank), f"{folder}/{part.__name__}-{rank}")
    leave_together()


def leave_together() -> None:
    """The end of a rank's work: gloo may hang at exit."""
    dist.barrier()
    os._exit(0)
