# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""C kernels are compiled once, kept and shared, whatever happens to the files and folders of their cache."""

import ctypes
import multiprocessing
import os
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from script_runs import run_script
from slow_tests import slow
from tiny_models import random_tokens, tiny_config, tiny_model

from modeling_peer.ops import native
from modeling_peer.ops.kernels import KERNELS, resolve_kernels
from modeling_peer.ops.native import COMPILE_VARIABLE, load_library


@pytest.fixture
def sources(tmp_path):
    """A folder with a C file that compiles at once."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "answer.c").write_text("int answer(void) { return 42; }")
    return folder


@pytest.fixture
def notices(monkeypatch):
    notices = []
    monkeypatch.setattr(native.logger, "warning", notices.append)
    return notices


def fresh_load(sources):
    """As in another process."""
    load_library.cache_clear()
    return load_library(sources)


def libraries(folder):
    return sorted(path.name for path in folder.glob("*.so"))


def owned_by_another(path, monkeypatch):
    status_of = Path.lstat

    def lstat(self):
        status = status_of(self)
        return os.stat_result((*status[:4], os.getuid() + 1, *status[5:])) if self == path else status

    monkeypatch.setattr(Path, "lstat", lstat)


def compiled(commands):
    return sum("-c" in command for command in commands)


class TestWithoutACompiler:
    @pytest.mark.parametrize(
        "command, reason",
        [("there-is-no-such-compiler", "there-is-no-such-compiler"), ("gcc 'unbalanced", "No closing quotation")],
    )
    def test_it_is_torch_with_one_notice(self, command, reason, cache, notices, monkeypatch):
        monkeypatch.setenv("CC", command)
        table = torch.empty(1, 1)
        assert resolve_kernels(None, table) == resolve_kernels(None, table) == "torch"
        (notice,) = notices
        assert reason in notice and "\n" not in notice
        with pytest.raises(RuntimeError):
            resolve_kernels("cpu", table)

    def test_its_own_words_are_in_the_notice(self, cache, sources, tmp_path, notices, monkeypatch):
        log, compiler = tmp_path / "log", tmp_path / "failing-compiler"
        compiler.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && exit\necho $LC_ALL "$@" >> {log}\necho "no OpenMP" >&2\nexit 1\n'
        )
        compiler.chmod(0o755)
        monkeypatch.setenv("CC", str(compiler))
        assert load_library(sources) is None
        (command,) = {*log.read_text().splitlines()}
        assert command.startswith("C ") and "no OpenMP" in notices[-1]
        assert {path.name for path in cache.iterdir()} <= {"lock"}


class TestSwitchedOff:
    @staticmethod
    def train(model):
        tokens = random_tokens(2, 5)
        model.train()(tokens, labels=tokens).loss.backward()
        with torch.no_grad():
            model.eval()(tokens)

    @pytest.mark.parametrize("value", ["0", "off"])
    def test_by_the_environment(self, value, cache, compilations, notices, monkeypatch):
        monkeypatch.setenv(COMPILE_VARIABLE, value)
        assert resolve_kernels(None, torch.empty(1, 1)) == "torch"
        with pytest.raises(RuntimeError, match=COMPILE_VARIABLE):
            resolve_kernels("cpu", torch.empty(1, 1))
        self.train(tiny_model(tiny_config("peer", "pkm")))
        assert not compilations and not notices and not cache.exists()

    @pytest.mark.parametrize("value", ["", "1", "true"])
    def test_on(self, value, cache, sources, monkeypatch):
        monkeypatch.setenv(COMPILE_VARIABLE, value)
        assert load_library(sources).answer() == 42

    @pytest.mark.parametrize("kernels", ["torch", "eager"])
    def test_by_the_configuration(self, kernels, cache, compilations):
        self.train(tiny_model(tiny_config("peer", "pkm", expert_kernels=kernels)))
        assert not compilations and not cache.exists()


class TestKept:
    @pytest.mark.parametrize("umask", [0o022, 0o002])
    def test_compiled_once(self, umask, cache, sources, compilations):
        """What is made is trusted, and nobody else's to change, under any umask."""
        cache.parent.mkdir(mode=0o755)
        before = os.umask(umask)
        try:
            for _ in range(2):
                assert fresh_load(sources).answer() == 42
        finally:
            os.umask(before)
        assert compiled(compilations) == 1
        assert len(libraries(cache)) == 1 and {path.name for path in cache.iterdir()} <= {"lock", *libraries(cache)}
        assert not cache.stat().st_mode & 0o077 and not any(each.stat().st_mode & 0o022 for each in cache.glob("*.so"))

    def test_by_sources_compiler_flags_and_processor(self, cache, sources, monkeypatch):
        load_library(sources)
        (sources / "header.h").write_text("")
        for name, value in (
            ("SOURCES", None),  # the file above is new
            ("COMPILER_FLAGS", (*native.COMPILER_FLAGS, "-g")),
            ("_processor", lambda: "another processor"),
            ("compiler_command", lambda: ["gcc", "-DOTHER"]),
        ):
            before = len(libraries(cache))
            with monkeypatch.context() as patch:
                patch.setattr(native, name, value)
                fresh_load(sources)
            assert len(libraries(cache)) == before + 1, name

    @pytest.mark.skipif(
        not hasattr(os, "fork"), reason="this system has no fork, so no process shares the cache in this way"
    )
    def test_processes_that_start_together_share_one(self, cache, sources, monkeypatch):
        """Each reports whether it compiled."""
        context, compile_ = multiprocessing.get_context("fork"), native._compile
        reports, barrier = context.Queue(), context.Barrier(3)

        def slowly(*arguments):
            reports.put("compiled")
            time.sleep(1)
            return compile_(*arguments)

        def process():
            barrier.wait()
            reports.put(load_library(sources).answer())

        monkeypatch.setattr(native, "_compile", slowly)
        processes = [context.Process(target=process) for _ in range(3)]
        for each in processes:
            each.start()
        reported = sorted(str(reports.get(timeout=60)) for _ in range(4))
        for each in processes:
            each.join(60)
        assert reported == ["42", "42", "42", "compiled"]
        assert len(libraries(cache)) == 1

    @pytest.mark.parametrize("damage", [lambda code: code[: len(code) // 2], lambda code: code[:-1] + b"?", None])
    def test_a_damaged_one_is_compiled_again(self, damage, cache, sources, compilations):
        """Code that is mapped from a file cut short ends the process."""
        load_library(sources)
        (library,) = cache.glob("*.so")
        content = library.read_bytes()
        library.unlink()  # what is mapped stays
        library.write_bytes(content[:4096].ljust(len(content), b"\0") if damage is None else damage(content))
        assert fresh_load(sources).answer() == 42
        assert compiled(compilations) == 2
        assert fresh_load(sources).answer() == 42
        assert compiled(compilations) == 2 and len(libraries(cache)) == 1


class TestWhereItCannotBeKept:
    """A library runs with the rights of its user: it is neither loaded nor kept where others could have written it."""

    @pytest.mark.parametrize("how", ["another user's", "a link", "above: 777", "above: 2775", "777", "775"])
    def test_in_a_folder_of_others(self, how, cache, sources, compilations, tmp_path, monkeypatch):
        load_library(sources)
        *above, mode = how.split(": ")
        if how == "another user's":
            owned_by_another(cache, monkeypatch)
        elif how == "a link":
            cache.rename(tmp_path / "open")
            cache.symlink_to(tmp_path / "open")
            (tmp_path / "open").chmod(0o777)
        else:
            (cache.parent if above else cache).chmod(int(mode, 8))
        load, loaded = ctypes.CDLL, []
        monkeypatch.setattr(native.ctypes, "CDLL", lambda path: loaded.append(Path(path)) or load(path))
        for _ in range(2):
            assert fresh_load(sources).answer() == 42
        assert compiled(compilations) == 2  # once for the folder that is private
        private = tmp_path / ".modeling_peer"
        assert {path.parent for path in loaded} == {private} and not private.stat().st_mode & 0o077

    def test_in_a_folder_that_was_exchanged_for_a_link(self, cache, sources, tmp_path, monkeypatch):
        """Between the look at its path and that at its owner, to a folder that is private."""
        cache.mkdir(parents=True)
        private, resolve = tmp_path / "private", Path.resolve
        private.mkdir(mode=0o700)

        def exchange(self, **kwargs):
            path = resolve(self, **kwargs)
            if self == cache and not cache.is_symlink():
                cache.rename(tmp_path / "exchanged")
                cache.symlink_to(private)
            return path

        monkeypatch.setattr(Path, "resolve", exchange)
        assert load_library(sources).answer() == 42
        assert not libraries(private) and libraries(tmp_path / ".modeling_peer")

    def test_below_a_folder_that_nobody_else_reaches(self, cache, sources):
        """As with a umask of 002 in a private home."""
        cache.mkdir(mode=0o775, parents=True)
        cache.chmod(0o775)
        cache.parent.chmod(0o700)
        assert load_library(sources).answer() == 42 and libraries(cache)

    def test_a_compiler_keeps_its_files_where_nobody_else_writes(self, cache, sources, monkeypatch):
        """It replaces what it finds in TMPDIR, and may look for its linker where it runs."""
        places, run = [], native.subprocess.run

        def note(command, **kwargs):
            places.append((kwargs["env"].get("TMPDIR"), str(kwargs["cwd"])))
            return run(command, **kwargs)

        monkeypatch.setattr(native.subprocess, "run", note)
        load_library(sources)
        assert len(places) == 3 and all(Path(one).parent == cache for place in places[1:] for one in place)

    def test_behind_a_lock_that_another_holds(self, cache, sources, tmp_path, monkeypatch):
        lock = native.FileLock
        monkeypatch.setattr(native, "FileLock", lambda path, timeout, mode: lock(path, timeout / 1000, mode))
        cache.mkdir(parents=True)
        with lock(cache / "lock"):
            assert load_library(sources).answer() == 42
        assert not libraries(cache) and libraries(tmp_path / ".modeling_peer")

    def test_in_two_folders_of_others(self, cache, sources, notices, tmp_path):
        """Not even what was just compiled is loaded where all could write it."""
        tmp_path.chmod(0o777)
        assert load_library(sources) is None and "others could put code" in notices[-1]

    def test_below_a_sticky_folder(self, cache, sources):
        cache.parent.mkdir()
        cache.parent.chmod(0o1777)
        assert load_library(sources).answer() == 42 and libraries(cache)

    @pytest.mark.parametrize("how", ["another user's", "writable"])
    def test_a_library_that_others_could_have_changed_is_made_anew(
        self, how, cache, sources, compilations, monkeypatch
    ):
        load_library(sources)
        for library in cache.glob("*.so"):
            if how == "writable":
                library.chmod(0o777)
            else:
                owned_by_another(library, monkeypatch)
        assert fresh_load(sources).answer() == 42
        assert compiled(compilations) == 2

    def test_in_the_folder_in_which_a_process_happens_to_run(self, cache, sources, tmp_path, monkeypatch):
        monkeypatch.setattr(native.constants, "HF_HOME", "")
        monkeypatch.chdir(tmp_path)
        assert load_library(sources).answer() == 42
        assert not [*tmp_path.glob("modeling_peer/*.so")]

    def test_in_a_folder_that_cannot_be_written_what_is_there_is_used(self, cache, sources, compilations, monkeypatch):
        load_library(sources)
        for owner, name in ((native, "FileLock"), (native.tempfile, "TemporaryDirectory")):
            monkeypatch.setattr(owner, name, mock.Mock(side_effect=OSError(30, "Read-only file system")))
        assert fresh_load(sources).answer() == 42
        assert compiled(compilations) == 1

    @pytest.mark.parametrize(
        "error", [PermissionError(13, "Permission denied"), NotImplementedError("no locks"), None], ids=str
    )
    def test_in_a_folder_that_cannot_be_written(self, error, cache, sources, tmp_path, monkeypatch):
        """Or below a file."""
        if error is None:
            (tmp_path / "home").write_text("")
        else:
            monkeypatch.setattr(native, "FileLock", mock.Mock(side_effect=error))
        assert load_library(sources).answer() == 42
        assert not libraries(cache)


class TestThreads:
    def test_on_torchs_own_openmp(self):
        """A second runtime would bring threads of its own."""
        script = """
import torch
from pathlib import Path
from modeling_peer.ops.kernels import KERNELS
def runtimes():
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return {file for file in files if "omp" in file.split("/")[-1]}
torch.set_num_threads(2)
torch.randn(1000, 1000).exp().sum()
before = runtimes()
KERNELS["cpu"].up(torch.randn(300, 64), torch.zeros(300, 8, dtype=torch.int64), torch.randn(5, 64))
print("added", sorted(runtimes() - before))
"""
        assert "added []" in run_script(script)

    @pytest.mark.parametrize("threads", [1, 2], indirect=True)
    def test_as_many_as_torch_has(self, threads, monkeypatch):
        asked = []
        monkeypatch.setattr(ctypes, "c_int", lambda value: asked.append(value) or 1)
        KERNELS["cpu"].up(torch.randn(3, 8), torch.zeros(3, 2, dtype=torch.int64), torch.randn(5, 8))
        assert asked == [threads]

    @slow
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork, so no child inherits threads")
    def test_a_fork_after_use(self):
        """The child has none of its parent's threads, and would wait for them for ever."""
        script = """
import os, torch
from modeling_peer.ops.kernels import KERNELS
from modeling_peer.ops.native import num_threads
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
x, table = torch.randn(300, 64, generator=generator), torch.randn(500, 64, generator=generator)
rows = torch.randint(500, (300, 8), generator=generator)
queries, keys = torch.randn(300, 2, 2, 8, generator=generator), torch.randn(1, 2, 30, 8, generator=generator)
cpu, torch_ = KERNELS["cpu"], KERNELS["torch"]
expected, found = torch_.up(x, rows, table), cpu.retrieve(queries, keys, 4)[0]
def is_right():
    same = torch.allclose(cpu.up(x, rows, table), expected, atol=1e-4)
    return same and torch.equal(cpu.retrieve(queries, keys, 4)[0], found)
assert is_right()
child = os.fork()
if child == 0:
    os._exit(0 if is_right() and num_threads() == 1 else 1)
assert os.waitpid(child, 0)[1] == 0
assert is_right() and num_threads() == 2  # the parent goes on
"""
        run_script(script, OMP_NUM_THREADS="2")
