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
from kernel_cases import IMPLEMENTATIONS, ROUNDING
from table_gradients import dense, literal_rows, random_parts
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.testing import assert_close

from modeling_peer import RowAdamW
from modeling_peer.ops.experts import run_expert_pool
from modeling_peer.ops.factored_gradient import MOST_FACTORS, FactoredGradient
from modeling_peer.ops.gradient_factors import Assignments, Factors


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

    @pytest.mark.parametrize(
        "share", [torch.clone, lambda g: FactoredGradient(g, []).add_(g), lambda g: FactoredGradient(g, []).copy_(g)]
    )
    @pytest.mark.parametrize("is_viewed", [False, True])
    def test_others_are_independent(self, share, is_viewed):
        """Also if what is shared is dense, as it is once there was a view of it."""
        for which in (0, 1):
            for change in (
                torch.Tensor.zero_,
                lambda g: g.mul_(2),
                lambda g: g.add_(g),
                lambda g: g.clamp_(-1, 1),
                lambda g: g[:20].zero_(),
            ):
                gradient, exact = random_gradient()
                view = gradient[:20] if is_viewed else None
                pair = gradient, share(gradient)
                changed = exact.clone()
                change(pair[which])
                change(changed)
                for found, expected in ((pair[1 - which], exact), (pair[which], changed)):
                    assert_close(dense(found).double(), expected, rtol=1e-5, atol=1e-5)
                    assert isinstance(found, FactoredGradient) or is_viewed
                assert view is None or torch.equal(view, dense(gradient)[:20])

    @pytest.mark.parametrize("is_viewed", [False, True])
    def test_views_see_all_that_is_written(self, is_viewed):
        """Later backwards among it, by whichever of them, as views of a dense gradient do."""
        (gradient, exact), (more, its_exact) = random_gradient(0), random_gradient(1)
        views = [(rows, gradient[rows]) for rows in (slice(0, 20), slice(20, 40))] if is_viewed else []
        shared = [gradient, gradient.detach(), gradient.data]
        for change in (
            lambda g, other: g.mul_(0.5),
            lambda g, other: g.add_(other),
            lambda g, other: torch._foreach_mul_([g], 0.25),
            lambda g, other: g.zero_(),
            lambda g, other: g.copy_(other),
        ):
            for each in shared:
                change(each, more)
                change(exact, its_exact)
                for found in shared:
                    assert_near(found, exact)
                for rows, view in views:
                    assert_close(view.double(), exact[rows], rtol=1e-5, atol=1e-5)
        for rows, view in views:
            view.fill_(2.0)
            exact[rows] = 2
            assert_near(gradient, exact)
        for mask in (torch.arange(NUM_ROWS) % 2 == 0, torch.arange(NUM_ROWS) < 10):
            gradient.norm()  # what was grouped before has no part in it
            gradient.zero_rows(mask)
            exact[mask] = 0
            assert_near(gradient, exact)
        gradient.set_factors(more._sum.factors)
        for found in (*shared, torch.cat([view for _, view in views]) if views else gradient):
            assert_close(dense(found).double(), its_exact, rtol=1e-5, atol=1e-5)
        assert gradient.is_finite() and gradient.norm() > 0


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
@pytest.mark.parametrize("start", [None, "dense", "factored"])
def test_accumulates_over_backwards(kernels, start):
    """On a gradient that was dense, and before one that is, too."""
    generator = torch.Generator().manual_seed(0)
    table = nn.Parameter(torch.randn(NUM_ROWS, WIDTH, generator=generator))
    _optimizer = RowAdamW([{"params": [table], "rows": True}])
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


@pytest.mark.parametrize("which", ["input", "gradient", "weights", "rows"])
def test_writes_to_what_factors_share_are_noticed(which):
    """The layer's input, its router indices and the gradient of its output: who writes there gets an error."""
    table = nn.Parameter(torch.randn(NUM_ROWS, WIDTH))
    optimizer = RowAdamW([{"params": [table], "rows": True}])
    rows, hidden, direction = torch.randint(NUM_ROWS, (4, 3)), torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    weights = torch.randn(4, 3)
    up, down = (table, table.detach()) if which == "input" else (None, table)
    run_expert_pool(hidden, rows, weights, up, None, down, nn.Identity(), "cpu").backward(direction)
    expected = table.grad.to_rows()
    clone = table.grad.clone()
    {"input": direction, "gradient": hidden, "weights": hidden, "rows": hidden}[which].zero_()  # is not shared
    assert torch.equal(clone.to_rows(), expected)
    assert (clone.detach().cpu().numpy() == expected.numpy()).all()  # as loggers of histograms do
    {"input": hidden, "gradient": direction, "weights": weights, "rows": rows}[which].zero_()
    for use in (FactoredGradient.to_rows, torch.Tensor.norm, lambda g: g.mul(2), FactoredGradient.is_finite):
        with pytest.raises(RuntimeError, match="written in place"):
            use(table.grad)
    with pytest.raises(RuntimeError, match="written in place"):
        optimizer.step()


