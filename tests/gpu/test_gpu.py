# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The command for a machine with a GPU, all of its parts at toy sizes on a CPU, where a clock replaces events."""

import ast
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from slow_tests import slow

from common.subprocesses import module_environment
from gpu import __main__ as command
from gpu import layer, sanitizer, worker
from gpu.device import Device
from gpu.inputs import layer_task
from gpu.report import aims, read_results
from gpu.settings import Settings, tiny_sizes
from gpu.wheels import unpack
from gpu.worker import PARTS, part_rows, run_rows
from modeling_peer import ExpertsInterface, RetrievalInterface
from modeling_peer.ops.experts import run_experts_on_kernels
from modeling_peer.ops.kernels import KERNELS
from modeling_peer.ops.kernels_cpu import CpuKernels
from modeling_peer.ops.kernels_triton import MANY_TOKENS
from modeling_peer.ops.retrieval import retrieve_on_kernels
from modeling_peer.ops.retrieval_triton import PIECE_SIZE
from modeling_peer.optim import row_adamw


ROOT = Path(__file__).parents[2]

TOOL = """#!/bin/sh
# memcheck runs the launches, racecheck finds a race
[ "$2" = memcheck ] && shift 4 && exec "$@"
echo "RACECHECK SUMMARY: 1 hazard"
exit "$4"
"""


@pytest.fixture
def settings(tmp_path):
    return Settings(device="cpu", kernels="cpu", output_dir=str(tmp_path / "out"), seed=1, **tiny_sizes())


def run_in_this_process(job):
    return run_rows(json.loads(json.dumps(job))), "Its process ended."


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the command, its rows in this process, and returns the jobs, the exit code and what was printed."""

    def run(*flags, run_worker=run_in_this_process):
        jobs = []
        monkeypatch.setattr(command, "run_worker", lambda job: jobs.append(job) or run_worker(job))
        flags = ["--device", "cpu", "--tiny", "--output_dir", str(tmp_path / "out"), *map(str, flags)]
        monkeypatch.setattr(sys, "argv", ["gpu", *flags])
        code = 0
        try:
            command.main()
        except SystemExit as ended:
            code = ended.code
        return jobs, code, capsys.readouterr().out

    return run


def rows_of(settings, part):
    return read_results(Path(settings.output_dir))[part]


def row_of(settings, part, name):
    """What a row finds."""
    torch.manual_seed(1)
    return part_rows(part, settings)[name]()


def test_all_parts(run, settings, tmp_path, monkeypatch):
    """On a machine without compute-sanitizer."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    folder = Path(settings.output_dir)
    jobs, code, printed = run()
    assert code == 0, printed
    assert [job["part"] for job in jobs] == list(PARTS)
    results = read_results(folder)
    assert {part: list(rows) for part, rows in results.items()} == {
        part: list(part_rows(part, settings)) for part in PARTS
    }
    for part in set(PARTS) - {"sanitizer", "tuning"}:
        assert not [row for row in results[part].values() if {"error", "skipped"} & row.keys()], part
    assert all(row["passed"] for row in results["equality"].values())
    assert all((folder / f"{name}.png").stat().st_size > 5000 for name in ("kernels", "layer", "training"))
    # What was skipped is tried again, and nothing else.
    jobs, _, _ = run()
    assert [job["part"] for job in jobs] == ["tuning", "sanitizer"]
    again = read_results(folder)
    assert all(again[part] == results[part] for part in set(PARTS) - {"sanitizer", "tuning"})


class TestResumption:
    @slow
    def test_after_a_kill(self, run, settings, tmp_path):
        file = tmp_path / "out/kernels.json"
        flags = ["--device", "cpu", "--tiny", "--parts", "kernels", "--output_dir", str(tmp_path / "out")]
        process = subprocess.Popen(
            [sys.executable, "-m", "gpu", *flags], env=module_environment(), stdout=subprocess.DEVNULL
        )
        while not file.is_file() or len(json.loads(file.read_text())["rows"]) < 2:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(1)  # the worker sees it after its row, which takes less
        kept = rows_of(settings, "kernels")
        names = list(part_rows("kernels", settings))
        assert 2 <= len(kept) < len(names)
        assert run("--parts", "kernels")[1] == 0
        rows = rows_of(settings, "kernels")
        assert list(rows) == names
        assert {name: rows[name] for name in kept} == kept

    def test_a_row_that_ends_its_process_fails_alone(self, run, settings):
        def run_worker(job):
            if len(rows_of(settings, "decode") if Path(settings.output_dir, "decode.json").is_file() else {}) == 0:
                worker.open_part("decode", settings).start("peer-tiny, graph")
                return -11, "Its process was ended by signal 11."
            return run_in_this_process(job)

        jobs, code, _ = run("--parts", "decode", run_worker=run_worker)
        assert len(jobs) == 2 and code == 1
        assert rows_of(settings, "decode")["peer-tiny, graph"]["error"] == "Its process was ended by signal 11."
        jobs, code, _ = run("--parts", "decode")
        assert len(jobs) == 1 and code == 0

    def test_other_conditions(self, run, settings, monkeypatch):
        run("--parts", "decode")
        monkeypatch.setattr(Device, "facts", lambda device: {"torch": "another", "transformers": "another"})
        jobs, code, printed = run("--parts", "decode", "kernels")
        assert [job["part"] for job in jobs] == ["decode", "kernels"] and code == 0
        assert printed.count("decode.json is of a run with other ['torch', 'transformers']: it is kept as") == 1
        assert Path(settings.output_dir, "decode.1.json").is_file()
        assert not run("--parts", "decode")[0] and len(run("--parts", "decode", "--overwrite")[0]) == 1

    def test_on_another_host_of_the_same_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="H100"))
        assert Device("cuda").facts().keys() == {"gpu", "cuda", "torch", "transformers"}


