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
The cache of compiled kernels: what is kept, what is rebuilt, and where, whatever happened to its files and folders.
"""

import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kernel_cache import SOURCE, compiled, libraries

from modeling_peer import native_library
from modeling_peer.native_library import load_library


def fresh_load(source=SOURCE):
    """As in another process."""
    load_library.cache_clear()
    return load_library(source)


def files(folder):
    """What is there but libraries."""
    return {path.name for path in folder.iterdir() if path.suffix != ".so"}


def own_folder(cache):
    return cache.parents[1] / f"modeling_peer-{os.getuid()}"


class TestKept:
    def test_compiled_once(self, cache, compilations):
        for _ in range(2):
            assert fresh_load().answer() == 42
        assert compiled(compilations) == 1
        assert len(libraries(cache)) == 1
        assert files(cache) <= {"lock"}

    def test_by_source_compiler_flags_and_processor(self, cache, monkeypatch):
        load_library(SOURCE)
        load_library(SOURCE + "\n")
        assert len(libraries(cache)) == 2
        for name, value in (
            ("COMPILER_FLAGS", (*native_library.COMPILER_FLAGS, "-g")),
            ("_processor", lambda: "another processor"),
            ("compiler_command", lambda: ["gcc", "-DOTHER"]),
        ):
            before = len(libraries(cache))
            with monkeypatch.context() as patch:
                patch.setattr(native_library, name, value)
                fresh_load()
            assert len(libraries(cache)) == before + 1, name

    @pytest.mark.skipif(
        not hasattr(os, "fork"), reason="this system has no fork, so no process shares the cache in this way"
    )
    @pytest.mark.parametrize("damaged", [False, True])
    def test_processes_that_start_together_share_one(self, damaged, cache, monkeypatch):
        """A compilation takes a second, and each process reports whether it compiled."""
        if damaged:
            load_library(SOURCE)
            (path,) = cache.glob("*.so")
            damage(path, b"")
            load_library.cache_clear()
        context, compile_ = multiprocessing.get_context("fork"), native_library.compile_library
        reports, barrier = context.Queue(), context.Barrier(3)

        def slowly(*arguments):
            reports.put("compiled")
            time.sleep(1)
            return compile_(*arguments)

        def process():
            barrier.wait()
            reports.put(load_library(SOURCE).answer())

        monkeypatch.setattr(native_library, "compile_library", slowly)
        processes = [context.Process(target=process) for _ in range(3)]
        for each in processes:
            each.start()
        reported = sorted(str(reports.get(timeout=60)) for _ in range(4))
        for each in processes:
            each.join(60)
        assert reported == ["42", "42", "42", "compiled"]
        assert len(libraries(cache)) == 1

    def test_a_failure_leaves_nothing(self, cache):
        assert load_library("this is not C") is None
        assert not libraries(cache)
        assert files(cache) <= {"lock"}
        assert not own_folder(cache).exists()


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "zeroed": lambda content: content[:1000] + bytes(len(content) - 1000),
    "empty": lambda content: b"",
    "text": lambda content: b"not a library",
}


def damage(path, content):
    """As another file: this process has mapped the one there is."""
    path.unlink()
    path.write_bytes(content)


LOAD = """
import sys
from modeling_peer import native_library
native_library.constants.HF_HOME = sys.argv[1]
assert native_library.load_library(sys.argv[2]).answer() == 42
"""


class TestDamaged:
    @pytest.mark.parametrize("kind", [*DAMAGES, "without digest"])
    def test_it_is_rebuilt_and_not_loaded(self, kind, cache, compilations, monkeypatch):
        load_library(SOURCE)
        (path,) = cache.glob("*.so")
        content = path.read_bytes()
        if kind == "without digest":  # as earlier versions named it
            path.rename(cache / f"{path.name.partition('-')[0]}.so")
        else:
            damage(path, DAMAGES[kind](content))
        load, loaded = ctypes.CDLL, []
        monkeypatch.setattr(
            native_library.ctypes, "CDLL", lambda path: loaded.append(Path(path).read_bytes()) or load(path)
        )
        assert fresh_load().answer() == 42
        assert loaded == [content]
        assert compiled(compilations) == 2
        assert libraries(cache) == [path.name]

    def test_where_it_cannot_be_removed_another_folder_is_used(self, cache, monkeypatch):
        load_library(SOURCE)
        (path,) = cache.glob("*.so")
        damage(path, DAMAGES["truncated"](path.read_bytes()))
        unlink = Path.unlink

        def refuse(path, **kwargs):
            if path.parent == cache:
                raise OSError(30, "Read-only file system")
            unlink(path, **kwargs)

        monkeypatch.setattr(Path, "unlink", refuse)
        assert fresh_load().answer() == 42
        assert len(libraries(own_folder(cache))) == 1

    def test_another_process_does_not_end(self, cache):
        load_library(SOURCE)
        (path,) = cache.glob("*.so")
        damage(path, DAMAGES["truncated"](path.read_bytes()))
        done = subprocess.run([sys.executable, "-c", LOAD, str(cache.parent), SOURCE], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


class TestKilled:
    def test_it_leaves_no_folder_for_long(self, cache, monkeypatch):
        context, compile_ = multiprocessing.get_context("fork"), native_library.compile_library
        started = context.Event()

        def for_ever(*arguments):
            compile_(*arguments)
            started.set()
            time.sleep(600)

        with monkeypatch.context() as patch:
            patch.setattr(native_library, "compile_library", for_ever)
            process = context.Process(target=load_library, args=(SOURCE,))
            process.start()
            assert started.wait(60)
            os.kill(process.pid, signal.SIGKILL)
            process.join(60)
        assert any(name.startswith("build-") for name in files(cache))
        assert fresh_load().answer() == 42
        assert files(cache) <= {"lock"}


class TestWhereItCannotBe:
    def test_in_a_folder_that_cannot_be_written_what_is_there_is_used(self, cache, compilations, monkeypatch):
        load_library(SOURCE)

        def refuse(*args, **kwargs):
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(native_library, "FileLock", refuse)
        monkeypatch.setattr(native_library.tempfile, "TemporaryDirectory", refuse)
        assert fresh_load().answer() == 42
        assert compiled(compilations) == 1

    @pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), NotImplementedError("no locks")])
    def test_in_a_folder_that_cannot_be_written(self, error, cache, monkeypatch):
        lock = native_library.FileLock

        def refuse(path):
            if path.parent == cache:
                raise error
            return lock(path)

        monkeypatch.setattr(native_library, "FileLock", refuse)
        assert load_library(SOURCE).answer() == 42
        assert not libraries(cache)
        assert len(libraries(own_folder(cache))) == 1

    def test_below_a_file(self, cache, tmp_path):
        (tmp_path / "home").write_text("")
        assert load_library(SOURCE).answer() == 42

    def test_where_code_cannot_be_executed(self, cache, compilations, monkeypatch):
        """As on a file system that is mounted `noexec`."""
        load = ctypes.CDLL

        def refuse(path):
            if Path(path).parent == cache:
                raise OSError(f"{path}: failed to map segment from shared object")
            return load(path)

        monkeypatch.setattr(native_library.ctypes, "CDLL", refuse)
        for _ in range(2):
            assert fresh_load().answer() == 42
        assert compiled(compilations) == 2  # once in each folder
        assert len(libraries(own_folder(cache))) == 1

    @pytest.mark.skipif(
        not shutil.which("unshare") or os.getuid() != 0,
        reason="mounting a file system needs `unshare` and the root user",
    )
    def test_on_a_file_system_mounted_noexec(self, tmp_path):
        home = tmp_path / "home"
        home.mkdir()
        if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "-o", "noexec", "none", home]).returncode:
            pytest.skip("root may not mount a file system here, as in a container without that privilege")
        command = 'mount -t tmpfs -o noexec none "$1" && exec "$2" -c "$3" "$1" "$4"'
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", command, "sh", str(home), sys.executable, LOAD, SOURCE],
            env=os.environ | {"TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert len(libraries(tmp_path / f"modeling_peer-{os.getuid()}")) == 1

    def test_a_folder_that_others_can_write_is_not_trusted(self, cache):
        own = own_folder(cache)
        own.mkdir(mode=0o777)
        own.chmod(0o777)
        with pytest.raises(OSError, match="not this user's alone"):
            native_library._own_folder()
