# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Every implementation of the experts against the literal one in float64, and which of them runs."""

import time

import pytest
import torch
from kernel_cases import IMPLEMENTATIONS, experts, literal_down, literal_up
from tiny_models import random_tokens, tiny_config, tiny_model

from modeling_peer import PeerConfig, RowAdamW, expert_parameter_groups
from modeling_peer.feed_forward import PeerFeedForward
from modeling_peer.ops import kernels_torch
from modeling_peer.ops.gradient_factors import Assignments, Factors
from modeling_peer.ops.kernels import KERNELS, resolve_kernels
from modeling_peer.ops.kernels_cpu import CpuKernels


# A unit in the last place of what is stored; sums are taken in more.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}

# tokens, active experts, width, experts. The first has several vectors, one vector and a rest in each row, for
# registers of any width; the others have no token, one token, width 1, far more repeats than experts, and more
# experts than one pass of a radix sort tells apart.
SHAPES = [(33, 16, 150, 50), (0, 6, 24, 36), (1, 128, 512, 1000), (5, 1, 1, 1), (300, 12, 64, 7), (40, 8, 3, 3000)]
CASES = [(torch.float32, shape) for shape in SHAPES]
CASES += [(dtype, SHAPES[0]) for dtype in TOLERANCES if dtype != torch.float32]


