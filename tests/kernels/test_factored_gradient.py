# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Gradients in factors are the dense ones, whatever is done to them."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from kernel_cases import IMPLEMENTATIONS
from table_gradients import dense, literal_rows, random_parts
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.testing import assert_close

from modeling_peer import RowAdamW
from modeling_peer.ops.experts import run_expert_pool
from modeling_peer.ops.factored_gradient import MOST_FACTORS, FactoredGradient
from modeling_peer.ops.gradient_factors import Assignments, Factors
from modeling_peer.ops.kernels_cpu import CpuKernels


# A unit in the last place of what is stored; sums are taken in more.
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
ORDERS = (2.0, 1.0, math.inf)

NUM_ROWS, WIDTH = 40, 19  # no multiple of the size of a vector


def random_gradient(seed=0, dtype=torch.float32, shapes=((5, 3), (7, 2)), kernels="cpu"):
    """A gradient of several parts, and the dense one in float64."""
    parts = random_parts(seed, NUM_ROWS, WIDTH, list(shapes), dtype, kernels)
    table = torch.empty(NUM_ROWS, WIDTH, dtype=dtype)
    return FactoredGradient(table, parts), literal_rows(parts, NUM_ROWS, WIDTH)


def assert_near(gradient, expected):
    """That a float32 gradient is in factors, and is the `expected` one in float64."""
    assert isinstance(gradient, FactoredGradient)
    assert_close(gradient.to_rows().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def notices(monkeypatch):
    """What is said about operators that are not done on factors."""
    found = []
    monkeypatch.setattr("modeling_peer.ops.factored_gradient.logger.warning_once", found.append)
    return found


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("kernels, threads", [("torch", 1), ("cpu", 1), ("cpu", 2)], indirect=["threads"])
def test_rows_and_norms(kernels, threads, dtype):
    for seed in range(20):
        generator = torch.Generator().manual_seed(1000 + seed)

        def draw(*choices, generator=generator):
            return choices[int(torch.randint(len(choices), (), generator=generator))]

        num_rows, width = draw(1, 2, 7, 300, 3000), draw(1, 3, 8, 17, 64, 130, 150)
        shapes = [(draw(0, 1, 2, 9, 40), draw(1, 2, 5, 16)) for _ in range(draw(0, 1, 1, 2, 3))]
        parts = random_parts(seed, num_rows, width, shapes, dtype, kernels)
        gradient = FactoredGradient(torch.empty(num_rows, width, dtype=dtype), parts)
        expected = literal_rows(parts, num_rows, width)
        sizes = [Factors(each.coefficients.abs(), each.tokens.abs(), each.assignments) for each in parts]
        of_sums = 4 * ROUNDING[torch.promote_types(dtype, torch.float32)] * literal_rows(sizes, num_rows, width)
        rows = gradient.to_rows()
        assert rows.dtype == dtype
        of_rows = of_sums + ROUNDING[dtype] * expected.abs()
        assert ((rows.double() - expected).abs() <= of_rows + torch.finfo(dtype).tiny).all()
        for order, errors in zip(ORDERS, (of_sums, of_rows, of_rows), strict=True):
            norm = gradient.norm(order)
            assert norm.dtype == torch.promote_types(dtype, torch.float32) and norm.shape == ()
            exact = torch.linalg.vector_norm(expected, order)
            bound = torch.linalg.vector_norm(errors, order) + 1e-6 * exact * (dtype != torch.float64)
            assert abs(norm.double() - exact) <= bound + 1e-14 * exact


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
def test_a_gradient_without_assignments_is_zero(kernels):
    table = torch.empty(NUM_ROWS, WIDTH)
    for parts in ([], random_parts(0, NUM_ROWS, WIDTH, [(0, 3), (4, 0)], kernels=kernels), [Factors.empty(table)]):
        gradient = FactoredGradient(table, parts)
        assert torch.equal(gradient.to_rows(), torch.zeros_like(table))
        assert [gradient.norm(order) for order in ORDERS] == [0, 0, 0]
        assert gradient.is_finite()


class TestArithmetic:
    def test_sums(self):
        (first, exact), (second, other) = random_gradient(0), random_gradient(1, shapes=[(3, 4)])
        assert_near(first + second, exact + other)
        assert_near(torch.add(first, second, alpha=-2), exact - 2 * other)
        assert_near(first, exact)
        assert first.add_(second, alpha=3) is first
        assert_near(first, exact + 3 * other)
        first += second
        assert_near(first, exact + 4 * other)
        assert_near(second, other)

    @pytest.mark.parametrize("factor", [-3, torch.tensor(0.25)], ids=str)
    def test_products_and_quotients(self, factor):
        for operate in (
            lambda g: g * factor,
            lambda g: factor * g,
            lambda g: g / factor,
            lambda g: g.clone().mul_(factor),
            lambda g: g.clone().div_(factor),
        ):
            gradient, exact = random_gradient()
            assert_near(operate(gradient), operate(exact))
            assert_near(gradient, exact)
        gradient *= factor
        assert_near(gradient, factor * exact)

    def test_zeros(self):
        gradient, exact = random_gradient()
        assert gradient.zero_() is gradient
        assert_near(gradient, torch.zeros_like(exact))
        gradient += random_gradient()[0]
        assert_near(gradient, exact)

    def test_a_clone_is_independent(self):
        for change in (torch.Tensor.zero_, lambda g: g.mul_(2), lambda g: g.add_(g), lambda g: g.clamp_(-1, 1)):
            for which in (0, 1):
                gradient, exact = random_gradient()
                pair = gradient, gradient.clone()
                change(pair[which])
                assert_near(pair[1 - which], exact)
                assert_near(pair[which], change(exact.clone()))

    @pytest.mark.parametrize("share", [torch.Tensor.detach, lambda g: g.data], ids=["detach", "data"])
    def test_views_share(self, share):
        gradient, exact = random_gradient()
        share(gradient).mul_(2)
        assert_near(gradient, 2 * exact)
        gradient.mul_(3)
        assert_near(share(gradient), 6 * exact)


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
@pytest.mark.parametrize("start", [None, "dense", "factored"])
def test_accumulates_over_backwards(kernels, start):
    """On a gradient that was dense, and before one that is, too."""
    generator = torch.Generator().manual_seed(0)
    table = nn.Parameter(torch.randn(NUM_ROWS, WIDTH, generator=generator))
    optimizer = RowAdamW([{"params": [table], "rows": True}])
    literal = nn.Parameter(table.detach().double())
    if start is not None:
        gradient, exact = random_gradient(3)
        table.grad = gradient if start == "factored" else gradient.to_rows()
        literal.grad = exact
    for step in range(6):
        tokens = torch.randn(4, WIDTH, generator=generator)
        weights, rows = torch.randn(4, 3, generator=generator), torch.randint(NUM_ROWS, (4, 3), generator=generator)
        for _ in range(2):
            output = run_expert_pool(None, rows, weights, None, None, table, None, kernels)
            (output * tokens).sum().backward()
        table[step].sum().backward()
        (2 * torch.einsum("ta,td,tad->", weights.double(), tokens.double(), literal[rows])).backward()
        literal[step].sum().backward()
        assert isinstance(table.grad, FactoredGradient) == (start == "factored" or start is None)
        assert_close(dense(table.grad).double(), literal.grad, rtol=1e-5, atol=1e-5)
    assert optimizer.param_groups


class TestWhatFactorsShare:
    """The input of the layer, and the gradient of its output: who writes there gets an error, and no wrong gradient."""

    @pytest.mark.parametrize("which", ["input", "gradient", "weights"])
    def test_writes_are_noticed(self, which):
        table = nn.Parameter(torch.randn(NUM_ROWS, WIDTH))
        optimizer = RowAdamW([{"params": [table], "rows": True}])
        rows, hidden, direction = torch.randint(NUM_ROWS, (4, 3)), torch.randn(4, WIDTH), torch.randn(4, WIDTH)
        weights = torch.randn(4, 3)
        up = table if which == "input" else None
        run_expert_pool(
            hidden, rows, weights, up, None, table.detach() if up is table else table, nn.Identity(), "cpu"
        ).backward(direction)
        expected = table.grad.to_rows()
        clone = table.grad.clone()
        for tensor in {"input": [direction], "gradient": [hidden], "weights": [hidden]}[which]:
            tensor.zero_()  # is not shared
        assert torch.equal(clone.to_rows(), expected)
        {"input": hidden, "gradient": direction, "weights": weights}[which].zero_()
        for use in (FactoredGradient.to_rows, torch.Tensor.norm, lambda g: g.mul(2), FactoredGradient.is_finite):
            with pytest.raises(RuntimeError, match="written in place"):
                use(table.grad)
        with pytest.raises(RuntimeError, match="written in place"):
            optimizer.step()

    def test_a_model_trains_on_a_buffer_that_is_filled_again(self):
        """Its layers get tensors of their own."""
        table, projection = nn.Parameter(torch.randn(NUM_ROWS, WIDTH)), nn.Linear(WIDTH, WIDTH)
        optimizer = RowAdamW([{"params": [table], "rows": True}])
        buffer, rows, weights = torch.empty(4, WIDTH), torch.randint(NUM_ROWS, (4, 3)), torch.randn(4, 3)
        expected = torch.zeros_like(table)
        for _ in range(3):
            buffer.normal_()
            hidden = projection(buffer)
            run_expert_pool(hidden, rows, weights, table, None, table.detach(), nn.Identity(), "cpu").sum().backward()
            exact = torch.einsum("ta,td->tad", weights * table.detach()[rows].sum(-1), hidden.detach())
            expected.index_add_(0, rows.flatten(), exact.flatten(0, 1))
        assert_close(table.grad.to_rows(), expected, rtol=1e-4, atol=1e-4)
        optimizer.step()


class TestLists:
    """What `torch.optim` and gradient clipping do to all gradients at once."""

    @pytest.fixture
    def tensors(self):
        """Two dense tensors and two gradients in factors by turns, and all of them dense in float64."""
        (first, exact), (second, other) = random_gradient(0), random_gradient(1, shapes=[(3, 4)])
        ones, range_ = torch.ones(3), torch.arange(6.0).view(2, 3)
        return [ones, first, range_, second], [ones.double(), exact, range_.double(), other]

    @pytest.mark.parametrize(
        "operate",
        [
            lambda list_: torch._foreach_mul_(list_, 0.5),
            lambda list_: torch._foreach_mul_(list_, torch.tensor(0.5)),
            lambda list_: torch._foreach_div_(list_, 3.0),
            lambda list_: torch._foreach_div_(list_, torch.tensor(3.0)),
            torch._foreach_zero_,
        ],
    )
    def test_in_place(self, tensors, operate, notices):
        found, expected = tensors
        operate(found)
        operate(expected)
        for actual, exact in zip(found, expected, strict=True):
            assert_close(dense(actual).double(), exact, rtol=1e-5, atol=1e-5)
        assert [isinstance(each, FactoredGradient) for each in found] == [False, True, False, True]
        assert not notices
        operate(found[1::2])  # of factored ones alone
        operate(expected[1::2])
        assert_near(found[3], expected[3])

    @pytest.mark.parametrize("order", ORDERS)
    def test_norms(self, tensors, order, notices):
        found, expected = (torch._foreach_norm(each, order) for each in tensors)
        assert_close(torch.stack(found).double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
        for actual, exact in zip(tensors[0][1::2], expected[1::2], strict=True):
            assert_close(torch.linalg.vector_norm(actual, order).double(), exact, rtol=1e-5, atol=1e-5)
        assert torch.linalg.vector_norm(tensors[0][1], dtype=torch.float64).dtype == torch.float64
        assert not notices

    def test_norms_as_they_are_logged(self, notices):
        gradient, exact = random_gradient()
        for norm in (
            gradient.norm(),
            gradient.norm(2),
            gradient.norm(p=2),
            gradient.data.norm(2),
            torch.norm(gradient),
        ):
            assert_close(norm.double(), exact.norm(), rtol=1e-5, atol=0)
        assert_close(gradient.norm(p=1).double(), exact.norm(p=1), rtol=1e-5, atol=0)
        assert not notices
        assert_close(gradient.norm(p=2, dim=1).double(), exact.norm(p=2, dim=1), rtol=1e-5, atol=1e-6)
        assert notices


def with_value(table, part, value):
    """Give a gradient in factors an element of this value, in its coefficients or tokens."""
    first, *others = table.grad._sum.factors
    parts = {"coefficients": first.coefficients.clone(), "tokens": first.tokens.clone()}
    parts["coefficients"][0] = 1.0  # of the first token
    parts[part][0, 0] = value
    table.grad.set_factors([Factors(**parts, assignments=first.assignments), *others])


class TestClipping:
    @staticmethod
    def parameters(dtype=torch.float32):
        """A table whose gradient is in factors, one whose gradient is dense, and a copy of both with dense ones."""
        table, bias = nn.Parameter(torch.zeros(NUM_ROWS, WIDTH, dtype=dtype)), nn.Parameter(torch.zeros(3))
        other, other_bias = nn.Parameter(table.detach().clone()), nn.Parameter(torch.zeros(3))
        table.grad, _ = random_gradient(dtype=dtype)
        bias.grad = torch.full((3,), 0.5)
        other.grad, other_bias.grad = table.grad.to_rows(), bias.grad.clone()
        return [table, bias], [other, other_bias]

    @pytest.mark.parametrize("foreach", [True, False])
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("most", [0.1, 1e3])
    def test_by_norm(self, most, order, foreach, notices):
        found, expected = self.parameters()
        norms = [clip_grad_norm_(each, most, order, foreach=foreach) for each in (found, expected)]
        assert_close(*norms)
        assert isinstance(found[0].grad, FactoredGradient)
        for parameter, other in zip(found, expected, strict=True):
            assert_close(dense(parameter.grad), other.grad)
        assert not notices
        after = torch.linalg.vector_norm(torch.stack([each.grad.norm(order) for each in found]), order)
        assert_close(after, torch.minimum(norms[0], torch.tensor(most)), rtol=1e-4, atol=0)

    @pytest.mark.parametrize("foreach", [True, False])
    @pytest.mark.parametrize("part", ["coefficients", "tokens"])
    def test_of_what_is_not_finite(self, part, foreach):
        for value in (math.inf, math.nan):
            found, _ = self.parameters()
            with_value(found[0], part, value)
            with pytest.raises(RuntimeError, match="non-finite"):
                clip_grad_norm_(found, 1.0, error_if_nonfinite=True, foreach=foreach)
            norm = clip_grad_norm_(found, 1.0, foreach=foreach)
            assert not norm.isfinite()
            assert found[1].grad.isnan().all() if math.isnan(value) else not found[1].grad.any()

    @pytest.mark.parametrize("foreach", [True, False])
    def test_by_value(self, foreach, notices):
        found, expected = self.parameters()
        for each in (found, expected):
            clip_grad_value_(each, 0.4, foreach=foreach)
        assert isinstance(found[0].grad, FactoredGradient)
        for parameter, other in zip(found, expected, strict=True):
            assert_close(dense(parameter.grad), other.grad, rtol=0, atol=0)
        assert dense(found[0].grad).abs().max() == torch.tensor(0.4)
        assert notices


class TestGradientScaler:
    @staticmethod
    def scaled():
        """A table with a scaled gradient in factors, a bias with a dense one, their optimizer and its scaler."""
        table, bias = nn.Parameter(torch.randn(NUM_ROWS, WIDTH)), nn.Parameter(torch.zeros(3))
        optimizer = RowAdamW([{"params": [table], "rows": True}, {"params": [bias]}], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.zeros(()))
        gradient, exact = random_gradient()
        table.grad, bias.grad = gradient * 1024.0, torch.full((3,), 512.0)
        return table, bias, exact, optimizer, scaler

    def test_unscales(self, notices):
        table, bias, exact, optimizer, scaler = self.scaled()
        scaler.unscale_(optimizer)
        assert_near(table.grad, exact)
        assert bias.grad.tolist() == [0.5] * 3
        before = table.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 1024.0
        assert torch.equal(table.ne(before).any(1), exact.ne(0).any(1))
        assert not notices

    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    @pytest.mark.parametrize("place", ["coefficients", "tokens", "bias"])
    def test_skips_a_step_that_is_not_finite(self, place, value):
        table, bias, _, optimizer, scaler = self.scaled()
        if place == "bias":
            bias.grad[1] = value
        else:
            with_value(table, place, value)
        before = [parameter.detach().clone() for parameter in (table, bias)]
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 512.0
        assert torch.equal(table, before[0]) and torch.equal(bias, before[1])
        assert not optimizer.state


class TestOtherOperators:
    """They run on the dense gradient, and what they write is factored again."""

    @pytest.mark.parametrize(
        "operate",
        [
            torch.abs,
            lambda g: g[3:5],
            lambda g: g - torch.ones(WIDTH),
            lambda g: torch.ones(WIDTH).to(g.dtype) * g,
            lambda g: torch.stack([g, g]),
            lambda g: torch.ones(NUM_ROWS, WIDTH).to(g.dtype).add_(g, alpha=2),
            lambda g: torch.linalg.vector_norm(g, dim=1),
            lambda g: g @ torch.ones(WIDTH, 2).to(g.dtype),
            lambda g: g * g,
        ],
    )
    def test_out_of_place(self, operate, notices):
        gradient, exact = random_gradient()
        found = operate(gradient)
        assert type(found) is torch.Tensor
        assert_close(found.double(), operate(exact), rtol=1e-5, atol=1e-4)
        assert_near(gradient, exact)
        assert notices

    @pytest.mark.parametrize(
        "operate",
        [
            torch.Tensor.abs_,
            lambda g: g.clamp_(-0.3, 0.3),
            lambda g: g.mul_(torch.arange(NUM_ROWS)[:, None]),
            lambda g: g.copy_(torch.ones(NUM_ROWS, WIDTH)),
            lambda g: g.addcmul_(g, g, value=0.1),
            lambda g: g.index_fill_(0, torch.tensor([1, 2]), 0.0),
            lambda g: torch.sub(g, 1.0, out=g),
        ],
    )
    def test_in_place(self, operate, notices):
        gradient, exact = random_gradient()
        view = gradient.detach()
        assert operate(gradient) is gradient
        assert_near(gradient, operate(exact))
        assert_near(view, exact)
        assert len(notices) >= 1

    def test_views_see_later_backwards(self):
        """As those of a dense gradient do."""
        (gradient, exact), (more, its_exact) = random_gradient(0), random_gradient(1)
        view, alias = gradient[:20], gradient.detach()
        for change in (
            lambda g, other: g.add_(other),
            lambda g, other: g.mul_(0.5),
            lambda g, other: torch._foreach_mul_([g], 3.0),
            lambda g, other: g.zero_(),
            lambda g, other: g.copy_(other),
        ):
            change(gradient, more)
            change(exact, its_exact)
            assert_near(gradient, exact)
            assert_near(alias, exact)
            assert_close(view.double(), exact[:20], rtol=1e-5, atol=1e-5)
        mask = torch.arange(NUM_ROWS) % 2 == 0
        gradient.zero_rows(mask)
        assert not view[::2].any() and view[1::2].any()
        gradient.set_factors(random_gradient(2)[0]._sum.factors)
        assert_close(view.double(), random_gradient(2)[1][:20], rtol=1e-5, atol=1e-5)
        assert gradient.is_finite() and gradient.norm() > 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_copies_and_files_are_dense(self, dtype):
        gradient, _ = random_gradient(dtype=dtype)
        file = io.BytesIO()
        torch.save({"gradient": gradient}, file)
        file.seek(0)
        for found in (
            copy.deepcopy(gradient),
            copy.deepcopy([gradient, gradient])[1],
            pickle.loads(pickle.dumps(gradient)),
            torch.load(file, weights_only=True)["gradient"],
        ):
            assert type(found) is torch.Tensor
            assert torch.equal(found, gradient.to_rows())
        first, second = copy.deepcopy([gradient, gradient])
        assert first is second
        assert repr(gradient) == f"FactoredGradient(shape=(40, 19), dtype={dtype}, num_tokens=12)"

    @pytest.mark.parametrize(
        "optimizer_class",
        [
            lambda tables: RowAdamW([{"params": tables, "rows": True}]),
            torch.optim.AdamW,
            lambda tables: torch.optim.AdamW(tables, foreach=True),
            lambda tables: torch.optim.AdamW(tables, fused=True),
        ],
    )
    def test_zeroed_by_an_optimizer(self, optimizer_class, notices):
        table, other = (nn.Parameter(torch.zeros(NUM_ROWS, WIDTH)) for _ in range(2))
        optimizer = optimizer_class([table, other])
        table.grad, other.grad = random_gradient()[0], torch.ones(NUM_ROWS, WIDTH)
        optimizer.zero_grad(set_to_none=False)
        assert_near(table.grad, torch.zeros(NUM_ROWS, WIDTH).double())
        assert not other.grad.any()
        assert not notices
        optimizer.zero_grad()
        assert table.grad is None


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [math.inf, math.nan])
class TestFrozenRows:
    """Rows whose gradient was zeroed stay zero, whatever tokens name them."""

    FROZEN = torch.arange(NUM_ROWS) % 2 == 0

    def gradient(self, kernels, value):
        """Its first token is not finite, and names frozen rows alone."""
        parts, finite = random_parts(0, NUM_ROWS, WIDTH, [(5, 3), (40, 20)], kernels=kernels), []
        for place, part in enumerate(parts):
            tokens = part.tokens.clone()
            part.assignments.rows[0] = part.assignments.rows[0] // 2 * 2
            tokens[0] = 0
            finite.append(Factors(part.coefficients, tokens, part.assignments).without(self.FROZEN))
            tokens = tokens.clone()
            tokens[0] = value
            parts[place] = Factors(part.coefficients, tokens, part.assignments)
        gradient = FactoredGradient(torch.empty(NUM_ROWS, WIDTH), parts)
        gradient.zero_rows(self.FROZEN)
        return gradient, literal_rows(finite, NUM_ROWS, WIDTH)

    def test_rows_and_norms(self, kernels, value):
        gradient, exact = self.gradient(kernels, value)
        assert_near(gradient, exact)
        assert not gradient.to_rows()[self.FROZEN].any() and exact[~self.FROZEN].any(1).all()
        for order in ORDERS:
            assert_close(gradient.norm(order).double(), torch.linalg.vector_norm(exact, order), rtol=1e-5, atol=0)

    def test_that_one_assignment_names(self, kernels, value):
        tokens = torch.tensor([[value], [2.0], [3.0]]).expand(3, WIDTH)
        assignments = Assignments(torch.tensor([[0], [1], [3]]), NUM_ROWS, kernels)
        gradient = FactoredGradient(torch.empty(NUM_ROWS, WIDTH), [Factors(torch.ones(3, 1), tokens, assignments)])
        gradient.zero_rows(self.FROZEN)
        for order in ORDERS:
            exact = torch.linalg.vector_norm(torch.tensor([2.0, 3.0]).repeat(WIDTH), order)
            assert_close(gradient.norm(order), exact)

    @pytest.mark.parametrize("compiled", [True, False])
    def test_a_step_leaves_them(self, kernels, value, compiled, monkeypatch):
        if not compiled:
            monkeypatch.setattr("modeling_peer.optim.row_adamw_cpu.can_update", lambda *tensors: False)
        gradient, _ = self.gradient(kernels, value)
        table = nn.Parameter(torch.randn(NUM_ROWS, WIDTH))
        before = table.detach().clone()
        optimizer = RowAdamW([{"params": [table], "rows": True}])
        table.grad = gradient
        optimizer.step()
        assert torch.equal(table.ne(before).any(1), ~self.FROZEN) and table.isfinite().all()
        assert torch.equal(optimizer.state[table]["row_steps"] > 0, ~self.FROZEN)

    def test_after_they_were_summed(self, kernels, value):
        gradient, exact = self.gradient(kernels, value)
        gradient.set_factors([gradient.factors.summed()])
        assert_near(gradient, exact)


class TestFolding:
    """Factors that take much more memory than the rows that they sum to are summed."""

    def test_of_many_backwards_to_a_small_table(self):
        rows = NUM_ROWS * WIDTH * 4
        gradient, exact, sizes = FactoredGradient(torch.empty(NUM_ROWS, WIDTH), []), 0, []
        for seed in range(32):
            more, its_exact = random_gradient(seed, shapes=[(15, 3)])
            gradient += more
            exact = exact + its_exact
            sizes.append(sum(part.nbytes for part in gradient._sum.factors))
            if seed % 5 == 0:
                assert_near(gradient, exact)  # as a norm does, it joins what is there so far
        assert_near(gradient, exact)
        assert sizes[0] < max(sizes) <= MOST_FACTORS * rows
        assert 32 * sizes[0] > 8 * max(sizes)
        assert any(later < earlier for earlier, later in itertools.pairwise(sizes))

    def test_not_while_factors_take_less(self):
        gradient, parts = FactoredGradient(torch.empty(10**6, WIDTH), []), []
        for seed in range(32):
            parts += random_parts(seed, 10**6, WIDTH, [(3, 40)])
            gradient += FactoredGradient(gradient, parts[-1:])
        assert all(found is part for found, part in zip(gradient._sum.factors, parts, strict=True))

    def test_assignments_of_the_tables_of_a_pool_are_grouped_once(self, monkeypatch):
        calls, group, counts = [], CpuKernels.group, []
        monkeypatch.setattr(CpuKernels, "group", lambda *args: calls.append(1) or group(*args))
        for num_tables in (1, 3):
            calls.clear()
            gradients = [FactoredGradient(torch.empty(NUM_ROWS, WIDTH), []) for _ in range(num_tables)]
            exact = [torch.zeros(NUM_ROWS, WIDTH, dtype=torch.float64) for _ in range(num_tables)]
            for seed in range(12):
                parts = random_parts(seed, NUM_ROWS, WIDTH, [(30, 2)] * 3)
                assignments = Assignments(parts[0].assignments.rows, NUM_ROWS, "cpu")
                for gradient, its_exact, part in zip(gradients, exact, parts, strict=False):
                    part = Factors(part.coefficients, part.tokens, assignments)
                    gradient += FactoredGradient(gradient, [part])
                    its_exact += literal_rows([part], NUM_ROWS, WIDTH)
            for gradient, its_exact in zip(gradients, exact, strict=True):
                assert_near(gradient, its_exact)
                gradient.norm()
            counts.append(len(calls))
        assert counts[0] == counts[1] > 1


def test_only_what_the_mask_holds_is_zeroed_when_it_changes():
    """The coefficients of a mask are its own, whatever was grouped or summed before."""
    gradient, _ = random_gradient(shapes=[(30, 4)])
    gradient.norm()
    held = torch.arange(NUM_ROWS) < 10
    for mask in (held, held.roll(10)):
        parts = [part.without(mask) for part in gradient._sum.factors]
        gradient.zero_rows(mask)
        assert_near(gradient, literal_rows(parts, NUM_ROWS, WIDTH))
        assert not gradient.to_rows()[mask].any()
    assert gradient.to_rows()[20:].any()
