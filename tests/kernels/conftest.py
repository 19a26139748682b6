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
"""A cache of compiled kernels of a test's own, a number of threads, and tests in Triton's interpreter."""

import subprocess

import pytest
import torch
from triton_programs import watched_launches

from modeling_peer import native_library
from modeling_peer.native_library import load_library
from modeling_peer.triton_launch import INTERPRETED


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
    """An empty cache, and nothing loaded yet."""
    monkeypatch.setattr(native_library.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(native_library.tempfile, "tempdir", str(tmp_path))
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
def threads(request):
    """As many threads as its parameter says."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
