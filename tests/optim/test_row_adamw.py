# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""`RowAdamW` is AdamW on the rows that a step touched, and leaves all others as they are, to the bit."""

import copy
import io
import itertools
import math
import pickle
import re
import warnings

import pytest
import torch
from row_tables import (
    ADAMW_OPTIONS,
    DTYPES,
    NUM_ROWS,
    OPTIONS,
    WIDTH,
    assert_same,
    copied,
    random_gradients,
    random_table,
    rows_of,
    take_steps,
)
from table_gradients import in_factors
from torch import nn
from torch.testing import assert_close

from modeling_peer import RowAdamW, expert_parameter_groups
from modeling_peer.ops import native
from modeling_peer.ops.factored_gradient import FactoredGradient, takes_factors
from modeling_peer.ops.gradient_factors import Assignments, Factors
from modeling_peer.optim.stochastic_rounding import ROUNDED, random_bits, round_stochastically


# What makes a gradient of each layout from a dense one.
LAYOUTS = {"dense": torch.clone, "factored": in_factors}


class LiteralAdamW:
    """
    AdamW on each row by itself, by Python's floats; between steps the table is in its own dtype, and rounded with the
    random numbers of the optimizer.
    """

    def __init__(self, table, second_moment="full", first_moment="full"):
        self.table, self.dtype, self.second_moment = table.tolist(), table.dtype, second_moment
        self.betas = (OPTIONS["betas"][0] if first_moment else 0.0, OPTIONS["betas"][1])
        self.m = [[0.0] * len(row) for row in self.table]
        self.v = [[0.0] * len(row) for row in self.table]
        self.t = [0] * len(self.table)

    def step(self, gradient):
        (beta1, beta2), lr = self.betas, OPTIONS["lr"]
        for n, g in enumerate(gradient.tolist()):
            if not any(g):
                continue
            self.t[n] += 1
            squares = [x * x for x in g]
            if self.second_moment == "row":
                squares = [sum(squares) / len(squares)] * len(squares)
            for i, (x, square) in enumerate(zip(g, squares, strict=True)):
                m = self.m[n][i] = beta1 * self.m[n][i] + (1 - beta1) * x
                v = self.v[n][i] = beta2 * self.v[n][i] + (1 - beta2) * square
                m, v = m / (1 - beta1 ** self.t[n]), v / (1 - beta2 ** self.t[n])
                self.table[n][i] -= lr * OPTIONS["weight_decay"] * self.table[n][i]
                self.table[n][i] -= lr * m / (math.sqrt(v) + OPTIONS["eps"])
            moved = torch.tensor([self.table[n]], dtype=torch.float64)
            if self.dtype in ROUNDED:
                bits = random_bits(OPTIONS["rounding_seed"], torch.tensor([n]), torch.tensor([self.t[n]]), len(g))
                moved = round_stochastically(moved.float(), self.dtype, bits)
            self.table[n] = moved[0].to(self.dtype).tolist()


