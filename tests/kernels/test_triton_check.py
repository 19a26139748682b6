# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Kernels in Triton are compared on a GPU before `"auto"` takes them: here the CPU is one, with an interpreter."""

import os
from unittest import mock

import pytest
import torch
from kernel_cases import experts, literal_up, needs_triton
from torch import nn
from torch._subclasses import FakeTensorMode

from modeling_peer.ops import gradient_triton, kernels, kernels_triton, retrieval_triton, triton_check, triton_launch
from modeling_peer.ops.experts import run_experts_on_kernels
from modeling_peer.ops.kernels import resolve_kernels
from modeling_peer.ops.triton_launch import tl, triton


pytestmark = needs_triton

if triton is not None:

    @triton.jit
    def _wrong_up(hidden, indices, table, scales, output, active, ROWS: tl.constexpr):
        places = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        tl.store(output + tl.program_id(0) * active + places, tl.zeros([ROWS], tl.float32), mask=places < active)


@pytest.fixture
def gpu(cache, monkeypatch):
    """Whose name may be changed; the CPU counts as one, and nothing has been compared."""
    names = ["GPU"]
    monkeypatch.setattr(kernels_triton, "can_run_on", lambda device: True)
    monkeypatch.setitem(kernels.FASTEST_KERNELS, "cpu", "triton")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton_check, "_FAULTS", {})
    return names


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(triton_check.logger, "warning", found.append)
    return found


@pytest.fixture
def comparisons(monkeypatch):
    """The dtypes of all comparisons, which find nothing and compute nothing."""
    found = []
    monkeypatch.setattr(triton_check, "_compare", lambda results, device, dtype: found.append(dtype))
    return found


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_right_kernels_are_chosen(dtype, gpu, warnings):
    tables = torch.empty(1, 1, dtype=dtype), torch.empty(2, 2, dtype=dtype)
    with torch.inference_mode(), FakeTensorMode() as mode:  # as where a model is exported
        assert resolve_kernels(None, mode.from_tensor(tables[0])) == "triton"
    assert [resolve_kernels(None, table) for table in tables] == ["triton"] * 2 and not warnings


def wrong(monkeypatch):
    kernel, start = kernels_triton._up, triton_launch.start

    def start_wrong(each, grid, arguments, options):
        each, options = (_wrong_up, {"ROWS": options["ROWS"]}) if each is kernel else (each, options)
        start(each, grid, arguments, options)

    monkeypatch.setattr(triton_launch, "start", start_wrong)


def failing(monkeypatch):
    error = RuntimeError("no kernel image is available\nfor execution on the device")
    monkeypatch.setattr(triton_launch, "start", mock.Mock(side_effect=error))


@pytest.mark.interpreted
@pytest.mark.parametrize("break_, reason", [(wrong, "`up` differs by up to 2"), (failing, "no kernel image")])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_of_others_the_core_runs_with_one_warning(break_, reason, compiled, gpu, warnings, monkeypatch):
    hidden, weights, indices, table = experts(3, 2, 24, 20, torch.float32)
    expected = torch.einsum("ta,tad->td", weights * literal_up(hidden, indices, table).float(), table[indices])
    up, down = (nn.Embedding.from_pretrained(table) for _ in range(2))
    torch._dynamo.reset()
    run = (
        torch.compile(run_experts_on_kernels, backend="eager", fullgraph=True) if compiled else run_experts_on_kernels
    )
    with monkeypatch.context() as patch:
        break_(patch)
        for _ in range(2):
            torch.testing.assert_close(run(hidden, indices, weights, up, None, down, nn.Identity()), expected)
        assert resolve_kernels("triton", table) == "triton"
    (warning,) = warnings
    assert reason in warning and "`./run gpu`" in warning and "\n" not in warning
    monkeypatch.setattr(triton_check, "_FAULTS", {})  # as in another process
    assert resolve_kernels(None, table) == "torch" and len(warnings) == 2
    os.remove(warning.partition("Delete ")[2].partition(" ")[0])
    monkeypatch.setattr(triton_check, "_FAULTS", {})
    assert resolve_kernels(None, table) == "triton" and len(warnings) == 2


KERNELS = [
    (gradient_triton, "_row_gradient"),
    (gradient_triton, "_squared_norm"),
    (gradient_triton, "_sum_chunk"),
    (kernels_triton, "_down"),
    (retrieval_triton, "_score"),
    (retrieval_triton, "_select"),
    (retrieval_triton, "_select_pairs"),
]


@pytest.mark.interpreted
@pytest.mark.parametrize("module, name", KERNELS, ids=[name for _, name in KERNELS])
def test_every_kernel_is_compared(module, name, monkeypatch):
    """One is not launched: its results are what was in the memory."""
    kernel, start = getattr(module, name), triton_launch.start
    monkeypatch.setattr(triton_launch, "start", lambda each, *launch: None if each is kernel else start(each, *launch))
    assert triton_check._compare(triton_check.results_of_experts, torch.device("cpu"), torch.float32)


class TestVerdict:
    def test_is_kept_for_gpu_dtype_releases_and_sources(self, gpu, comparisons, tmp_path, monkeypatch):
        def choose(dtype=torch.float32):
            monkeypatch.setattr(triton_check, "_FAULTS", {})  # as in another process
            assert resolve_kernels(None, torch.empty(1, 1, dtype=dtype)) == "triton"
            return len(comparisons)

        assert [choose(), choose(), choose(torch.float16), choose(torch.float16)] == [1, 1, 2, 2]
        gpu[0] = "another GPU"
        assert [choose(), choose()] == [3, 3]
        for number, module in enumerate((torch, triton), start=4):
            monkeypatch.setattr(module, "__version__", "0.0")
            assert [choose(), choose()] == [number, number]
        (tmp_path / "ops").mkdir()
        (tmp_path / "ops" / "kernels_triton.py").write_text("")
        monkeypatch.setattr(triton_check, "__file__", str(tmp_path / "ops" / "triton_check.py"))
        assert [choose(), choose()] == [6, 6]

    @pytest.mark.parametrize("content", ["", '{"a'])
    def test_a_damaged_one_is_replaced(self, content, gpu, comparisons, cache, monkeypatch):
        for _ in range(2):
            resolve_kernels(None, torch.empty(1, 1))
            monkeypatch.setattr(triton_check, "_FAULTS", {})
            (file,) = cache.iterdir()
            assert file.read_text() == "null"
            file.write_text(content)
        assert len(comparisons) == 2

    def test_without_a_folder_it_is_of_the_process(self, gpu, comparisons, cache, monkeypatch):
        cache.parent.write_text("")
        assert [resolve_kernels(None, torch.empty(1, 1)) for _ in range(2)] == ["triton"] * 2
        assert len(comparisons) == 1

    def test_of_none_while_a_graph_is_captured(self, gpu, comparisons, cache, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            assert resolve_kernels(None, torch.empty(1, 1)) == "torch" and not comparisons and not cache.exists()
        assert resolve_kernels(None, torch.empty(1, 1)) == "triton"
