# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A cache of compiled kernels of a test's own, a number of threads, and tests in Triton's interpreter."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from triton_programs import watched_launches

from modeling_peer.ops import native
from modeling_peer.ops.kernels_cpu import CpuKernels
from modeling_peer.ops.native import load_library
from modeling_peer.ops.triton_launch import INTERPRETED


def pytest_configure(config):
    config.addinivalue_line("markers", "interpreted: runs in the process of test_triton_interpreter.py alone")


def pytest_collection_modifyitems(config, items):
    """Kernels in Triton are interpreted or not from the import of Triton on, and so is a whole process."""
    chosen, others = [], []
    for item in items:
        (chosen if bool(item.get_closest_marker("interpreted")) == INTERPRETED else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


@pytest.fixture(autouse=True)
def _watched(request):
    """In the interpreter programs run shuffled, keep to their tensors, and do not race."""
    if not INTERPRETED:
        yield
        return
    with watched_launches(seed=0):
        yield


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache in a folder that others may reach, and nothing loaded yet."""
    lstat = Path.lstat

    def reached(self):
        status = lstat(self)
        return os.stat_result((status.st_mode | 0o055, *status[1:])) if self in tmp_path.parents else status

    monkeypatch.setattr(Path, "lstat", reached)
    tmp_path.chmod(0o755)
    monkeypatch.setattr(native.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    load_library.cache_clear()
    yield tmp_path / "home" / "modeling_peer"
    load_library.cache_clear()


@pytest.fixture
def compilations(monkeypatch):
    """The commands that ran a compiler."""
    commands, run = [], subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **kwargs: commands.append(command) or run(command, **kwargs)
    )
    return commands


@pytest.fixture
def groupings(monkeypatch):
    """The numbers of assignments that were grouped in C."""
    found, group = [], CpuKernels.group
    monkeypatch.setattr(CpuKernels, "group", lambda *args: found.append(len(args[0])) or group(*args))
    return found


@pytest.fixture
def threads(request):
    """As many threads as its parameter says."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