class TestRows:
    @pytest.mark.parametrize("first_moment", ["full", None])
    @pytest.mark.parametrize("second_moment", ["full", "row"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_follow_adamw_row_by_row(self, path, dtype, layout, second_moment, first_moment):
        table = random_table(dtype)
        literal = LiteralAdamW(table, second_moment, first_moment)
        optimizer = rows_of(table, second_moment=second_moment, first_moment=first_moment)
        for gradient in random_gradients(25, dtype):
            before = copied(optimizer, table)
            take_steps(optimizer, table, [LAYOUTS[layout](gradient)])
            literal.step(gradient)
            after = copied(optimizer, table)
            for name, value in before.items():  # rows that a step did not touch stay, to the bit
                moved = after[name].ne(value).view(NUM_ROWS, -1).any(1)
                assert torch.equal(moved, gradient.ne(0).any(1)), name
        state = optimizer.state[table]
        exact = dtype == torch.float64
        tolerance = {"rtol": 1e-11, "atol": 1e-13} if exact else {"rtol": 2e-5, "atol": 1e-6}
        of_table = tolerance if dtype.itemsize > 2 else {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-3}
        assert_close(table.detach().double(), torch.tensor(literal.table, dtype=torch.float64), **of_table)
        assert state["row_steps"].tolist() == literal.t
        assert len(set(literal.t)) > 3
        assert literal.t[-1] == 0
        assert state["exp_avg_sq"].dtype == (torch.float64 if exact else torch.float32)
        assert state["exp_avg_sq"].shape == (NUM_ROWS, WIDTH if second_moment == "full" else 1)
        second = torch.tensor(literal.v, dtype=torch.float64)[:, : state["exp_avg_sq"].shape[1]]
        assert_close(state["exp_avg_sq"].double(), second, **tolerance)
        assert ("exp_avg" in state) == (first_moment is not None)
        if first_moment is not None:
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype
            assert_close(state["exp_avg"].double(), torch.tensor(literal.m, dtype=torch.float64), **tolerance)

    @pytest.mark.parametrize("betas", [None, (0.0, 0.0), (0.0, 0.9), (0.9, 0.0)])
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_equal_adamw_where_all_are_touched(self, path, dtype, layout, betas):
        table, other = random_table(dtype), random_table(dtype)
        options = ADAMW_OPTIONS | ({} if betas is None else {"betas": betas, "eps": 1e-3})
        gradients = [torch.randn(NUM_ROWS, WIDTH, dtype=dtype) for _ in range(20)]
        take_steps(rows_of(table, **options), table, map(LAYOUTS[layout], gradients))
        take_steps(torch.optim.AdamW([other], **options), other, gradients)
        rtol, atol = (1e-12, 1e-14) if dtype == torch.float64 else (1e-5, 1e-6)
        assert_close(table, other, rtol=rtol, atol=atol)

    @pytest.mark.parametrize("second_moment", ["full", "row"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_all_layouts_and_threads_give_the_same(self, path, dtype, second_moment, monkeypatch):
        """Also where the number of rows is no multiple of that of the threads."""
        states = []
        for layout, threads in itertools.product(LAYOUTS.values(), (1, 2, 3)):
            monkeypatch.setattr(native, "num_threads", lambda number=threads: number)
            table = random_table(dtype)
            optimizer = rows_of(table, second_moment=second_moment)
            take_steps(optimizer, table, map(layout, random_gradients(6, dtype)))
            states.append(copied(optimizer, table))
        for state in states[1:]:
            assert_same(state, states[0])

    @pytest.mark.parametrize(
        "layout", [lambda gradient: gradient, FactoredGradient.to_rows], ids=["factored", "dense"]
    )
    def test_rows_of_zeros_are_untouched_and_not_a_number_touches(self, path, layout):
        """Padding retrieves experts too: their rows are in the gradient, all zeros."""
        table = random_table()
        optimizer = rows_of(table)
        take_steps(optimizer, table, [torch.ones_like(table)])
        before = copied(optimizer, table)
        values, rows = torch.zeros(3, WIDTH), torch.tensor([[0], [2], [5]])
        values[1, -1], values[2, 0] = math.nan, -1e-30
        factors = Factors(torch.ones(3, 1), values, Assignments(rows, NUM_ROWS, "cpu"))
        take_steps(optimizer, table, [layout(FactoredGradient(table, [factors]))])
        after = copied(optimizer, table)
        untouched = after["row_steps"] == before["row_steps"]
        assert (~untouched).nonzero()[:, 0].tolist() == [2, 5]
        for name in before:
            assert_same(after[name][untouched], before[name][untouched])
        assert table[2].isnan().tolist() == [False] * (WIDTH - 1) + [True]

    def test_noncontiguous_tables_and_gradients(self, path):
        table = nn.Parameter(random_table(num_rows=WIDTH, width=NUM_ROWS).detach().T)
        other = nn.Parameter(table.detach().clone(memory_format=torch.contiguous_format))
        gradients = list(random_gradients(4))
        take_steps(rows_of(table), table, [gradient.T.contiguous().T for gradient in gradients])
        take_steps(rows_of(other), other, gradients)
        assert_close(table.detach(), other.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_parameters_are_as_with_adamw(dtype):
    """As the fused one to the bit, also after a resume, where both round their state to the dtype of parameters."""
    generator = torch.Generator().manual_seed(4)
    shapes = (5, 7), (13,), (), (2, 3, 4)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    others = copy.deepcopy(parameters)
    optimizer, reference = RowAdamW(parameters, **OPTIONS), torch.optim.AdamW(others, **ADAMW_OPTIONS, fused=True)
    for step in range(8):
        if step == 4:
            optimizer, reference = (reloaded(one) for one in (optimizer, reference))
        for parameter, other in zip(parameters, others, strict=True):
            gradient = torch.randn(parameter.shape, generator=generator).to(dtype)
            parameter.grad, other.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    assert_same(parameters, others)
    for parameter, other in zip(parameters, others, strict=True):
        assert_same(optimizer.state[parameter], reference.state[other])


def reloaded(optimizer):
    """Another optimizer of the same parameters, with the state as it comes from a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    groups = [
        {"params": group["params"], "rows": group["rows"]} if "rows" in group else {"params": group["params"]}
        for group in optimizer.param_groups
    ]
    other = type(optimizer)(groups)
    other.load_state_dict(torch.load(file))
    return other


class TestState:
    @pytest.mark.parametrize("second_moment", ["full", "row"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "copying",
        [reloaded, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))],
        ids=["file", "deepcopy", "pickle"],
    )
    def test_goes_on_to_the_bit(self, dtype, second_moment, copying):
        gradients = [in_factors(gradient) for gradient in random_gradients(10, dtype)]
        straight = random_table(dtype)
        expected = rows_of(straight, second_moment=second_moment)
        take_steps(expected, straight, gradients)
        table = random_table(dtype)
        optimizer = rows_of(table, second_moment=second_moment)
        take_steps(optimizer, table, gradients[:5])
        if dtype == torch.bfloat16:
            assert not torch.equal(
                optimizer.state[table]["exp_avg"], optimizer.state[table]["exp_avg"].bfloat16().float()
            )
        table.grad = None
        other = copying(optimizer)
        (again,) = other.param_groups[0]["params"]
        of_state = torch.promote_types(dtype, torch.float32)
        assert {value.dtype for value in other.state[again].values()} == {torch.int32, of_state}
        take_steps(other, again, gradients[5:])
        assert_same(copied(other, again), copied(expected, straight))

    def test_is_loaded_without_a_copy(self):
        table = random_table(torch.bfloat16)
        optimizer = rows_of(table)
        take_steps(optimizer, table, random_gradients(1, torch.bfloat16))
        state_dict = copy.deepcopy(optimizer.state_dict())
        other = rows_of(table)
        other.load_state_dict(state_dict)
        assert other.state[table]["exp_avg"].data_ptr() == state_dict["state"][0]["exp_avg"].data_ptr()

    def test_loads_into_another_dtype(self):
        """A training in bfloat16 goes on in float64: the state is the optimizer's, not the parameter's."""
        half, double = random_table(torch.bfloat16), random_table(torch.float64)
        optimizer, other = rows_of(half), rows_of(double)
        take_steps(optimizer, half, random_gradients(3, torch.bfloat16))
        other.load_state_dict(optimizer.state_dict())
        assert_same(other.state[double]["exp_avg"], optimizer.state[half]["exp_avg"].double())
        take_steps(other, double, random_gradients(1, torch.float64))
        assert other.state[double]["row_steps"].dtype == torch.int32

    def test_closure(self):
        table = random_table()

        def loss():
            optimizer.zero_grad()
            loss = table[:2].square().sum()
            loss.backward()
            return loss

        optimizer = rows_of(table)
        losses = [optimizer.step(loss).item() for _ in range(3)]
        assert losses[2] < losses[1] < losses[0]


class TestErrors:
    @pytest.mark.parametrize(
        "options",
        [
            {"lr": -1.0},
            {"lr": math.nan},
            {"lr": "1e-3"},
            {"lr": None},
            {"betas": (0.9, 1.0)},
            {"betas": (0.9,)},
            {"betas": 0.9},
            {"eps": -1e-8},
            {"weight_decay": -0.1},
            {"second_moment": "rows"},
            {"rounding_seed": -1},
            {"rounding_seed": 2**32},
            {"rounding_seed": 0.5},
        ],
    )
    def test_name_the_hyperparameter(self, options):
        (name,) = options
        message = re.escape(f"`{name}` must be ") + ".*, got " + re.escape(repr(options[name]))
        with pytest.raises(ValueError, match=message):
            RowAdamW([random_table()], **options)
        optimizer = RowAdamW([random_table()])
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [random_table()], **options})
        assert len(optimizer.param_groups) == 1

    def test_parameters_without_rows_are_warned_of(self):
        model = nn.Linear(4, 3)
        with pytest.warns(UserWarning, match="`expert_parameter_groups"):
            RowAdamW(model.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            RowAdamW(expert_parameter_groups(model, 0.1))  # such as a dense twin
            RowAdamW([{"params": [model.weight], "rows": True}, {"params": [model.bias]}])

    @pytest.mark.parametrize(
        "parameter", [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.complex64)]
    )
    def test_rows_are_of_matrices(self, parameter):
        table, optimizer = random_table(), RowAdamW([random_table()])
        with pytest.raises(ValueError, match="matrices"):
            optimizer.add_param_group({"params": [table, nn.Parameter(parameter)], "rows": True})
        assert not takes_factors(table) and len(optimizer.param_groups) == 1

    def test_state_of_another_size_or_optimizer(self):
        table, other = random_table(), random_table(num_rows=NUM_ROWS - 1)
        optimizer = rows_of(table)
        optimizer.make_state()
        loading = rows_of(other)
        loading.make_state()
        rate, steps = loading.param_groups[0]["lr"], loading.state[other]["row_steps"]
        saved = optimizer.state_dict()
        saved["param_groups"][0]["lr"] = 2 * rate
        with pytest.raises(ValueError, match="row_steps"):
            loading.load_state_dict(saved)
        assert loading.param_groups[0]["lr"] == rate and loading.state[other]["row_steps"] is steps
        with pytest.raises(ValueError, match="another optimizer's"):
            optimizer.load_state_dict(torch.optim.AdamW([table]).state_dict())

    @pytest.mark.parametrize("rows", [False, True])
    @pytest.mark.parametrize("change", [lambda data: torch.cat([data] * 900), lambda data: data.double()])
    def test_a_parameter_that_changed_under_its_state(self, change, rows):
        """Kernels would write beyond the end of the state."""
        parameter = random_table()
        optimizer = RowAdamW([{"params": [parameter], "rows": rows}])
        parameter.square().sum().backward()
        optimizer.step()
        parameter.grad, parameter.data = None, change(parameter.data)
        before = parameter.detach().clone()
        parameter.square().sum().backward()
        with pytest.raises(ValueError, match="`exp_avg` is torch.float32.*make a new optimizer"):
            optimizer.step()
        assert torch.equal(parameter, before)

    def test_sparse_gradients(self):
        embedding = nn.Embedding(8, 4, sparse=True)
        optimizer = RowAdamW([{"params": embedding.parameters(), "rows": True}])
        embedding(torch.tensor([1])).sum().backward()
        with pytest.raises(ValueError, match="sparse=False"):
            optimizer.step()


def test_a_graph_that_saved_a_table_is_not_run_backward_after_a_step(path):
    table = random_table()
    optimizer = rows_of(table)
    loss = table.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