def test_each_part_has_its_time_before_one_goes_on(run, settings, monkeypatch):
    """With a clock on which each row takes half a minute: no command takes longer than nine."""
    clock, commands = [0.0], []

    def run_worker(job):
        file = worker.open_part(job["part"], settings)
        for name in part_rows(job["part"], settings):
            if file.is_due(name, job["attempt"], job["again"]) and clock[0] < job["deadline"]:
                clock[0] += 30
                file.put(name, {"took": 30}, job["attempt"])
        return 0, ""

    monkeypatch.setattr(command, "time", SimpleNamespace(time=lambda: clock[0]))
    while not commands or commands[-1]:
        start = clock[0]
        jobs, code, _ = run(run_worker=run_worker)
        commands.append([job["part"] for job in jobs])
        assert code == 0 and clock[0] - start <= 9 * 60
    parts = [part for some in commands for part in some]
    assert list(dict.fromkeys(parts)) == list(PARTS)
    assert parts.index("sanitizer") < len(parts) - 1 - parts[::-1].index("equality")


def imports_of(file):
    """Dotted names that a file of examples/ imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module, *(f"{node.module}.{each.name}" for each in node.names))


def test_it_needs_what_common_images_hold():
    """And PEER-pytorch, which a contender of the benchmark imports when it is made."""
    ahead, done, found = set((ROOT / "examples/gpu").glob("*.py")), set(), set()
    while ahead:
        done.add(file := ahead.pop())
        names = set(imports_of(file))
        files = {ROOT / "examples" / f"{name.replace('.', '/')}.py" for name in names}
        ahead |= {each for each in files if each.is_file()} - done
        found |= {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    ours = {"gpu", "common", "benchmark", "modeling_peer"}
    assert found - ours == {"torch", "transformers", "tokenizers", "filelock", "matplotlib", "PEER_pytorch"}


class TestWhatIsMissing:
    def test_a_gpu(self):
        variables = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([ROOT / "run", "gpu"], env=variables, capture_output=True, text=True)
        assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1

    def test_wheels(self, run, settings, tmp_path, monkeypatch):
        folder = tmp_path / "wheels"
        folder.mkdir()
        with pytest.raises(ValueError, match="There are no wheels in --wheels"):
            unpack(folder, tmp_path)
        with zipfile.ZipFile(folder / "brought-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("brought_as_wheel.py", "VALUE = 1\n")
        monkeypatch.setattr(sys, "path", list(sys.path))
        jobs, _, _ = run("--parts", "decode", "--wheels", folder)
        assert sys.path[-1] == jobs[0]["packages"] == str(tmp_path / "out/packages")
        assert __import__("brought_as_wheel").VALUE == 1


@slow
def test_a_sanitizer_that_finds_a_race(run, tmp_path, monkeypatch):
    tool = tmp_path / "cuda/bin" / sanitizer.TOOL
    tool.parent.mkdir(parents=True)
    tool.write_text(TOOL)
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    _, code, printed = run("--parts", "sanitizer")
    assert code == 1
    assert "FAILED  racecheck: code 9" in printed


def broken_kernels(name):
    """The kernels of the CPU with a mistake in one function."""

    def group(indices, num_rows):
        rows, starts, order = CpuKernels.group(indices, num_rows)
        return rows, starts, order.flip(0)

    def retrieve(queries, sub_keys, k):
        indices, scores = CpuKernels.retrieve(queries, sub_keys, k)
        return indices.roll(1, -1), scores

    mistakes = {
        "up": lambda *arguments: CpuKernels.up(*arguments) * (1 + 2**-7),
        # For many tokens, as where the kernels in Triton run otherwise.
        "down": lambda weights, *rest: CpuKernels.down(weights, *rest) * (1 + (len(weights) >= 32)),
        "group": group,
        "retrieve": retrieve,
        "retrieval_gradients": lambda gradient, *rest: CpuKernels.retrieval_gradients(gradient * 1.001, *rest),
    }
    return type("BrokenKernels", (CpuKernels,), {name: staticmethod(mistakes[name])})


class TestEquality:
    """That a mistake is found is what makes a check one."""

    @pytest.mark.parametrize(
        "function, names",
        [
            ("up", ["up, float32", "layer, float32"]),
            ("down", ["down, float32, production sizes"]),
            ("group", ["group", "row_gradient, float32"]),
            ("retrieve", ["retrieve, exact scores", "retrieve, random scores"]),
            ("retrieval_gradients", ["gradients of retrieve"]),
        ],
    )
    def test_of_kernels(self, settings, monkeypatch, function, names):
        monkeypatch.setitem(KERNELS, "broken", broken_kernels(function))
        for registry, run in ((ExpertsInterface, run_experts_on_kernels), (RetrievalInterface, retrieve_on_kernels)):
            monkeypatch.setitem(registry._global_mapping, "broken", functools.partial(run, kernels="broken"))
        wrong = Settings(**{**vars(settings), "kernels": "broken"})
        assert all(row_of(settings, "equality", name)["passed"] for name in names)
        assert not any(row_of(wrong, "equality", name)["passed"] for name in names)

    def test_at_production_sizes(self):
        """Many tokens for `down`, and retrieval in pieces, with sub-keys for all heads and for each."""
        settings = Settings("cuda", "triton", "", 0)
        assert min(tokens for tokens, *_ in settings.production["sizes"]) >= max(1024, MANY_TOKENS)
        pieces = [each for each in settings.retrievals if math.prod(each[:3]) * 2 > PIECE_SIZE]
        assert {each[-1] for each in pieces} == {1, pieces[0][1]}

    @pytest.mark.parametrize(("dtype", "changed"), [("float16", {"lr": 1.01e-3}), ("bfloat16", {"rounding_seed": 2})])
    def test_of_the_optimizer(self, settings, monkeypatch, dtype, changed):
        """Another learning rate is found, and another rounding."""
        update = row_adamw.cpu.update_by_factors

        def update_otherwise(parameter, state, factors, group):
            scaled = {name: 1.01 * group[name] if name == "lr" else value for name, value in changed.items()}
            update(parameter, state, factors, {**group, **scaled})

        assert row_of(settings, "equality", f"RowAdamW, {dtype}, row")["passed"]
        monkeypatch.setattr(row_adamw.cpu, "update_by_factors", update_otherwise)
        assert not row_of(settings, "equality", f"RowAdamW, {dtype}, row")["passed"]

    def test_of_a_gradient_scaler(self, settings, monkeypatch):
        monkeypatch.setattr(torch.amp.GradScaler, "step", lambda scaler, optimizer: optimizer.step())
        assert not row_of(settings, "equality", "GradScaler, autocast float16")["passed"]

    @pytest.mark.parametrize("name", ["graph of a training step", "graph of decoding"])
    def test_of_graphs(self, settings, monkeypatch, name):
        monkeypatch.setattr(Device, "captured", lambda device, function: lambda: None)  # a graph that does nothing
        assert not row_of(settings, "equality", name)["passed"]


class TestLayer:
    def test_out_of_memory(self, settings, monkeypatch):
        operation = layer.Layer.operation
        made = []

        def operation_in_little_memory(self, task, device, pieces):
            made.append(pieces)
            if pieces < 4:
                raise torch.OutOfMemoryError
            return operation(self, task, device, pieces)

        monkeypatch.setattr(layer.Layer, "operation", operation_in_little_memory)
        found = row_of(settings, "layer", "peer, step, d = 16")
        assert made == [1, 2, 4] and found["pieces"] == 4

    def test_bytes(self):
        task = layer_task(Settings("cpu", "cpu", "", 0), "peer", "step", 2048, 16384)
        # Two tables in bfloat16: read twice, then read and written with two moments in float32.
        assert layer.unavoidable_bytes(task, 900_000) == 2 * 900_000 * 2048 * (2 + 2 + 2 + 2 + 16)


def test_aims_of_the_report():
    copy = {"bytes_per_second": 1e12}
    kernels = {"operation": "up", "kind": "unique", "width": 8, "seconds": 1e-3, "bytes": 0.9e9}
    layers = {
        layer.row_name(name, operation, 8): {"contender": name, "width": 8, "seconds": seconds, "bytes": 1e9}
        for name, operation, seconds in (
            ("peer", "forward", 1.0),
            ("peer", "step", 2e-3),
            ("peer_pytorch", "forward", 2.0),
            ("peer_pytorch", "step", 2e-1),
        )
    }
    found = aims({"kernels": {"copy": copy, "up": kernels}, "layer": {"copy": copy, **layers}})
    assert [(name, pytest.approx(value)) for name, value, *_ in found] == [
        ("up, d = 8, unique rows: share of copy bandwidth", 0.9),
        ("forward, d = 8: x PEER-pytorch", 2.0),
        ("step, d = 8: x PEER-pytorch", 100.0),
        ("step, d = 8: time / floor", 2.0),
    ]
