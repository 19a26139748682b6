# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Random tokens and experts for the tests of kernels, and what they are held against."""

import os
import platform
import shutil
from pathlib import Path

import pytest
import torch

from modeling_peer.ops import kernels_cpu, native


IMPLEMENTATIONS = ["torch", "cpu"]
# Where its wheels are, Triton is a part of the test environment, and its absence a failure.
needs_triton = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Triton is for Linux, on x86-64."
)
TRITON = pytest.param("triton", marks=pytest.mark.interpreted)  # beside them, in its interpreter

# A unit in the last place of what is stored; sums are taken in more.
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def experts(num_tokens, active, width, num_experts, dtype, seed=0):
    """hidden states, weights, rows, table"""
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(num_tokens, width, generator=generator).to(dtype)
    weights = torch.randn(num_tokens, active, generator=generator).to(dtype)
    rows = torch.randint(num_experts, (num_tokens, active), generator=generator)
    return hidden_states, weights, rows, torch.randn(num_experts, width, generator=generator).to(dtype)


def literal_up(hidden_states, rows, table):
    """`hidden[t] · table[rows[t, a]]`, in float64."""
    return torch.einsum("td,tad->ta", hidden_states.double(), table.double()[rows])


def literal_down(weights, rows, table):
    """`Σ_a weights[t, a] table[rows[t, a]]`, in float64."""
    return torch.einsum("ta,tad->td", weights.double(), table.double()[rows])


def assert_near(actual, expected, terms, dtype):
    """`expected` in float64; `terms` bounds the sum of the sizes of what was added up."""
    assert actual.dtype == dtype and actual.shape == expected.shape
    rounded = torch.finfo(dtype).eps / 2 * expected.abs().clamp(min=torch.finfo(dtype).tiny)
    bound = rounded + 2 * ROUNDING[torch.promote_types(dtype, torch.float32)] * terms
    assert ((actual.double() - expected).abs() <= bound).all()


def assert_halves_near(kernels, hidden_states, weights, rows, table, exact):
    """Both halves of experts on kernels against literal ones; `exact` is what a quantized table means."""
    for run, literal, tokens in ((kernels.up, literal_up, hidden_states), (kernels.down, literal_down, weights)):
        terms = literal(tokens.abs(), rows, exact.abs())
        assert_near(run(tokens, rows, table), literal(tokens, rows, exact), terms, tokens.dtype)


def retrieve_as_compiled_with(flags: str, patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let retrieval in C be that of a library of its own, which is compiled with these flags in addition."""
    sources = folder / "csrc"
    sources.mkdir()
    for name in ("common.h", "selection.h", "retrieval.c"):
        shutil.copy(native.SOURCES / name, sources)
    patch.setattr(native.constants, "HF_HOME", str(folder))
    patch.setenv("CC", f"{os.environ.get('CC') or 'cc'} {flags}")
    library = native.load_library(sources)
    assert library is not None
    for module in (native, kernels_cpu):
        patch.setattr(module, "load_library", lambda: library)
