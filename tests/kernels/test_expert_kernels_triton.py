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
Experts in Triton, without a GPU: what its interpreter computes, held against Algorithm 1 in float64, and what its
compiler makes of the kernels.

Triton is interpreted or not from its import on. This file, run as a script, is the process in which it is.
"""

import importlib.util
import itertools
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from modeling_peer import expert_kernels_triton
from modeling_peer.expert_kernels import expert_down, expert_up, resolve_kernels
from modeling_peer.expert_kernels_torch import EagerKernels
from modeling_peer.expert_kernels_triton import TritonKernels


# Where its wheels are, Triton is a part of the test environment, and its absence a failure.
needs_triton = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Triton is for Linux, on x86-64."
)

ROOT = Path(__file__).parents[2]

NUM_EXPERTS = 20

# Elements on either side of a tensor that no kernel may read or write.
EDGE = 512


class Case(NamedTuple):
    dtype: torch.dtype
    table_dtype: torch.dtype
    width: int
    num_tokens: int
    active: int
    num_retrieved: int  # different experts, 1 where all tokens retrieve the same

    def __str__(self):
        dtypes = "-".join(str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.table_dtype))
        return f"{dtypes}-d{self.width}-T{self.num_tokens}-A{self.active}-of-{self.num_retrieved}"


DTYPES = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32, torch.bfloat16)]
CASES = [Case(*DTYPES[0], d, t, 7, 12) for d, t in itertools.product((24, 64, 130), (0, 1, 33))]
CASES += [Case(*dtypes, 130, 5, 7, 12) for dtypes in DTYPES[1:]]
CASES += [
    Case(*DTYPES[0], 130, 33, 7, 1),
    Case(torch.bfloat16, torch.float32, 130, 5, 7, 12),
    Case(torch.float32, torch.float16, 300, 2, 40, 12),  # more than a block, in columns and in experts of a token
    Case(torch.float32, torch.float32, 1, 5, 1, 3),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
both_algorithms = pytest.mark.parametrize("by_expert", [False, True], ids=["by-token", "by-expert"])


def amid_edges(tensor):
    """A copy, in a buffer whose other elements are NaN."""
    buffer = torch.full((tensor.numel() + 2 * EDGE,), math.nan, dtype=tensor.dtype)
    return buffer[EDGE:-EDGE].view(tensor.shape).copy_(tensor)


def has_kept_edges(copy):
    buffer = torch.empty(0, dtype=copy.dtype).set_(copy.untyped_storage())
    return torch.cat([buffer[:EDGE], buffer[-EDGE:]]).isnan().all().item()


def inputs_of(case):
    """`hidden [T, d], weights [T, A], indices [T, A], table [N, d]`, rounded to their dtypes."""
    generator = torch.Generator().manual_seed(CASES.index(case))
    hidden, weights, table = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape, dtype in [
            ((case.num_tokens, case.width), case.dtype),
            ((case.num_tokens, case.active), case.dtype),
            ((NUM_EXPERTS, case.width), case.table_dtype),
        ]
    )
    retrieved = torch.randperm(NUM_EXPERTS, generator=generator)[: case.num_retrieved]
    indices = retrieved[torch.randint(case.num_retrieved, weights.shape, generator=generator)]
    return hidden, weights, indices, table


def double(*tensors):
    return [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]


def assert_rounded_once(actual, expected):
    """That `actual` is the float64 `expected` but for sums in float32 and one rounding to its dtype."""
    assert actual.shape == expected.shape
    # Halfway to the next value; the interpreter, unlike a GPU, truncates to bfloat16.
    distance = 1.01 if actual.dtype == torch.bfloat16 else 0.51
    tolerance = distance * torch.finfo(actual.dtype).eps * expected.abs() + 2e-5
    assert ((actual.double() - expected).abs() <= tolerance).all(), (actual, expected)


def gradient_in_double(case):
    hidden, weights, indices, table = double(*inputs_of(case))
    return torch.autograd.grad(EagerKernels.up(hidden, indices, table.requires_grad_()), table, weights)[0]


def expert_layer(hidden, weights, indices, up_table, down_table, up, down):
    """A layer of experts, and the gradients of a loss in whatever of it has one."""
    leaves = [leaf.clone().requires_grad_() for leaf in (hidden, weights, up_table, down_table)]
    hidden, weights, up_table, down_table = leaves
    output = down(weights * F.gelu(up(hidden, indices, up_table)), indices, down_table)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]


def operator_inputs(table_dtype):
    """`hidden, weights, indices` and the two tables of a layer."""
    generator = torch.Generator().manual_seed(0)
    hidden, weights, up_table, down_table = (
        torch.randn(shape, generator=generator) / math.sqrt(shape[1])
        for shape in ((9, 24), (9, 6), (NUM_EXPERTS, 24), (NUM_EXPERTS, 24))
    )
    indices = torch.randint(NUM_EXPERTS // 2, (9, 6), generator=generator)
    return hidden, weights, indices, up_table.to(table_dtype), down_table.to(table_dtype)


OPERATOR_RUNS = list(itertools.product((torch.float32, torch.bfloat16), (False, True)))


# What follows up to `main` runs in the process with the interpreter. It only computes; tests compare.


def run_case(case):
    """What every function returns, and whether every launch kept to its tensors."""
    from triton.runtime.interpreter import InterpreterBuilder

    hidden, weights, indices, table = inputs_of(case)
    launch, load = expert_kernels_triton._launch, InterpreterBuilder.create_masked_load
    results = {"kept edges": True, "read inside": True}

    def launch_amid_edges(kernel, programs, *arguments, **blocks):
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        inside = [amid_edges(tensor) if tensor.is_floating_point() else tensor for tensor in tensors]
        ranges = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in inside]
        replaced = iter(inside)
        arguments = [next(replaced) if isinstance(argument, torch.Tensor) else argument for argument in arguments]

        def load_inside(builder, pointers, mask, *options):
            read = pointers.data[mask.data]
            results["read inside"] &= bool(np.any([(start <= read) & (read < end) for start, end in ranges], 0).all())
            return load(builder, pointers, mask, *options)

        with mock.patch.object(InterpreterBuilder, "create_masked_load", load_inside):
            launch(kernel, programs, *arguments, **blocks)
        for tensor, copy in zip(tensors, inside, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)
                results["kept edges"] &= has_kept_edges(copy)

    with mock.patch.object(expert_kernels_triton, "_launch", launch_amid_edges):
        for by_expert in (False, True):
            with mock.patch.object(expert_kernels_triton, "_by_expert", return_value=by_expert):
                results["up", by_expert] = TritonKernels.up(hidden, indices, table)
                results["down", by_expert] = TritonKernels.down(weights, indices, table)
        results["rows"], results["values"] = TritonKernels.row_gradient(weights, hidden, indices, table.dtype)
        results["out"] = torch.zeros_like(table)
        nothing = TritonKernels.row_gradient(weights, hidden, indices, table.dtype, out=results["out"])
    assert nothing is None
    return results


def run_transposed():
    """Tensors that are not contiguous."""
    hidden, weights, indices, table = (tensor.T.contiguous().T for tensor in inputs_of(CASES[2]))
    rows, values = TritonKernels.row_gradient(weights, hidden, indices, table.dtype)
    return {
        "up": TritonKernels.up(hidden, indices, table),
        "down": TritonKernels.down(weights, indices, table),
        "rows": rows,
        "values": values,
    }


def run_large_table():
    """The last two rows of tables of more than 2^31 elements; nothing else of them is ever touched."""
    table, gradient = (torch.from_numpy(np.zeros((2**25 + 8, 64), np.float16)) for _ in range(2))
    last = len(table) - 1
    table[last], table[last - 1] = 2, 3
    indices, ones = torch.tensor([[last, 0], [last - 1, last]]), torch.ones(2, 64)
    results = {}
    for by_expert in (False, True):
        with mock.patch.object(expert_kernels_triton, "_by_expert", return_value=by_expert):
            results["up", by_expert] = TritonKernels.up(ones, indices, table)
            results["down", by_expert] = TritonKernels.down(ones[:, :2], indices, table)
    TritonKernels.row_gradient(ones[:, :2], ones, indices, torch.float16, out=gradient)
    results["gradient"] = gradient[-2:].clone()
    return results


def run_operators(table_dtype, sparse):
    """Through the operators, by the name in a configuration."""

    def up(hidden, indices, table):
        return expert_up(hidden, indices, table, resolve_kernels("triton", table), sparse)

    def down(weights, indices, table):
        return expert_down(weights, indices, table, resolve_kernels("triton", table), sparse)

    return expert_layer(*operator_inputs(table_dtype), up, down)


def main(file):
    results = {
        "cases": [run_case(case) for case in CASES],
        "transposed": run_transposed(),
        "large table": run_large_table(),
        "operators": {run: run_operators(*run) for run in OPERATOR_RUNS},
        "unavailable": [
            TritonKernels.unavailable_reason(torch.empty(2, 2, dtype=dtype)) for dtype in (torch.half, torch.double)
        ],
    }
    torch.save(results, file)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """What `main` computed, in a process of its own."""
    file = tmp_path_factory.mktemp("triton") / "results.pt"
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, file]
    finished = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return torch.load(file, weights_only=False)


@pytest.fixture
def results(interpreted, case):
    return interpreted["cases"][CASES.index(case)]


@needs_triton
@each_case
@both_algorithms
def test_up(results, case, by_expert):
    hidden, _, indices, table = inputs_of(case)
    assert results["up", by_expert].dtype == case.dtype
    assert_rounded_once(results["up", by_expert], EagerKernels.up(*double(hidden, indices, table)))


@needs_triton
@each_case
@both_algorithms
def test_down(results, case, by_expert):
    _, weights, indices, table = inputs_of(case)
    assert results["down", by_expert].dtype == case.dtype
    assert_rounded_once(results["down", by_expert], EagerKernels.down(*double(weights, indices, table)))


@needs_triton
@each_case
def test_row_gradient(results, case):
    expected, rows = gradient_in_double(case), inputs_of(case)[2].unique()
    assert results["rows"].equal(rows)
    assert results["values"].dtype == results["out"].dtype == case.table_dtype
    assert_rounded_once(results["values"], expected[rows])
    assert_rounded_once(results["out"], expected)


@needs_triton
@each_case
def test_launches_keep_to_their_tensors(results, case):
    assert results["kept edges"]
    assert results["read inside"]


@needs_triton
def test_tensors_need_not_be_contiguous(interpreted):
    hidden, weights, indices, table = double(*inputs_of(CASES[2]))
    results, expected = interpreted["transposed"], gradient_in_double(CASES[2])
    assert_rounded_once(results["up"], EagerKernels.up(hidden, indices, table))
    assert_rounded_once(results["down"], EagerKernels.down(weights, indices, table))
    assert_rounded_once(results["values"], expected[results["rows"]])


@needs_triton
@both_algorithms
def test_table_of_more_than_2_31_elements(interpreted, by_expert):
    results = interpreted["large table"]
    assert results["up", by_expert].tolist() == [[128, 0], [192, 128]]
    assert results["down", by_expert].tolist() == [[2] * 64, [5] * 64]
    assert results["gradient"].tolist() == [[1] * 64, [2] * 64]


@needs_triton
@pytest.mark.parametrize("table_dtype, sparse", OPERATOR_RUNS)
def test_operators_forward_and_backward(interpreted, table_dtype, sparse):
    inputs = operator_inputs(table_dtype)
    expected = expert_layer(*double(*inputs), EagerKernels.up, EagerKernels.down)
    for actual, reference in zip(interpreted["operators"][table_dtype, sparse], expected, strict=True):
        if actual.shape == inputs[-1].shape:
            assert actual.is_sparse == sparse
            assert actual.dtype == table_dtype
        if actual.is_sparse:
            assert actual.is_coalesced() and actual.indices()[0].equal(inputs[2].unique())
            actual = actual.to_dense()
        assert_rounded_once(actual, reference)


@needs_triton
def test_unavailable_reason_of_dtype(interpreted):
    of_half, of_double = interpreted["unavailable"]
    assert of_half is None
    assert of_double == (
        "Triton kernels support ['torch.bfloat16', 'torch.float16', 'torch.float32'], the experts are torch.float64."
    )


@needs_triton
def test_unavailable_reason_of_device():
    table = torch.empty(2, 2)
    assert TritonKernels.unavailable_reason(table) == "Triton kernels are for a GPU, the experts are on cpu."
    with pytest.raises(RuntimeError, match="for a GPU"):
        resolve_kernels("triton", table)


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("without_triton", expert_kernels_triton.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TritonKernels.unavailable_reason(torch.empty(2, 2)) == "Triton is not installed."


@pytest.mark.parametrize(
    "num_tokens, active, num_rows, width, by_expert",
    [
        pytest.param(1, 128, 2**20, 1024, False, id="generation"),
        pytest.param(4096, 128, 2**16, 1024, True, id="many-tokens-per-row"),
        pytest.param(4096, 128, 2**20, 1024, False, id="few-tokens-per-row"),
        pytest.param(4096, 128, 2**12, 1024, False, id="table-in-cache"),
        pytest.param(2**17, 128, 2**16, 1024, False, id="tokens-not-in-cache"),
    ],
)
def test_choice_of_algorithm(num_tokens, active, num_rows, width, by_expert):
    indices = torch.empty(num_tokens, active, dtype=torch.int64, device="meta")
    table = torch.empty(num_rows, width, dtype=torch.bfloat16, device="meta")
    assert expert_kernels_triton._by_expert(indices, table) == by_expert


@pytest.fixture
def launches(monkeypatch):
    """Recorded, not made: `(kernel, arguments, blocks)`."""
    launches = []

    def launch(kernel, programs, *arguments, **blocks):
        launches.append((kernel, arguments, blocks))

    monkeypatch.setattr(expert_kernels_triton, "_launch", launch)
    return launches


@needs_triton
def test_no_atomics_where_determinism_is_asked_for(launches, monkeypatch):
    monkeypatch.setattr(expert_kernels_triton, "_by_expert", lambda *_: True)
    _, weights, indices, table = inputs_of(CASES[0])
    TritonKernels.down(weights, indices, table)
    torch.use_deterministic_algorithms(True)
    try:
        TritonKernels.down(weights, indices, table)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [kernel.__name__ for kernel, *_ in launches] == ["_down_by_expert", "_down_by_token"]


def compile_launch(kernel, arguments, blocks, capability):
    """A kernel as a launch of these arguments would have it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.runtime.jit import mangle_type

    signature, constants, attributes = {}, {}, {}
    for position, (name, value) in enumerate(zip(kernel.arg_names, [*arguments, *blocks.values()], strict=True)):
        constant = name in blocks or value is None or (isinstance(value, int) and value == 1)
        signature[name] = "constexpr" if constant else mangle_type(value)
        if constant:
            constants[position,] = value
        elif isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return compile(source, target=GPUTarget("cuda", capability, 32))