def test_factors_let_the_graph_behind_them_go():
    table, hidden = nn.Parameter(torch.randn(NUM_ROWS, WIDTH)), torch.randn(4, WIDTH, requires_grad=True) * 2
    _optimizer = RowAdamW([{"params": [table], "rows": True}])
    rows, weights = torch.randint(NUM_ROWS, (4, 3)), torch.randn(4, 3)
    run_expert_pool(hidden, rows, weights, table, None, table.detach(), nn.Identity(), "cpu").sum().backward()
    assert table.grad.factors.tokens.grad_fn is None


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
            torch.norm,
            torch.Tensor.norm,
            lambda g: g.norm(2),
            lambda g: g.norm(p=2),
            lambda g: g.data.norm(2),
            lambda g: g.norm(p=1),
        ):
            assert_close(norm(gradient).double(), norm(exact), rtol=1e-5, atol=0)
        assert not notices


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


@pytest.mark.parametrize(
    "place, value",
    [(None, None), *itertools.product(("coefficients", "tokens", "bias"), (math.inf, -math.inf, math.nan))],
)
def test_a_gradient_scaler_skips_steps_that_are_not_finite(place, value, notices):
    table, bias = nn.Parameter(torch.randn(NUM_ROWS, WIDTH)), nn.Parameter(torch.zeros(3))
    optimizer = RowAdamW([{"params": [table], "rows": True}, {"params": [bias]}], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    gradient, exact = random_gradient()
    table.grad, bias.grad = gradient * 1024.0, torch.full((3,), 512.0)
    if place == "bias":
        bias.grad[1] = value
    elif place is not None:
        with_value(table, place, value)
    before = [parameter.detach().clone() for parameter in (table, bias)]
    scaler.unscale_(optimizer)
    if place is None:
        assert_near(table.grad, exact)
        assert bias.grad.tolist() == [0.5] * 3
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == (512.0 if place else 1024.0)
    assert torch.equal(table.ne(before[0]).any(1), exact.ne(0).any(1) & (place is None))
    assert torch.equal(bias, before[1]) == bool(place) == (not optimizer.state)
    assert not notices


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


def write_some(gradient):
    gradient[:20] = 0
    gradient[3] = torch.arange(WIDTH)
    gradient[20:25].mul_(2)
    gradient.T[4].fill_(0.5)
    for row in gradient.unbind()[30:33]:
        row.add_(1)
    gradient.detach()[35:].zero_()
    return gradient


class TestWrites:
    """What is written to parts of a gradient is the gradient from then on."""

    @pytest.mark.parametrize("dtype", ROUNDING, ids=str)
    def test_one_after_another(self, dtype):
        gradient, _ = random_gradient(dtype=dtype)
        expected = write_some(gradient.to_rows())
        assert write_some(gradient) is gradient
        assert isinstance(gradient, FactoredGradient)
        assert torch.equal(gradient.to_rows(), expected) and gradient.is_finite()
        gradient[0] = math.nan
        assert not gradient.is_finite()

    @pytest.mark.parametrize("how", ["hook", "gradient"])
    def test_reach_a_step(self, how):
        def freeze(gradient):
            gradient = gradient.clone()
            gradient[:20] = 0
            return gradient

        table = nn.Parameter(torch.randn(NUM_ROWS, WIDTH))
        optimizer = RowAdamW([{"params": [table], "rows": True}])
        if how == "hook":
            table.register_hook(freeze)
        indices = torch.arange(NUM_ROWS).view(4, 10)
        run_expert_pool(None, indices, torch.ones(4, 10), None, None, table, None, "cpu").sum().backward()
        if how == "gradient":
            table.grad[:20] = 0
        before = table.detach().clone()
        optimizer.step()
        assert table.ne(before).any(1).tolist() == [False] * 20 + [True] * 20


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [math.inf, math.nan])
class TestFrozenRows:
    """Rows whose gradient was zeroed stay zero, whatever tokens name them."""

    FROZEN = torch.arange(NUM_ROWS) % 2 == 0

    def gradient(self, kernels, value):
        """Its first token is not finite, and names frozen rows alone."""
        parts, finite = random_parts(0, NUM_ROWS, WIDTH, [(5, 3), (40, 20)], kernels=kernels), []
        for place, part in enumerate(parts):
            coefficients, tokens = part.coefficients, part.tokens.clone()
            part.assignments.rows[0] = part.assignments.rows[0] // 2 * 2
            tokens[0] = 0
            finite.append(Factors(coefficients, tokens, part.assignments).without(self.FROZEN))
            tokens = tokens.clone()
            tokens[0] = value
            parts[place] = Factors(coefficients, tokens, part.assignments)
        gradient = FactoredGradient(torch.empty(NUM_ROWS, WIDTH), parts)
        gradient.zero_rows(self.FROZEN)
        return gradient, literal_rows(finite, NUM_ROWS, WIDTH)

    def test_rows_and_norms(self, kernels, value):
        gradient, exact = self.gradient(kernels, value)
        assert_near(gradient, exact)
        assert not gradient.to_rows()[self.FROZEN].any() and exact[~self.FROZEN].any(1).all()
        for order in ORDERS:
            assert_close(gradient.norm(order).double(), torch.linalg.vector_norm(exact, order), rtol=1e-5, atol=0)
        gradient.set_factors([gradient.factors.summed()])
        assert_near(gradient, exact)

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
