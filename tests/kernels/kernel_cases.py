# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Random tokens and experts for the tests of kernels, and what they are held against."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from modeling_peer.ops import kernels_cpu, native


IMPLEMENTATIONS = ["torch", "cpu"]


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
