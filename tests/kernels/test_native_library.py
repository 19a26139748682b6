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
"""Kernels compiled on the user's machine: when, and what happens where they cannot or must not be; their threads."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cache import SOURCE
from slow_tests import slow
from tiny_models import random_tokens, tiny_config, tiny_model

from modeling_peer import native_library
from modeling_peer.expert_kernels import ALL_EXPERT_KERNELS, resolve_kernels
from modeling_peer.native_library import COMPILE_VARIABLE, load_library


ROOT = Path(__file__).parents[2]


def run(script, cache, **environment):
    process = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stdout[-3000:]
    return process.stdout


@pytest.fixture
def notices(monkeypatch):
    notices = []
    monkeypatch.setattr(native_library.logger, "warning", notices.append)
    return notices


class TestWithoutACompiler:
    @pytest.fixture(autouse=True)
    def no_compiler(self, cache, monkeypatch):
        monkeypatch.setenv("CC", "there-is-no-such-compiler")

    def test_auto_is_torch_with_one_notice(self, notices):
        table = torch.empty(1, 1)
        assert resolve_kernels("auto", table) == resolve_kernels("auto", table) == "torch"
        (notice,) = notices
        assert "there-is-no-such-compiler" in notice
        assert "Install gcc" in notice
        assert "\n" not in notice

    def test_by_name_it_is_refused(self):
        with pytest.raises(RuntimeError, match="no C compiler"):
            resolve_kernels("cpu", torch.empty(1, 1))

    @pytest.mark.parametrize("command", ["gcc 'unbalanced", "gcc\\"])
    def test_a_command_that_cannot_be_parsed(self, command, notices, monkeypatch):
        monkeypatch.setenv("CC", command)
        assert load_library(SOURCE) is None
        (notice,) = notices
        assert f"CC={command!r} is no command" in notice


class TestWithACompilerThatFails:
    """It would fail in every folder; one that is full is another's fault."""

    @pytest.fixture
    def compilations(self, cache, tmp_path, monkeypatch):
        """Where it was run, one line each; it fails with the message that the environment holds."""
        log, compiler = tmp_path / "log", tmp_path / "failing-compiler"
        compiler.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && exit\necho $LC_ALL "$@" >> {log}\necho "$MESSAGE" >&2\nexit 1\n'
        )
        compiler.chmod(0o755)
        monkeypatch.setenv("CC", str(compiler))
        return log

    @pytest.mark.parametrize(
        ("message", "times"),
        [("error: no OpenMP", 1), ("error: No space left on device", 2), ("error: Disk quota exceeded", 2)],
    )
    def test_it_runs_again_only_where_the_folder_was_to_blame(
        self, message, times, compilations, notices, monkeypatch
    ):
        monkeypatch.setenv("MESSAGE", message)
        assert load_library(SOURCE) is None
        runs = compilations.read_text().splitlines()
        assert len(runs) == times
        assert all(run.startswith("C ") for run in runs)
        *announced, failed = notices
        assert len(announced) == times and all("compiles C kernels" in notice for notice in announced)
        assert message in failed


class TestSwitchedOff:
    """Code that a checkpoint brings along compiles nothing where its user does not want it."""

    @staticmethod
    def train(model):
        tokens = random_tokens(2, 5)
        model.train()(tokens, labels=tokens).loss.backward()
        with torch.no_grad():
            model.eval()(tokens)

    @pytest.mark.parametrize("value", ["0", "false", "off", "No"])
    def test_by_the_environment(self, value, cache, compilations, notices, monkeypatch):
        monkeypatch.setenv(COMPILE_VARIABLE, value)
        assert resolve_kernels("auto", torch.empty(1, 1)) == "torch"
        with pytest.raises(RuntimeError, match=f"{COMPILE_VARIABLE}={value} switches C kernels off"):
            resolve_kernels("cpu", torch.empty(1, 1))
        self.train(tiny_model(tiny_config("peer", "pkm")))
        assert not compilations
        assert not notices
        assert not cache.exists()

    @pytest.mark.parametrize("value", ["", "1", "true"])
    def test_on(self, value, cache, monkeypatch):
        monkeypatch.setenv(COMPILE_VARIABLE, value)
        assert load_library(SOURCE).answer() == 42

    @pytest.mark.parametrize("kernels", ["torch", "eager"])
    def test_by_the_configuration(self, kernels, cache, compilations):
        self.train(tiny_model(tiny_config("peer", "pkm", expert_kernels=kernels)))
        assert not compilations
        assert not cache.exists()

    def test_the_first_compilation_says_how(self, cache, monkeypatch):
        notices = []
        monkeypatch.setattr(native_library.logger, "warning_once", notices.append)
        load_library(SOURCE)
        (notice,) = notices
        assert "compiles C kernels" in notice
        assert str(cache) in notice
        assert f"{COMPILE_VARIABLE}=0" in notice
        assert 'expert_kernels="torch"' in notice
        load_library.cache_clear()
        load_library(SOURCE)  # from the cache
        assert len(notices) == 1


class TestThreads:
    def test_on_torchs_own_openmp(self, tmp_path):
        """A second runtime would bring threads of its own."""
        script = """
import torch
from pathlib import Path
from modeling_peer.expert_kernels import ALL_EXPERT_KERNELS
def runtimes():
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return {file for file in files if "omp" in file.split("/")[-1]}
torch.set_num_threads(2)
torch.randn(1000, 1000).exp().sum()
before = runtimes()
ALL_EXPERT_KERNELS["cpu"].up(torch.randn(300, 64), torch.zeros(300, 8, dtype=torch.int64), torch.randn(5, 64))
print("added", sorted(runtimes() - before), "threads", len(list(Path("/proc/self/task").iterdir())))
"""
        assert "added []" in run(script, tmp_path)
        # Nor would one be loaded where torch has its runtime under another name.
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

    @slow
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork, so no child inherits threads")
    def test_a_fork_after_use(self, tmp_path):
        """The child has none of its parent's threads, and would wait for them for ever."""
        script = """
import os, torch
from modeling_peer.expert_kernels import ALL_EXPERT_KERNELS
from modeling_peer.gradient_factors import Entries, Factors
from modeling_peer.native_calls import num_threads
torch.set_num_threads(2)
kernels, literal = ALL_EXPERT_KERNELS["cpu"], ALL_EXPERT_KERNELS["eager"]
generator = torch.Generator().manual_seed(0)
x, table = torch.randn(300, 64, generator=generator), torch.randn(500, 64, generator=generator)
indices = torch.randint(500, (300, 8), generator=generator)
expected = literal.up(x, indices, table)
queries, keys = torch.randn(300, 2, 2, 8, generator=generator), torch.randn(1, 2, 30, 8, generator=generator)
found = kernels.retrieve(queries, keys, 4)[0]
rows = Factors(expected, x, Entries(indices, 500, "torch")).to_rows(torch.float32)
def is_right():
    factors = Factors(expected, x, Entries(indices, 500, "cpu"))
    are_near = torch.allclose(kernels.up(x, indices, table), expected, atol=1e-4)
    are_near &= torch.allclose(factors.to_rows(torch.float32), rows, atol=1e-3)
    return are_near and torch.equal(factors.entries.groups.rows, indices.unique().int()) and torch.equal(kernels.retrieve(queries, keys, 4)[0], found)
assert is_right()
child = os.fork()
if child == 0:
    os._exit(0 if is_right() and num_threads() == 1 else 1)
assert os.waitpid(child, 0)[1] == 0
assert is_right() and num_threads() == 2  # the parent goes on
"""
        run(script, tmp_path, OMP_NUM_THREADS="2")
