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
"""Kernels compiled on the user's machine: when, where to, on which threads, and what happens where they cannot be."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_peer import native_library
from modeling_peer.expert_kernels import ALL_EXPERT_KERNELS, resolve_kernels
from modeling_peer.native_library import load_library


ROOT = Path(__file__).parents[2]
SOURCE = "int answer(void) { return 42; }"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and nothing loaded yet."""
    monkeypatch.setattr(native_library.constants, "HF_HOME", str(tmp_path))
    load_library.cache_clear()
    yield tmp_path / "modeling_peer"
    load_library.cache_clear()


@pytest.fixture
def compilations(monkeypatch):
    """The commands that ran a compiler."""
    commands, run = [], subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **kwargs: commands.append(command) or run(command, **kwargs)
    )
    return commands


def libraries(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".so")


def compiled(commands):
    return sum("-c" in command for command in commands)


def run(script, cache, **environment):
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return process


def finished(process):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    return output


class TestCache:
    def test_compiled_once(self, cache, compilations):
        for _ in range(2):
            assert load_library(SOURCE).answer() == 42
            load_library.cache_clear()  # as in another process
        assert compiled(compilations) == 1
        assert len(libraries(cache)) == 1
        leftovers = {path.suffix for path in cache.iterdir()} - {".so", ".lock"}
        assert not leftovers

    def test_by_source_compiler_flags_and_processor(self, cache, monkeypatch):
        load_library(SOURCE)
        load_library(SOURCE + "\n")
        assert len(libraries(cache)) == 2
        for name, value in (
            ("COMPILER_FLAGS", (*native_library.COMPILER_FLAGS, "-g")),
            ("_processor", lambda: "another processor"),
            ("_compiler", lambda: ["gcc", "-DOTHER"]),
        ):
            before = len(libraries(cache))
            load_library.cache_clear()
            with monkeypatch.context() as patch:
                patch.setattr(native_library, name, value)
                load_library(SOURCE)
            assert len(libraries(cache)) == before + 1, name

    def test_processes_that_start_together_share_one(self, cache, tmp_path):
        script = """
import modeling_peer.native_library as library
from modeling_peer.expert_kernels_cpu import SOURCE
assert library.load_library(SOURCE) is not None
"""
        for process in [run(script, tmp_path) for _ in range(3)]:
            finished(process)
        assert len(libraries(cache)) == 1

    def test_a_failure_leaves_nothing(self, cache, caplog):
        assert load_library("this is not C") is None
        assert not libraries(cache)
        assert {path.suffix for path in cache.iterdir()} <= {".lock"}

    def test_what_is_in_a_cache_that_cannot_be_written_is_used(self, cache, compilations, monkeypatch):
        load_library(SOURCE)
        load_library.cache_clear()
        monkeypatch.setattr(os, "access", lambda *args: False)
        assert load_library(SOURCE).answer() == 42
        assert compiled(compilations) == 1

    def test_a_folder_that_others_can_write_is_not_trusted(self, tmp_path, monkeypatch):
        (tmp_path / f"modeling_peer-{os.getuid()}").mkdir(mode=0o777)
        (tmp_path / f"modeling_peer-{os.getuid()}").chmod(0o777)
        monkeypatch.setattr(native_library.tempfile, "gettempdir", lambda: str(tmp_path))
        monkeypatch.setattr(os, "access", lambda *args: False)
        with pytest.raises(OSError, match="not this user's alone"):
            native_library._writable(tmp_path / "cache")

    def test_a_cache_that_cannot_be_written(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setattr(native_library.constants, "HF_HOME", str(tmp_path / "file"))
        load_library.cache_clear()
        assert load_library(SOURCE).answer() == 42
        load_library.cache_clear()


class TestWithoutACompiler:
    @pytest.fixture(autouse=True)
    def no_compiler(self, cache, monkeypatch):
        monkeypatch.setenv("CC", "there-is-no-such-compiler")

    def test_auto_is_torch_with_one_notice(self, monkeypatch):
        notices = []
        monkeypatch.setattr(native_library.logger, "warning", notices.append)
        table = torch.empty(1, 1)
        assert resolve_kernels("auto", table) == resolve_kernels("auto", table) == "torch"
        (notice,) = notices
        assert "there-is-no-such-compiler" in notice
        assert "Install gcc" in notice
        assert "\n" not in notice

    def test_by_name_it_is_refused(self):
        with pytest.raises(RuntimeError, match="no C compiler"):
            resolve_kernels("cpu", torch.empty(1, 1))


class TestThreads:
    def test_on_torchs_own_openmp(self, tmp_path):
        """A second runtime would bring threads of its own. That of the compiler is on this machine, or none is."""
        script = """
import torch
from pathlib import Path
from modeling_peer.expert_kernels import ALL_EXPERT_KERNELS
def runtimes():
    return {l.split()[-1] for l in Path("/proc/self/maps").read_text().splitlines() if "omp" in l.split()[-1].split("/")[-1]}
torch.set_num_threads(2)
torch.randn(1000, 1000).exp().sum()
before = runtimes()
ALL_EXPERT_KERNELS["cpu"].up(torch.randn(300, 64), torch.zeros(300, 8, dtype=torch.int64), torch.randn(5, 64))
print("added", sorted(runtimes() - before), "threads", len(list(Path("/proc/self/task").iterdir())))
"""
        assert "added []" in finished(run(script, tmp_path))
        # Nor would one come where torch brings a runtime under a name of its own.
        for library in (tmp_path / "modeling_peer").glob("*.so"):
            assert b"libgomp.so" not in library.read_bytes()
            assert b"libomp.so" not in library.read_bytes()

    def test_as_many_as_torch_has(self, monkeypatch):
        asked = []
        monkeypatch.setattr(ctypes, "c_int", lambda value: asked.append(value) or 1)
        before = torch.get_num_threads()
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                ALL_EXPERT_KERNELS["cpu"].up(
                    torch.randn(3, 8), torch.zeros(3, 2, dtype=torch.int64), torch.randn(5, 8)
                )
        finally:
            torch.set_num_threads(before)
        assert asked == [1, 2]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")
    def test_a_fork_after_use(self, tmp_path):
        """The child has none of the parent's threads, and would wait for them for ever."""
        script = """
import os, torch
from modeling_peer.expert_kernels import ALL_EXPERT_KERNELS
torch.set_num_threads(2)
native, literal = ALL_EXPERT_KERNELS["cpu"], ALL_EXPERT_KERNELS["eager"]
generator = torch.Generator().manual_seed(0)
x, table = torch.randn(300, 64, generator=generator), torch.randn(500, 64, generator=generator)
indices = torch.randint(500, (300, 8), generator=generator)
expected = literal.up(x, indices, table)
queries, keys = torch.randn(300, 2, 2, 8, generator=generator), torch.randn(1, 2, 30, 8, generator=generator)
found = native.retrieve(queries, keys, 4)[0]
def right():
    rows, _ = native.row_gradient(expected, x, indices, torch.float32)
    return torch.allclose(native.up(x, indices, table), expected, atol=1e-4) and len(rows) == len(indices.unique()) and (
        torch.equal(native.retrieve(queries, keys, 4)[0], found))
assert right()
child = os.fork()
if child == 0:
    os._exit(0 if right() else 1)
assert os.waitpid(child, 0)[1] == 0
assert right()  # and the parent goes on
"""
        finished(run(script, tmp_path, OMP_NUM_THREADS="2"))
