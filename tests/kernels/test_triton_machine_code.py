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
"""What Triton's compiler makes of the kernels: no spills, few registers, and loads of 16 bytes where rows are aligned."""

import platform
from typing import NamedTuple

import pytest
import torch
from triton_compiler import compile_launch, missing_target, recorded_launches

from modeling_peer import expert_kernels_triton
from modeling_peer.expert_kernels_triton import TritonKernels
from modeling_peer.factored_gradient import Entries, EntryGroups, Factors
from modeling_peer.optim import row_adamw_triton
from modeling_peer.product_key_retrieval_triton import _select_pairs_of, score_halves, select


# Where its wheels are, Triton is a part of the test environment, and its absence a failure.
pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Triton is for Linux, on x86-64."
)


class Target(NamedTuple):
    capability: int
    dtype: torch.dtype
    width: int

    def __str__(self):
        return f"sm_{self.capability}-{str(self.dtype).removeprefix('torch.')}-d{self.width}"


TARGETS = [
    Target(90, torch.bfloat16, 2048),
    Target(90, torch.float32, 512),
    Target(80, torch.bfloat16, 520),  # a multiple of 8 but not of 16
    Target(80, torch.float32, 1),
    Target(100, torch.float16, 130),
    Target(100, torch.bfloat16, 1024),
]

# Bytes of a load of a row at most.
ALIGNED = {target: target.width % 8 == 0 for target in TARGETS}


@pytest.fixture(params=TARGETS, ids=str)
def target(request, monkeypatch, tmp_path):
    reason = missing_target(request.param.capability)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return request.param


def compiled(launches, target, folder):
    return {launch[0].__name__: compile_launch(launch, target.capability, folder) for launch in launches}


def has_wide_loads(code):
    """Loads of 16 bytes, or of 32."""
    return any(f"ld.global.{kind}" in code.ptx for kind in ("v4.b32", "v2.b64", "v8.b32", "v4.b64"))


def assert_code(code, most_registers, wide_loads=None):
    assert code.spilled_bytes == 0
    assert code.registers <= most_registers
    if wide_loads is not None:
        assert has_wide_loads(code) == wide_loads


@pytest.mark.parametrize("many", [False, True], ids=["few-tokens", "many-tokens"])
def test_halves(target, many, monkeypatch, tmp_path):
    monkeypatch.setattr(expert_kernels_triton, "MANY_TOKENS", 0 if many else 100)
    hidden, weights, table = (
        torch.zeros(shape, dtype=target.dtype) for shape in ((2, target.width), (2, 32), (4, target.width))
    )
    indices = torch.zeros(2, 32, dtype=torch.int64)
    launches = recorded_launches(
        lambda: (TritonKernels.up(hidden, indices, table), TritonKernels.down(weights, indices, table))
    )
    codes = compiled(launches, target, tmp_path)
    assert codes.keys() == {"_up", "_down"}
    for code in codes.values():
        assert_code(code, 128, ALIGNED[target])
        # Interpreted, bfloat16 is truncated. Compiled, it is rounded.
        assert ("cvt.rn.bf16" in code.ptx) == (target.dtype == torch.bfloat16)


def factors_of(target):
    indices = torch.zeros(2, 32, dtype=torch.int64)
    entries = Entries(indices, 4, "torch")
    entries.groups = EntryGroups(*(torch.zeros(size, dtype=torch.int32) for size in (4, 5, 64, 64)))
    return Factors.of(torch.zeros(2, 32), torch.zeros(2, target.width, dtype=target.dtype), entries)


def test_gradients(target, tmp_path):
    factors = factors_of(target)

    def run():
        out, places = torch.zeros(4, target.width, dtype=target.dtype), factors.entries.groups.rows
        TritonKernels.row_gradient(*factors.in_groups(), out, places)
        TritonKernels.squared_norm(*factors.in_groups())

    codes = compiled(recorded_launches(run), target, tmp_path)
    assert codes.keys() == {"_sum_chunk", "_row_gradient", "_squared_norm"}
    for code in codes.values():
        assert_code(code, 128, ALIGNED[target])


@pytest.mark.parametrize("second_moment", ["full", "row"])
def test_steps(target, second_moment, tmp_path):
    table = torch.zeros(4, target.width, dtype=target.dtype)
    second = torch.zeros(4, target.width if second_moment == "full" else 1)
    state = {"row_steps": torch.zeros(4, dtype=torch.int32), "exp_avg": torch.zeros(table.shape), "exp_avg_sq": second}
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "rounding_seed": 3}
    launches = recorded_launches(lambda: row_adamw_triton.update_by_factors(table, state, factors_of(target), group))
    code = compiled(launches, target, tmp_path)["_step_row"]
    assert_code(code, 128, ALIGNED[target])
    assert ("st.global.v4.b32" in code.ptx or "st.global.v8.b32" in code.ptx) == ALIGNED[target]


@pytest.mark.parametrize("size, k", [(1024, 16), (1000, 32)])
def test_retrieval(target, size, k, tmp_path):
    queries, sub_keys = torch.zeros(8, 2, 2, 128), torch.zeros(1, 2, size, 128)
    indices, scores = torch.zeros(8, 2, k, dtype=torch.int64), torch.zeros(8, 2, k)

    def run():
        _select_pairs_of(*select(score_halves(queries, sub_keys), k), indices, scores)

    codes = compiled(recorded_launches(run), target, tmp_path)
    assert codes.keys() == {"_score", "_select", "_select_pairs"}
    assert_code(codes["_score"], 255)
    assert "tf32" in codes["_score"].ptx
    assert_code(codes["_select"], 168)
    assert_code(codes["_select_pairs"], 128)