def assert_near(actual, expected, terms, dtype):
    """`expected` in float64; `terms` bounds the sum of the sizes of what was added up."""
    assert actual.dtype == dtype
    bound = (
        TOLERANCES[dtype] * expected.abs().clamp(min=torch.finfo(dtype).tiny)
        + 2 * TOLERANCES[torch.promote_types(dtype, torch.float32)] * terms
    )
    assert ((actual.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype, shape", CASES, ids=str)
@pytest.mark.parametrize("name, threads", [("torch", 1), ("cpu", 1), ("cpu", 2)], indirect=["threads"])
class TestImplementations:
    @pytest.fixture(autouse=True)
    def small_pieces(self, monkeypatch):
        """Torch operations run in several pieces, as they do for many tokens."""
        monkeypatch.setattr(kernels_torch, "PIECE_SIZE", 5000)

    def test_up(self, name, threads, shape, dtype):
        hidden_states, _, indices, table = experts(*shape, dtype)
        terms = literal_up(hidden_states.abs(), indices, table.abs())
        actual = KERNELS[name].up(hidden_states, indices, table)
        assert_near(actual, literal_up(hidden_states, indices, table), terms, dtype)

    def test_down(self, name, threads, shape, dtype):
        _, weights, indices, table = experts(*shape, dtype)
        terms = literal_down(weights.abs(), indices, table.abs())
        actual = KERNELS[name].down(weights, indices, table)
        assert_near(actual, literal_down(weights, indices, table), terms, dtype)

    def test_row_gradient(self, name, threads, shape, dtype):
        tokens, coefficients, indices, table = experts(*shape, dtype)
        exact, sizes = torch.zeros(table.shape).double(), torch.zeros(table.shape).double()
        for t in range(shape[0]):
            for a in range(shape[1]):
                product = coefficients[t, a].double() * tokens[t].double()
                exact[indices[t, a]] += product
                sizes[indices[t, a]] += product.abs()
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
        exact_norm = exact.square().sum()
        assert (
            abs(norm - exact_norm) <= 4 * TOLERANCES[torch.promote_types(dtype, torch.float32)] * sizes.square().sum()
        )

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
    up = KERNELS[name].up(hidden_states, indices, table)
    down = KERNELS[name].down(weights, indices, table)
    assert up.dtype == down.dtype == tokens_dtype
    tolerance = {"rtol": 2**-7, "atol": 2**-7}
    torch.testing.assert_close(up.double(), literal_up(hidden_states, indices, table), **tolerance)
    torch.testing.assert_close(down.double(), literal_down(weights, indices, table), **tolerance)


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
    hidden_states, weights, indices, table = experts(8, 5, 24, 36, torch.float64)
    kernels = KERNELS[name]
    strided = [torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in (hidden_states, weights, indices, table)]
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert torch.equal(kernels.up(strided[0], strided[2], strided[3]), kernels.up(hidden_states, indices, table))
    assert torch.equal(kernels.down(strided[1], strided[2], strided[3]), kernels.down(weights, indices, table))
    rows = Factors(weights, hidden_states, Assignments(indices, len(table), name)).to_rows(torch.float64)
    assert torch.equal(
        Factors(strided[1], strided[0], Assignments(strided[2], len(table), name)).to_rows(torch.float64), rows
    )


@pytest.mark.parametrize("index", [-1, 36])
def test_an_index_outside_of_the_table_is_refused(index):
    hidden_states, weights, indices, table = experts(3, 5, 24, 36, torch.float32)
    indices[1, 2] = index
    for run in (
        lambda: CpuKernels.up(hidden_states, indices, table),
        lambda: CpuKernels.down(weights, indices, table),
        lambda: CpuKernels.group(indices.flatten(), 36),
    ):
        with pytest.raises(IndexError, match=f"got {index}"):
            run()


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


class TestNothingElseReachesC:
    """What C would misread, it never gets: it checks nothing, and reads what an address points to."""

    UP = CpuKernels.up, ("hidden_states", "indices", "table")
    DOWN = CpuKernels.down, ("weights", "indices", "table")
    GRADIENT = CpuKernels.row_gradient, ("coefficients", "sources", "starts", "hidden_states", "out", "places")
    NORM = CpuKernels.squared_norm, ("coefficients", "sources", "starts", "hidden_states")

    @staticmethod
    def arguments(names, changes):
        hidden_states, weights, indices, table = experts(5, 6, 24, 36, torch.float32)
        values = {"hidden_states": hidden_states, "weights": weights, "indices": indices, "table": table}
        rows, starts, order = CpuKernels.group(indices.flatten(), 36)
        values |= {"starts": starts, "places": rows}
        values |= {"coefficients": weights.flatten()[order], "sources": order // 6, "out": torch.zeros(36, 24)}
        values |= changes
        return [values[name] for name in names]

    @pytest.mark.parametrize(
        "function, changes, message",
        [
            (UP, {"hidden_states": torch.randn(3, 24)}, "`hidden_states`"),
            (UP, {"hidden_states": torch.randn(5, 20)}, "`hidden_states`"),
            (UP, {"hidden_states": torch.randn(5, 24, device="meta")}, "`hidden_states`"),
            (UP, {"table": torch.randn(36, 24, 1)}, "`table`"),
            (UP, {"table": torch.ones(36, 24, dtype=torch.int64)}, "`table`"),
            (UP, {"table": torch.randn(36, 24).to_sparse()}, "`table`"),
            (UP, {"indices": torch.zeros(5, 6, dtype=torch.int32)}, "`rows`"),
            (UP, {"indices": torch.zeros(30, dtype=torch.int64)}, "`rows`"),
            (DOWN, {"weights": torch.randn(5, 7)}, "`weights`"),
            (DOWN, {"weights": torch.randn(5, 6, device="meta")}, "`weights`"),
        ],
    )
    def test_refused(self, function, changes, message):
        run, names = function
        with pytest.raises(ValueError, match=message):
            run(*self.arguments(names, changes))

    @pytest.mark.parametrize("function", [UP, DOWN, GRADIENT, NORM], ids=["up", "down", "row_gradient", "norm"])
    @pytest.mark.parametrize("which", [0, 2])
    def test_tensors_without_memory(self, function, which):
        run, names = function
        arguments = self.arguments(names, {})
        arguments[which] = freed(arguments[which])
        with pytest.raises(RuntimeError, match="memory|not allocated"):
            run(*arguments)


class TestRegistry:
    def test_on_a_cpu_auto_is_cpu(self):
        """Otherwise the suite would not test what users run. A compiler is a part of this project's environment."""
        for dtype in TOLERANCES:
            assert resolve_kernels(None, torch.empty(1, 1, dtype=dtype)) == "cpu"

    def test_auto_takes_what_any_device_has(self):
        assert resolve_kernels(None, torch.empty(1, 1, device="meta")) == "torch"
        assert resolve_kernels(None, torch.empty(1, 1, dtype=torch.complex64)) == "torch"

    def test_one_that_cannot_run_is_refused_by_name(self):
        with pytest.raises(RuntimeError):
            resolve_kernels("triton", torch.empty(1, 1))
        with pytest.raises(RuntimeError):
            resolve_kernels("cpu", torch.empty(1, 1, device="meta"))

    @pytest.mark.parametrize("name", ["auto", "torch", "cpu"])
    def test_a_model_does_not_depend_on_it(self, name):
        model = tiny_model(tiny_config("peer", "pkm", gated_experts=True)).double().train()
        tokens = random_tokens(3, 9)
        outcomes = []
        for kernels in ("eager", name):
            model.config.expert_kernels = kernels
            model.zero_grad()
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            outcomes.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        for actual, expected in zip(*outcomes, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


# Forward and backward of a layer with 512² experts, 256 tokens of width 256, one thread: literal time over C time.
GAIN = 11


@pytest.mark.parametrize("threads", [1], indirect=True)
def test_c_is_faster_than_literal(threads):
    """A fifth of what was measured must stay, on any machine and under any load."""
    config = PeerConfig(hidden_size=256, num_attention_heads=4, num_experts=512**2)
    layer = PeerFeedForward(config, 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)

    optimizer = RowAdamW(expert_parameter_groups(layer, 1e-3))  # gradients in C come in factors

    def seconds(kernels):
        config.expert_kernels = kernels
        optimizer.zero_grad()
        start = time.perf_counter()
        layer(torch.randn(1, 256, 256)).square().sum().backward()
        return time.perf_counter() - start

    times = [(seconds("eager"), seconds("cpu")) for _ in range(7)][2:]
    literal, compiled = (sorted(column)[2] for column in zip(*times, strict=True))
    assert literal / compiled > GAIN / 5
