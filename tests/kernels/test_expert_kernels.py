# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Every implementation of the experts against the literal one in float64, and which of them runs."""

import pytest
import torch
from kernel_cases import IMPLEMENTATIONS, ROUNDING, TRITON, assert_halves_near, assert_near, experts
from table_gradients import literal_rows

from modeling_peer.ops import kernels_torch
from modeling_peer.ops.gradient_factors import Assignments, Factors
from modeling_peer.ops.kernels import KERNELS, resolve_kernels
from modeling_peer.ops.quantized_rows import quantize


# tokens, active experts, width, experts. The first has several vectors, one vector and a rest in each row, for
# registers of any width; the others have no token, one token, width 1, far more repeats than experts, and more
# experts than one pass of a radix sort tells apart.
SHAPES = [(33, 16, 150, 50), (0, 6, 24, 36), (1, 128, 512, 1000), (5, 1, 1, 1), (300, 12, 64, 7), (40, 8, 3, 3000)]
CASES = [(torch.float32, shape) for shape in SHAPES]
CASES += [(dtype, SHAPES[0]) for dtype in ROUNDING if dtype != torch.float32]


@pytest.mark.parametrize("dtype, shape", CASES, ids=str)
@pytest.mark.parametrize("name, threads", [("torch", 1), ("cpu", 1), ("cpu", 2)], indirect=["threads"])
class TestImplementations:
    @pytest.fixture(autouse=True)
    def small_pieces(self, monkeypatch):
        """Torch operations run in several pieces, as they do for many tokens."""
        monkeypatch.setattr(kernels_torch, "PIECE_SIZE", 5000)

    def test_up_and_down(self, name, threads, shape, dtype):
        hidden_states, weights, indices, table = experts(*shape, dtype)
        assert_halves_near(KERNELS[name], hidden_states, weights, indices, table, table)

    def test_row_gradient(self, name, threads, shape, dtype):
        tokens, coefficients, indices, table = experts(*shape, dtype)
        factors = Factors(coefficients, tokens, Assignments(indices, len(table), name))
        exact = literal_rows([factors], *table.shape)
        sizes = literal_rows([Factors(coefficients.abs(), tokens.abs(), factors.assignments)], *table.shape)
        kernels = KERNELS[name]
        rows, starts, order = kernels.group(indices.flatten(), len(table))
        assert {tensor.dtype for tensor in (rows, starts, order)} == {torch.int32}
        assert torch.equal(rows.long(), indices.unique())
        by_group = coefficients.flatten()[order], (order // max(shape[1], 1)).int(), starts, tokens
        values = tokens.new_full((len(rows), shape[2]), torch.nan)
        kernels.row_gradient(*by_group, values)
        assert_near(values, exact[rows.long()], sizes[rows.long()], dtype)
        out = torch.zeros_like(table)
        kernels.row_gradient(*by_group, out, rows)
        assert_near(out, exact, sizes, dtype)
        norm = kernels.squared_norm(*by_group)
        assert norm.dtype == torch.float64 and norm.shape == ()
        error, bound = abs(norm - exact.square().sum()), 4 * sizes.square().sum()
        assert error <= ROUNDING[torch.promote_types(dtype, torch.float32)] * bound

    def test_group(self, name, threads, shape, dtype):
        """Rows ascend, and so do the assignments of each; every assignment is in the group of the row that it names."""
        indices = experts(*shape, dtype)[2].flatten()
        rows, starts, order = KERNELS[name].group(indices, shape[3])
        expected = sorted(range(len(indices)), key=lambda assignment: (indices[assignment].item(), assignment))
        assert order.tolist() == expected
        assert starts[0] == 0 and starts[-1] == len(indices) and (starts.diff() > 0).all()
        groups = torch.repeat_interleave(starts.diff())
        assert torch.equal(rows.long()[groups], indices[order.long()])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "tokens_dtype, table_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_tokens_and_table_may_differ_in_dtype(name, tokens_dtype, table_dtype):
    hidden_states, weights, indices, table = experts(9, 4, 40, 20, torch.float32)
    hidden_states, weights, table = hidden_states.to(tokens_dtype), weights.to(tokens_dtype), table.to(table_dtype)
    assert_halves_near(KERNELS[name], hidden_states, weights, indices, table, table)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_as_torch_rounds(dtype):
    """Every value is read exactly; subnormal, huge and special ones are written as PyTorch rounds them."""
    bits = torch.arange(2**16).to(torch.uint16).view(dtype)
    table = bits[:, None].expand(-1, 33).contiguous()  # a vector, or two, and a rest
    every = torch.arange(2**16)[:, None]
    one = torch.ones(2**16, 1)
    rows = KERNELS["cpu"].down(one, every, table)
    torch.testing.assert_close(rows, table.float(), rtol=0, atol=0, equal_nan=True)

    values = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0)).int()
    values = torch.cat(
        [values.view(torch.float32), bits.float(), torch.tensor([65519.9, 65520.0, 2**-25, 3 * 2**-26])]
    )
    tokens = values[:, None].expand(-1, 33).contiguous()
    every = torch.arange(len(values))[:, None]
    rounded = Factors(torch.ones_like(values)[:, None], tokens, Assignments(every, len(values), "cpu")).to_rows(dtype)
    torch.testing.assert_close(rounded, tokens.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_tokens_need_not_be_contiguous(name):
    found = []
    for strides in (torch.Tensor.contiguous, lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 0]):
        hidden_states, weights, indices, table = map(strides, experts(8, 5, 24, 36, torch.float64))
        assert table.is_contiguous() == (not found)
        rows = Factors(weights, hidden_states, Assignments(indices, 36, name)).to_rows(torch.float64)
        kernels = KERNELS[name]
        found.append([kernels.up(hidden_states, indices, table), kernels.down(weights, indices, table), rows])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("index", [-1, 20])
@pytest.mark.parametrize("quantization", [None, (8, None), (4, 16)], ids=str)
@pytest.mark.parametrize("name", ["cpu", TRITON])
def test_an_index_outside_of_the_table_is_refused(name, quantization, index, monkeypatch):
    """By a GPU on demand."""
    monkeypatch.setenv("MODELING_PEER_CHECK_INDICES", "1")
    hidden_states, weights, indices, table = experts(3, 4, 24, 20, torch.float32)
    table = table if quantization is None else quantize(table, *quantization)
    indices[1, 2] = index
    kernels = KERNELS[name]
    for run in (
        lambda: kernels.up(hidden_states, indices, table),
        lambda: kernels.down(weights, indices, table),
        lambda: kernels.group(indices.flatten(), 20),
    ):
        with pytest.raises(IndexError, match=f"got {index}"):
            run()


def test_names():
    """Unless it is named, it is C on a CPU, of whose environment a compiler is a part: that is what users run."""
    for dtype in ROUNDING:
        assert resolve_kernels(None, torch.empty(1, 1, dtype=dtype)) == "cpu"
    assert resolve_kernels(None, torch.empty(1, 1, device="meta")) == "torch"
    assert resolve_kernels(None, torch.empty(1, 1, dtype=torch.complex64)) == "torch"
    for name, device in (("triton", "cpu"), ("cpu", "meta")):
        with pytest.raises(RuntimeError, match=f'`expert_kernels="{name}"` cannot run here'):
            resolve_kernels(name, torch.empty(1, 1, device=device))
