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
"""The command for a machine with a GPU, all of its parts at toy sizes on a CPU, where a clock replaces events."""

import ast
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from slow_tests import slow

from common.subprocesses import module_environment
from gpu import __main__ as command
from gpu import equality_tests, layer, report, sanitizer, worker
from gpu.device import Device
from gpu.equality_layers import check_optimizer
from gpu.inputs import layer_task
from gpu.report import aims, read_results
from gpu.rows import SkippedError
from gpu.settings import Settings, tiny_sizes
from gpu.tuning import line_to_change
from gpu.wheels import unpack
from gpu.worker import CONTEXT_LOST, PARTS, part_rows, run_rows
from modeling_peer import ExpertKernelsInterface
from modeling_peer.expert_kernels_cpu import CpuKernels
from modeling_peer.optim import row_adamw


ROOT = Path(__file__).parents[2]

TOOL = """#!/bin/sh
# memcheck runs the launches, racecheck finds a race
[ "$2" = memcheck ] && shift 4 && exec "$@"
echo "RACECHECK SUMMARY: 1 hazard"
exit "$4"
"""

TESTS = "def test_passes():\n    pass\n\n\ndef test_needs_what_is_missing():\n    import no_such_package\n"


@pytest.fixture
def settings(tmp_path):
    return Settings(device="cpu", kernels="cpu", output_dir=str(tmp_path / "out"), seed=1, **tiny_sizes())


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with two tests in place of this one, on a machine without compute-sanitizer."""
    file = tmp_path / "project/tests/model/test_masks.py"
    file.parent.mkdir(parents=True)
    file.write_text(TESTS)
    monkeypatch.setattr(equality_tests, "ROOT", tmp_path / "project")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))


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


def test_all_parts(run, project, settings):
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
    assert "tests: masks: 2 tests, 0 skipped, 1 without a package" in printed
    assert "Toy sizes: times and aims mean nothing." in printed
    assert "2 skipped\n  skipped memcheck and 1 more: compute-sanitizer is not installed" in printed
    for line in ("up, d = 16, unique", "peer_pytorch, step, d = 16", "peer-tiny", "held-out loss", "x floor"):
        assert line in printed
    assert "step, d = 16: time / floor" in printed.partition("\n  aim ")[2]
    assert all((folder / f"{name}.png").stat().st_size > 5000 for name in ("kernels", "layer", "training"))
    assert (folder / "report.txt").read_text().strip() in printed
    # What was skipped is tried again, and nothing else.
    jobs, _, _ = run()
    assert [job["part"] for job in jobs] == ["sanitizer", "tuning"]
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

    def test_when_the_time_is_over(self, run, settings):
        _, _, printed = run("--parts", "decode", "--minutes", 0)
        assert "0 done, 0 failed, 8 skipped" in printed
        assert "There was no time left: the same command goes on from here." in printed
        assert "8 done, 0 failed, 0 skipped" in run("--parts", "decode")[2]

    def test_a_row_that_ends_its_process_fails_alone(self, run, settings):
        def run_worker(job):
            if len(rows_of(settings, "decode") if Path(settings.output_dir, "decode.json").is_file() else {}) == 0:
                worker.open_part("decode", settings).start("peer-tiny, graph")
                return -11, "Its process was ended by signal 11."
            return run_in_this_process(job)

        jobs, code, printed = run("--parts", "decode", run_worker=run_worker)
        assert len(jobs) == 2 and code == 1
        assert rows_of(settings, "decode")["peer-tiny, graph"]["error"] == "Its process was ended by signal 11."
        assert "7 done, 1 failed, 0 skipped\n  FAILED  peer-tiny, graph: Its process was ended" in printed
        jobs, code, _ = run("--parts", "decode")
        assert len(jobs) == 1 and code == 0

    def test_a_lost_context_ends_a_process_but_not_the_part(self, run, monkeypatch, settings):
        def fail(*arguments):
            raise RuntimeError("an illegal memory access was encountered")

        monkeypatch.setattr("gpu.decode.measure_model", fail)
        monkeypatch.setattr(worker, "_is_usable", lambda device: False)
        jobs, code, printed = run("--parts", "decode")
        assert len(jobs) == 5 and code == 1
        assert "4 done, 4 failed" in printed
        assert run_rows({**jobs[0], "attempt": "another"}) == CONTEXT_LOST

    def test_a_process_that_does_not_start(self, run):
        _, code, printed = run("--parts", "decode", run_worker=lambda job: (1, "Its process ended with 1."))
        assert code == 1
        assert "FAILED  process: Its process ended with 1." in printed
        assert run("--parts", "decode")[1] == 0

    def test_other_conditions(self, run, settings, monkeypatch):
        run("--parts", "decode")
        monkeypatch.setattr(Device, "facts", lambda device: {"torch": "another", "transformers": "another"})
        with pytest.raises(ValueError, match=r"decode.json is of a run with other \['torch', 'transformers'\]: --ov"):
            run("--parts", "decode")
        assert len(run("--parts", "decode", "--overwrite")[0]) == 1


def imports_of(file):
    """Dotted names that a file of examples/ imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{each.name}" for each in node.names)