@needs_triton
@pytest.mark.parametrize(
    "sizes, dtype, capability",
    [
        ((2, 32, 512), torch.float32, 90),
        ((2, 32, 512), torch.bfloat16, 80),
        ((2, 7, 130), torch.bfloat16, 90),
        ((2, 7, 130), torch.float16, 80),
        ((1, 1, 1), torch.float32, 80),
    ],
    ids=str,
)
def test_kernels_compile(launches, monkeypatch, tmp_path, capability, dtype, sizes):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    num_tokens, active, width = sizes
    hidden, weights, table = (
        torch.zeros(shape, dtype=dtype) for shape in ((num_tokens, width), (num_tokens, active), (4, width))
    )
    indices = torch.zeros(num_tokens, active, dtype=torch.int64)
    for by_expert in (False, True):
        monkeypatch.setattr(expert_kernels_triton, "_by_expert", mock.Mock(return_value=by_expert))
        TritonKernels.up(hidden, indices, table)
        TritonKernels.down(weights, indices, table)
    TritonKernels.row_gradient(weights, hidden, indices, dtype)
    TritonKernels.row_gradient(weights, hidden, indices, dtype, out=torch.zeros(table.shape, dtype=dtype))
    assert len(launches) == 6
    for kernel, arguments, blocks in launches:
        compiled = compile_launch(kernel, arguments, blocks, capability)
        ptx = compiled.asm["ptx"]
        assert f".target sm_{capability}" in ptx
        assert compiled.asm["cubin"].startswith(b"\x7fELF")
        # Rows are read 16 bytes at a time, where they are aligned to that.
        assert ("ld.global.v4.b32" in ptx) == (width == 512)
        # Interpreted, bfloat16 is truncated. Compiled, it is rounded; atomics accumulate in float32.
        assert ("cvt.rn.bf16" in ptx) == (dtype == torch.bfloat16 and kernel.__name__ != "_down_by_expert")


if __name__ == "__main__":
    main(*sys.argv[1:])