def test_it_needs_what_common_images_hold():
    """And PEER-pytorch, which a contender of the benchmark imports when it is made."""
    examples, found = ROOT / "examples", set()
    ahead = set((examples / "gpu").glob("*.py"))
    done = set()
    while ahead:
        file = ahead.pop()
        done.add(file)
        names = set(imports_of(file))
        files = {examples / f"{name.replace('.', '/')}.py" for name in names}
        ahead |= {each for each in files if each.is_file()} - done
        found |= {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    ours = {"gpu", "common", "benchmark", "modeling_peer"}
    assert found - ours == {"torch", "transformers", "tokenizers", "filelock", "matplotlib", "PEER_pytorch"}


class TestWhatIsMissing:
    def test_a_gpu(self):
        variables = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([ROOT / "run", "gpu"], env=variables, capture_output=True, text=True)
        assert done.returncode == 2 and not done.stdout
        assert done.stderr == (
            "There is no GPU here that torch can use: `--device cpu --tiny` tries the command without one.\n"
        )

    def test_kernels(self, run):
        assert run("--kernels", "triton")[1] == 2

    def test_packages(self, run, project, monkeypatch):
        monkeypatch.setattr(equality_tests, "find_spec", lambda name: None)
        monkeypatch.setattr(layer, "find_spec", lambda name: None)
        monkeypatch.setattr(report, "find_spec", lambda name: None)
        _, code, printed = run("--parts", "layer")
        assert code == 0
        assert (
            "skipped peer_pytorch, forward, d = 16 and 2 more: PEER-pytorch is not installed: see --wheels" in printed
        )
        assert "no pictures, because matplotlib is not installed" in printed
        assert re.search("step, d = 16: x PEER-pytorch +≥ 10 +- +not measured", printed)
        with pytest.raises(SkippedError, match="pytest is not installed"):
            equality_tests.run_tests(["tests/model/test_masks.py"])

    def test_wheels(self, run, settings, tmp_path, monkeypatch):
        folder = tmp_path / "wheels"
        folder.mkdir()
        with pytest.raises(ValueError, match="There are no wheels in --wheels"):
            unpack(folder, tmp_path)
        with zipfile.ZipFile(folder / "brought-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("brought_as_wheel.py", "VALUE = 1\n")
        monkeypatch.setattr(sys, "path", list(sys.path))
        jobs, _, _ = run("--parts", "decode", "--wheels", folder, "--minutes", 0)
        assert sys.path[-1] == jobs[0]["packages"] == str(tmp_path / "out/packages")
        assert __import__("brought_as_wheel").VALUE == 1


class TestSanitizer:
    @slow
    def test_tool(self, run, tmp_path, monkeypatch):
        tool = tmp_path / "cuda/bin" / sanitizer.TOOL
        tool.parent.mkdir(parents=True)
        tool.write_text(TOOL)
        tool.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
        _, code, printed = run("--parts", "sanitizer")
        assert code == 1
        assert "1 done, 1 failed, 0 skipped\n  FAILED  racecheck: code 9" in printed


def scaled(function, factor):
    return lambda *arguments: function(*arguments) * factor


def broken_kernels(name):
    """The kernels of the CPU with a mistake in one function."""

    def group(indices, num_rows):
        rows, starts, order = CpuKernels.group(indices, num_rows)
        return rows, starts, order.flip(0)

    def row_gradient(coefficients, sources, starts, tokens, out, places=None):
        CpuKernels.row_gradient(coefficients.roll(1), sources, starts, tokens, out, places)

    def retrieve(queries, sub_keys, k):
        indices, scores = CpuKernels.retrieve(queries, sub_keys, k)
        return indices.roll(1, -1), scores

    def retrieval_gradients(gradient, *arguments):
        return CpuKernels.retrieval_gradients(gradient * 1.001, *arguments)

    mistakes = {
        "up": scaled(CpuKernels.up, 1 + 2**-7),
        "down": lambda weights, indices, table: CpuKernels.down(weights, indices.roll(1, 1), table),
        "group": group,
        "row_gradient": row_gradient,
        "squared_norm": scaled(CpuKernels.squared_norm, 1.001),
        "retrieve": retrieve,
        "retrieval_gradients": retrieval_gradients,
    }
    return type("BrokenKernels", (CpuKernels,), {name: staticmethod(mistakes[name])})


class TestEquality:
    """That a mistake is found is what makes a check one."""

    @pytest.mark.parametrize(
        "function, names",
        [
            ("up", ["up, float32", "layer, float32"]),
            ("down", ["down, bfloat16", "layer, bfloat16"]),
            ("group", ["group", "row_gradient, float32"]),
            ("row_gradient", ["row_gradient, float16", "layer, float32"]),
            ("squared_norm", ["squared_norm, float32"]),
            ("retrieve", ["retrieve, exact scores", "retrieve, random scores"]),
            ("retrieval_gradients", ["gradients of retrieve"]),
        ],
    )
    def test_of_kernels(self, settings, monkeypatch, function, names):
        monkeypatch.setitem(ExpertKernelsInterface._global_mapping, "broken", broken_kernels(function))
        wrong = Settings(**{**vars(settings), "kernels": "broken"})
        assert all(row_of(settings, "equality", name)["passed"] for name in names)
        assert not any(row_of(wrong, "equality", name)["passed"] for name in names)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_of_the_optimizer(self, settings, monkeypatch, dtype):
        update = row_adamw.cpu.update_by_factors

        def update_faster(parameter, state, factors, group):
            update(parameter, state, factors, {**group, "lr": 1.01 * group["lr"]})

        name = f"RowAdamW, {dtype}, full"
        assert row_of(settings, "equality", name)["passed"]
        monkeypatch.setattr(row_adamw.cpu, "update_by_factors", update_faster)
        assert not row_of(settings, "equality", name)["passed"]

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_of_stochastic_rounding(self, settings, monkeypatch, dtype):
        update = row_adamw.cpu.update_by_factors

        def update_rounded_otherwise(parameter, state, factors, group):
            update(parameter, state, factors, {**group, "rounding_seed": 2})

        monkeypatch.setattr(row_adamw.cpu, "update_by_factors", update_rounded_otherwise)
        assert not row_of(settings, "equality", f"RowAdamW, {dtype}, row")["passed"]

    def test_of_the_optimizer_allows_another_neighbor(self, settings):
        """Elements shrink from step to step, so that a neighbor of before is many distances away, and some are near zero."""
        larger = Settings(
            **{**vars(settings), "small_layer": {"num_experts": 32**2, "hidden_size": 64}, "small_tokens": 256}
        )
        found = []
        for seed in range(40):
            torch.manual_seed(seed)
            found.append(check_optimizer(larger, torch.float16, "row"))
        assert all(each["passed"] for each in found) and max(each["differing"] for each in found) > 0

    def test_of_a_gradient_scaler(self, settings, monkeypatch):
        monkeypatch.setattr(torch.amp.GradScaler, "step", lambda scaler, optimizer: optimizer.step())
        assert not row_of(settings, "equality", "GradScaler, autocast float16")["passed"]

    @pytest.mark.parametrize("name", ["graph of a training step", "graph of decoding"])
    def test_of_graphs(self, settings, monkeypatch, name):
        monkeypatch.setattr(Device, "captured", lambda device, function: lambda: None)  # a graph that does nothing
        assert not row_of(settings, "equality", name)["passed"]

    def test_of_tests(self, project, settings):
        file = equality_tests.ROOT / "tests/model/test_masks.py"
        file.write_text(TESTS + "\n\ndef test_fails():\n    import modeling_peer.no_such_file\n")
        found = row_of(settings, "equality", "tests: masks")
        assert not found["passed"] and found["failed_tests"] == ["tests.model.test_masks::test_fails"]


class TestDevice:
    """What only a GPU does, with torch.cuda replaced by what takes the same arguments."""

    @pytest.fixture
    def device(self, monkeypatch):
        names = (
            "synchronize",
            "set_sync_debug_mode",
            "reset_peak_memory_stats",
            "max_memory_allocated",
            "empty_cache",
        )
        for name in (*names, "Event", "Stream", "stream", "current_stream", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, mock.create_autospec(getattr(torch.cuda, name)))
        for name in ("stream", "graph"):
            getattr(torch.cuda, name).side_effect = lambda *arguments: contextlib.nullcontext()
        torch.cuda.Event.return_value.elapsed_time.return_value = 2.0
        torch.cuda.max_memory_allocated.return_value = 5
        device = Device("cpu")
        device.is_gpu = True
        return device

    @pytest.mark.parametrize("cold", [False, True])
    def test_times(self, device, monkeypatch, cold):
        monkeypatch.setattr("gpu.device.FILLER", 1)
        calls = []
        assert device.seconds(lambda: calls.append(None), 7, cold) == 0.002
        assert len(calls) == 3 + 1 + 7
        assert torch.cuda.Event.call_args == mock.call(enable_timing=True)
        assert torch.cuda.Event.return_value.record.call_count == 2 * 8
        assert torch.cuda.synchronize.call_count == 2 * 2 + 8 * cold

    def test_memory(self, device):
        assert device.peak_bytes(lambda: None) == 5
        device.free()

    def test_waiting(self, device):
        with pytest.raises(RuntimeError, match="waits"), device.no_waiting():
            raise RuntimeError("waits")
        assert torch.cuda.set_sync_debug_mode.mock_calls == [mock.call("error"), mock.call("default")]

    def test_graph(self, device):
        calls = []
        replay = device.captured(lambda: calls.append(None))
        assert len(calls) == 3 + 1  # the last one is captured
        replay()
        assert len(calls) == 4 and torch.cuda.CUDAGraph.return_value.replay.call_count == 1


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

    @pytest.mark.parametrize(
        "part, name",
        [
            ("layer", "peer, forward, d = 16"),
            ("decode", "layer peer, d = 16, graph"),
            ("decode", "peer-tiny, no graph"),
        ],
    )
    def test_kernels_are_those_that_were_asked_for(self, settings, part, name):
        with pytest.raises(RuntimeError, match="Triton kernels are for a GPU"):
            row_of(Settings(**{**vars(settings), "kernels": "triton"}), part, name)

    def test_bytes(self):
        task = layer_task(Settings("cpu", "cpu", "", 0), "peer", "step", 2048, 16384)
        # Two tables in bfloat16: read twice, then read and written with two moments in float32.
        assert layer.unavoidable_bytes(task, 900_000) == 2 * 900_000 * 2048 * (2 + 2 + 2 + 2 + 16)


class TestReport:
    def test_aims(self):
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

    def test_lines_to_change(self):
        found = {"file": "a.py", "name": "ROWS", "present": 4, "best": 8, "times": {"4": 1.0, "8": 0.5}}
        assert line_to_change(found) == "a.py: ROWS = 8  # was 4, 2.00 times as fast"
        assert line_to_change({**found, "best": 4}) is None
