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
"""`RowAdamW` is AdamW on the rows that a step touched, and leaves all others bit by bit as they are."""

import copy
import functools
import io
import math
import pickle
import re

import pytest
import torch
from tiny_models import random_tokens, tiny_config
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.testing import assert_close
from trainer_worker import counting_sequences, logged, small_model, trainer_of
from transformers import Trainer
from two_processes import run_on_two_processes, save_parts

from modeling_peer import PeerForCausalLM, RowAdamW, expert_parameter_groups
from modeling_peer.expert_table import ExpertDownProjection, ExpertTable
from modeling_peer.optim import row_adamw
from modeling_peer.sparse_gradients import enable_sparse_norms


assert_same = functools.partial(assert_close, rtol=0, atol=0)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
NUM_ROWS, WIDTH = 11, 37  # no multiple of a vector's numbers


@pytest.fixture(params=["cpu", "torch"])
def path(request, monkeypatch):
    """What moves the rows: the compiled kernel or torch operations, these in several chunks."""
    if request.param == "torch":
        monkeypatch.setattr(row_adamw.cpu, "can_update", lambda *tensors: False)
        monkeypatch.setattr(row_adamw, "CHUNK_NUMBERS", 3 * WIDTH)
    else:
        assert row_adamw.cpu.can_update(torch.empty(1, 1), torch.empty(1, 1))
    return request.param


def random_table(dtype=torch.float32, num_rows=NUM_ROWS, width=WIDTH):
    return nn.Parameter(torch.randn(num_rows, width, generator=torch.Generator().manual_seed(0)).to(dtype))


def rows_of(table, **options):
    return RowAdamW([{"params": [table], "rows": True}], **{**OPTIONS, **options})


def random_gradients(number, dtype=torch.float32, seed=1, num_rows=NUM_ROWS, width=WIDTH):
    """Dense gradients of random rows, the last row never among them."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        gradient = torch.randn(num_rows, width, generator=generator)
        yield (
            gradient
            * (torch.rand(num_rows, 1, generator=generator) < 0.5)
            * (torch.arange(num_rows) < num_rows - 1)[:, None]
        ).to(dtype)


def by_rows(gradient):
    """A dense gradient as a coalesced sparse one of its rows other than zero."""
    rows = gradient.ne(0).any(1).nonzero()[:, 0]
    return torch.sparse_coo_tensor(
        rows[None], gradient[rows], gradient.shape, is_coalesced=True, check_invariants=True
    )


def accumulated(*gradients):
    """A sparse gradient as several micro-batches leave it: a row may be in it several times."""
    parts = [by_rows(gradient) for gradient in gradients]
    indices, values = torch.cat([part.indices() for part in parts], 1), torch.cat([part.values() for part in parts])
    return torch.sparse_coo_tensor(indices, values, gradients[0].shape, check_invariants=True)


def take_steps(optimizer, table, gradients):
    for gradient in gradients:
        table.grad = gradient
        optimizer.step()


def copied(optimizer, table):
    return {name: value.clone() for name, value in optimizer.state[table].items()} | {"table": table.detach().clone()}


class LiteralAdamW:
    """AdamW on each row by itself, number by number in Python's floats; the table is in its own dtype between steps."""

    def __init__(self, table, second_moment="full"):
        self.table, self.dtype, self.second_moment = table.tolist(), table.dtype, second_moment
        self.m = [[0.0] * len(row) for row in self.table]
        self.v = [[0.0] * len(row) for row in self.table]
        self.t = [0] * len(self.table)

    def step(self, gradient):
        (beta1, beta2), lr = OPTIONS["betas"], OPTIONS["lr"]
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
            self.table[n] = torch.tensor(self.table[n], dtype=torch.float64).to(self.dtype).tolist()


class TestRows:
    @pytest.mark.parametrize("second_moment", ["full", "row"])
    @pytest.mark.parametrize("layout", ["dense", "sparse"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_follow_adamw_row_by_row(self, path, dtype, layout, second_moment):
        table = random_table(dtype)
        literal = LiteralAdamW(table, second_moment)
        optimizer = rows_of(table, second_moment=second_moment)
        for gradient in random_gradients(25, dtype):
            take_steps(optimizer, table, [by_rows(gradient) if layout == "sparse" else gradient.clone()])
            literal.step(gradient)
        state = optimizer.state[table]
        exact = dtype == torch.float64
        tolerance = {"rtol": 1e-11, "atol": 1e-13} if exact else {"rtol": 2e-5, "atol": 1e-6}
        of_table = tolerance if dtype.itemsize > 2 else {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-3}
        assert_close(table.detach().double(), torch.tensor(literal.table, dtype=torch.float64), **of_table)
        assert state["row_steps"].tolist() == literal.t
        assert len(set(literal.t)) > 3
        assert literal.t[-1] == 0
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == (torch.float64 if exact else torch.float32)
        assert state["exp_avg_sq"].shape == (NUM_ROWS, WIDTH if second_moment == "full" else 1)
        second = torch.tensor(literal.v, dtype=torch.float64)[:, : state["exp_avg_sq"].shape[1]]
        assert_close(state["exp_avg"].double(), torch.tensor(literal.m, dtype=torch.float64), **tolerance)
        assert_close(state["exp_avg_sq"].double(), second, **tolerance)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("layout", ["dense", "sparse"])
    def test_others_stay_bit_by_bit(self, path, dtype, layout):
        table = random_table(dtype)
        optimizer = rows_of(table)
        take_steps(optimizer, table, random_gradients(5, dtype, seed=2))
        for gradient in random_gradients(5, dtype):
            before = copied(optimizer, table)
            take_steps(optimizer, table, [by_rows(gradient) if layout == "sparse" else gradient])
            touched = gradient.ne(0).any(1)
            assert touched.any()
            for name, after in copied(optimizer, table).items():
                assert_same(after[~touched], before[name][~touched])
                assert all(not torch.equal(after[n], before[name][n]) for n in touched.nonzero()[:, 0]), name

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_equal_adamw_where_all_are_touched(self, path, dtype):
        table, other = random_table(dtype), random_table(dtype)
        optimizer, reference = rows_of(table), torch.optim.AdamW([other], **OPTIONS)
        gradients = [torch.randn(NUM_ROWS, WIDTH, dtype=dtype) for _ in range(20)]
        take_steps(optimizer, table, [by_rows(gradient) for gradient in gradients])
        take_steps(reference, other, gradients)
        assert_close(
            table,
            other,
            **({"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}),
        )

    @pytest.mark.parametrize("second_moment", ["full", "row"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_sparse_and_dense_gradients_give_the_same(self, path, dtype, second_moment):
        states = []
        for layout in (by_rows, torch.clone):
            table = random_table(dtype)
            optimizer = rows_of(table, second_moment=second_moment)
            take_steps(optimizer, table, map(layout, random_gradients(6, dtype)))
            states.append(copied(optimizer, table))
        assert_same(*states)

    def test_rows_of_zeros_are_untouched_and_not_a_number_touches(self, path):
        """Padding retrieves experts too: their rows are in a sparse gradient, all zeros."""
        for layout in ("sparse", "dense"):
            table = random_table()
            optimizer = rows_of(table)
            take_steps(optimizer, table, [torch.ones_like(table)])
            before = copied(optimizer, table)
            values = torch.zeros(3, WIDTH)
            values[1, -1], values[2, 0] = math.nan, -1e-30
            gradient = torch.sparse_coo_tensor(
                [[0, 2, 5]], values, table.shape, is_coalesced=True, check_invariants=True
            )
            take_steps(optimizer, table, [gradient if layout == "sparse" else gradient.to_dense()])
            after = copied(optimizer, table)
            moved = [n for n in range(NUM_ROWS) if not torch.equal(after["row_steps"][n], before["row_steps"][n])]
            assert moved == [2, 5]
            untouched = [n for n in range(NUM_ROWS) if n not in moved]
            for name in before:
                assert_same(after[name][untouched], before[name][untouched])
            assert table[2].isnan().tolist() == [False] * (WIDTH - 1) + [True]

    def test_accumulated_sparse_gradients_are_summed(self, path):
        (first, second), table, other = random_gradients(2), random_table(), random_table()
        gradient = accumulated(first, second)
        assert not gradient.is_coalesced()
        assert len(gradient._indices()[0]) > len(gradient.coalesce().indices()[0])
        take_steps(rows_of(table), table, [gradient])
        take_steps(rows_of(other), other, [first + second])
        assert_same(table, other)

    @pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.9), (0.9, 0.0)])
    def test_betas_of_zero(self, path, betas):
        table, other = random_table(), random_table()
        gradients = [torch.randn(NUM_ROWS, WIDTH) for _ in range(3)]
        options = {**OPTIONS, "betas": betas, "eps": 1e-3}
        take_steps(rows_of(table, **options), table, gradients)
        take_steps(torch.optim.AdamW([other], **options), other, gradients)
        assert_close(table, other, rtol=1e-5, atol=1e-6)

    def test_an_embedding_with_sparse_gradients_need_not_be_named(self, path):
        embedding, table = nn.Embedding(NUM_ROWS, WIDTH, sparse=True), random_table()
        embedding.weight.data.copy_(table)
        optimizer, reference = RowAdamW(embedding.parameters(), **OPTIONS), rows_of(table)
        for tokens in ([1, 1, 4], [4, 7], [0]):
            optimizer.zero_grad()
            embedding(torch.tensor(tokens)).square().sum().backward()
            take_steps(reference, table, [embedding.weight.grad.to_dense()])
            optimizer.step()
        assert_same(embedding.weight.detach(), table.detach())
        # Once by rows, always by rows.
        before = embedding.weight.detach().clone()
        take_steps(optimizer, embedding.weight, [(torch.arange(NUM_ROWS) == 2)[:, None] * torch.ones(WIDTH)])
        assert embedding.weight.ne(before).any(1).nonzero().tolist() == [[2]]

    def test_zeroed_gradients_move_nothing(self, path):
        for layout in (by_rows, torch.clone):
            table = random_table()
            optimizer = rows_of(table)
            take_steps(optimizer, table, map(layout, random_gradients(2)))
            before = copied(optimizer, table)
            optimizer.zero_grad(set_to_none=False)
            optimizer.step()
            assert_same(copied(optimizer, table), before)

    def test_noncontiguous_tables_and_gradients(self, path):
        table = nn.Parameter(random_table(num_rows=WIDTH, width=NUM_ROWS).detach().T)
        other = nn.Parameter(table.detach().clone(memory_format=torch.contiguous_format))
        gradients = list(random_gradients(4))
        take_steps(rows_of(table), table, [gradient.T.contiguous().T for gradient in gradients])
        take_steps(rows_of(other), other, gradients)
        assert_close(table.detach(), other.detach(), rtol=1e-6, atol=1e-7)


def dense_parameters(dtype):
    generator = torch.Generator().manual_seed(3)
    shapes = ((5, 7), (13,), (), (2, 3, 4))
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_parameters_are_as_with_adamw(dtype):
    """To the bit of the fused one, also after a resume, where both round their state to the dtype of the parameters."""
    parameters, others = dense_parameters(dtype), dense_parameters(dtype)
    optimizer, reference = RowAdamW(parameters, **OPTIONS), torch.optim.AdamW(others, **OPTIONS, fused=True)
    generator = torch.Generator().manual_seed(4)
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
        gradients = [by_rows(gradient) for gradient in random_gradients(10, dtype)]
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
        assert {value.dtype for value in other.state[again].values()} == {torch.int32, row_adamw._state_dtype(table)}
        take_steps(other, again, gradients[5:])
        assert_same(copied(other, again), copied(expected, straight))

    def test_is_loaded_without_a_copy(self):
        table = random_table(torch.bfloat16)
        optimizer = rows_of(table)
        take_steps(optimizer, table, random_gradients(1, torch.bfloat16))
        state_dict, seen = copy.deepcopy(optimizer.state_dict()), []
        other = rows_of(table)
        other.register_load_state_dict_post_hook(lambda loaded: seen.append(loaded.state[table]["exp_avg"]))
        other.load_state_dict(state_dict)
        assert seen[0].data_ptr() == state_dict["state"][0]["exp_avg"].data_ptr()

    def test_loads_into_another_dtype(self):
        """A training in bfloat16 goes on in float64: the state is the optimizer's, not the parameter's."""
        half, double = random_table(torch.bfloat16), random_table(torch.float64)
        optimizer, other = rows_of(half), rows_of(double)
        take_steps(optimizer, half, random_gradients(3, torch.bfloat16))
        other.load_state_dict(optimizer.state_dict())
        assert_same(other.state[double]["exp_avg"], optimizer.state[half]["exp_avg"].double())
        take_steps(other, double, random_gradients(1, torch.float64))
        assert other.state[double]["row_steps"].dtype == torch.int32

    def test_is_made_at_the_first_step(self):
        table = random_table()
        optimizer = rows_of(table)
        assert not optimizer.state_dict()["state"]
        take_steps(optimizer, table, [torch.zeros_like(table)])
        assert optimizer.state[table].keys() == {"row_steps", "exp_avg", "exp_avg_sq"}

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


class TestGroups:
    @pytest.mark.parametrize(
        "model",
        [
            lambda: small_model("dense", "peer"),
            lambda: small_model("peer", "peer", share_experts_across_layers=True, gated_experts=True),
            lambda: small_model("pkm", "moe", query_norm="rms", attention_bias=True, tie_word_embeddings=True),
            lambda: small_model("dense", "dense"),
        ],
        ids=["peer", "shared", "pkm", "dense"],
    )
    def test_follow_the_trainer(self, model):
        model = model()
        groups = expert_parameter_groups(model, learning_rate=0.1, weight_decay=0.3, expert_lr_multiplier=4.0)
        names = {parameter: name for name, parameter in model.named_parameters()}
        found = [names[parameter] for group in groups for parameter in group["params"]]
        assert sorted(found) == sorted(names.values())
        tables = {module.weight for module in model.modules() if isinstance(module, ExpertTable)}
        assert {parameter for group in groups if group["rows"] for parameter in group["params"]} == tables
        decayed = {names[parameter] for group in groups if group["weight_decay"] for parameter in group["params"]}
        assert decayed == set(Trainer.get_decay_parameter_names(None, model)) & set(names.values())
        assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
        assert all(group["lr"] == (0.4 if group["rows"] else 0.1) for group in groups)
        # What `Trainer` logs is the rate of the first.
        assert not groups[0]["rows"]
        RowAdamW(groups)

    @pytest.mark.parametrize("variant", ["peer", "pkm"])
    def test_rows_that_come_out_have_a_rate_of_their_own(self, variant):
        model = small_model("dense", variant)
        groups = expert_parameter_groups(model, 0.1, expert_lr_multiplier=2.0, down_proj_lr_multiplier=5.0)
        rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
        for module in model.modules():
            if isinstance(module, ExpertTable):
                expected = 1.0 if isinstance(module, ExpertDownProjection) else 0.2
                assert rates[module.weight] == pytest.approx(expected)
        assert sorted(rates.values())[0] == 0.1 and all(each["rows"] == (each["lr"] > 0.1) for each in groups)

    def test_leave_out_what_is_frozen(self):
        model = small_model()
        model.model.embed_tokens.weight.requires_grad_(False)
        found = [p for group in expert_parameter_groups(model, learning_rate=0.1) for p in group["params"]]
        assert len(found) == len(list(model.parameters())) - 1

    def test_multiplier_lasts_through_a_schedule(self, path):
        model, references = small_model(), []
        optimizer = RowAdamW(expert_parameter_groups(model, learning_rate=0.1, expert_lr_multiplier=3.0))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        others = {}
        for rate in (0.1, 0.3):
            others[rate] = [
                nn.Parameter(p.detach().clone())
                for group in optimizer.param_groups
                if math.isclose(group["lr"], rate)
                for p in group["params"]
            ]
            references.append(torch.optim.AdamW(others[rate], lr=rate, weight_decay=0.0))
        schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1 / (1 + step)) for one in references]
        for _ in range(3):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.ones_like(parameter)
            for other in others[0.1] + others[0.3]:
                other.grad = torch.ones_like(other)
            for one in (
                optimizer,
                scheduler,
                *(one for pair in zip(references, schedules, strict=True) for one in pair),
            ):
                one.step()
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx((0.3 if group["rows"] else 0.1) / 4)
            expected = [others[0.3 if group["rows"] else 0.1].pop(0) for _ in group["params"]]
            assert_close(group["params"], expected, rtol=1e-5, atol=1e-6)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"lr": -1.0}, "`lr` must be a number, at least 0, got -1.0"),
            ({"lr": torch.tensor(0.1)}, "`lr` must be a number, at least 0, got tensor"),
            ({"lr": math.nan}, "`lr` must be a number, at least 0, got nan"),
            ({"betas": (0.9, 1.0)}, "`betas` must be two numbers, at least 0 and less than 1, got (0.9, 1.0)"),
            ({"betas": 0.9}, "`betas` must be two numbers, at least 0 and less than 1, got 0.9"),
            ({"eps": -1e-8}, "`eps` must be a number, at least 0, got -1e-08"),
            ({"weight_decay": -0.1}, "`weight_decay` must be a number, at least 0, got -0.1"),
            ({"second_moment": "rows"}, "`second_moment` must be one of ('full', 'row'), got 'rows'"),
        ],
    )
    def test_say_what_was_found(self, options, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            RowAdamW([random_table()], **options)
        optimizer = RowAdamW([random_table()])
        with pytest.raises(ValueError, match=re.escape(message)):
            optimizer.add_param_group({"params": [random_table()], **options})
        assert len(optimizer.param_groups) == 1

    @pytest.mark.parametrize(
        "parameter", [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.complex64)]
    )
    def test_rows_are_of_matrices(self, parameter):
        with pytest.raises(ValueError, match='`"rows": True` must be real, of shape \\(num_rows, width\\), got'):
            RowAdamW([{"params": [nn.Parameter(parameter)], "rows": True}])
        with pytest.raises(ValueError, match="`rows` must be `True` or `False`, got 1"):
            RowAdamW([{"params": [random_table()], "rows": 1}])

    def test_sparse_gradients_are_by_rows(self):
        table = random_table()
        with pytest.raises(ValueError, match="sparse in 2 dimensions of \\(11, 37\\)"):
            take_steps(RowAdamW([table]), table, [torch.ones_like(table).to_sparse()])
        vector = nn.Parameter(torch.ones(4))
        with pytest.raises(ValueError, match="sparse in 1 dimensions of \\(4,\\)"):
            take_steps(RowAdamW([vector]), vector, [torch.ones(4).to_sparse()])

    def test_sparse_after_dense(self):
        table = random_table()
        optimizer = RowAdamW([table])
        take_steps(optimizer, table, [torch.ones_like(table)])
        with pytest.raises(ValueError, match='`"rows": True` from the start'):
            take_steps(optimizer, table, [by_rows(torch.ones_like(table))])

    def test_state_of_another_size(self):
        table, other = random_table(), random_table(num_rows=NUM_ROWS - 1)
        optimizer = rows_of(table)
        take_steps(optimizer, table, [torch.ones_like(table)])
        with pytest.raises(ValueError, match=r"`row_steps` of a table of shape \(10, 37\) must be of shape \(10,\)"):
            rows_of(other).load_state_dict(optimizer.state_dict())

    def test_state_of_another_optimizer(self):
        table = random_table()
        with pytest.raises(ValueError, match="another optimizer's"):
            rows_of(table).load_state_dict(torch.optim.AdamW([table]).state_dict())


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_norms_of_sparse_gradients_are_those_of_dense_ones(norm_type):
    enable_sparse_norms()
    first, second = random_gradients(2)
    for gradient in (by_rows(first), accumulated(first, second)):
        sparse, dense, bias = random_table(), random_table(), nn.Parameter(torch.ones(3))
        bias.grad = torch.full((3,), 0.5)
        sparse.grad, dense.grad = gradient.clone(), gradient.to_dense()
        norm = clip_grad_norm_([sparse, bias], 0.1, norm_type)
        bias.grad = torch.full((3,), 0.5)
        assert_close(norm, clip_grad_norm_([dense, bias], 0.1, norm_type))
        assert_close(sparse.grad.to_dense(), dense.grad)


def trainer_with_rows(folder, sparse=True, second_moment="full", seed=0, optimizer_options=None, **options):
    """The stock trainer of a tiny model, as `examples/training.py` makes it."""
    model = small_model(
        "peer",
        "dense",
        "peer",
        share_experts_across_layers=True,
        attention_dropout=0.1,
        sparse_expert_gradients=sparse,
        seed=seed,
    )
    groups = expert_parameter_groups(model, learning_rate=1e-2, weight_decay=0.1, expert_lr_multiplier=2.0)
    trainer = trainer_of(model, folder, counting_sequences(40), max_steps=8, max_grad_norm=0.5, **options)
    trainer.optimizer = RowAdamW(groups, second_moment=second_moment)
    return trainer


class TestTrainer:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"gradient_accumulation_steps": 2},
            {"activation_checkpointing": True, "gradient_accumulation_steps": 2},
            {"bf16": True},
        ],
        ids=["plain", "accumulated", "checkpointed", "bfloat16"],
    )
    def test_sparse_gradients_train_as_dense_ones(self, tmp_path, options):
        sparse, layouts = trainer_with_rows(tmp_path, **options), []
        table = sparse.model.model.expert_pool.up_proj.weight
        sparse.optimizer.register_step_pre_hook(lambda *_: layouts.append(table.grad.is_sparse))
        sparse.train()
        dense = trainer_with_rows(tmp_path, sparse=False, **options)
        dense.train()
        assert layouts == [True] * 8
        assert logged(sparse) == pytest.approx(logged(dense), rel=1e-4)
        assert logged(sparse, "grad_norm") == pytest.approx(logged(dense, "grad_norm"), rel=1e-3)
        assert min(logged(sparse, "grad_norm")) > 0.5
        assert logged(sparse)[-1] < logged(sparse)[0]
        steps = sparse.optimizer.state[table]["row_steps"]
        assert 0 < steps.max() <= 8
        assert steps.float().mean() < 8

    @pytest.mark.parametrize("second_moment", ["full", "row"])
    def test_resumes_to_the_bit(self, tmp_path, second_moment):
        options = {
            "second_moment": second_moment,
            "gradient_accumulation_steps": 2,
            "save_strategy": "steps",
            "save_steps": 5,
        }
        unbroken = trainer_with_rows(tmp_path, **options)
        unbroken.train()
        resumed = trainer_with_rows(tmp_path, seed=1, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
        assert logged(resumed) == logged(unbroken)
        assert logged(resumed, "grad_norm") == logged(unbroken, "grad_norm")
        assert_same(resumed.model.state_dict(), unbroken.model.state_dict())
        # The log has the rate of other parameters than tables.
        assert logged(resumed, "learning_rate")[0] == 1e-2

    def test_tables_of_bfloat16_resume_to_the_bit(self, tmp_path):
        finals = []
        for seed, resumed in ((0, False), (1, True)):
            trainer = trainer_with_rows(tmp_path, seed=seed, save_strategy="steps", save_steps=5)
            trainer.model.bfloat16()
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5") if resumed else None)
            state = trainer.optimizer.state[trainer.model.model.expert_pool.up_proj.weight]
            assert state["exp_avg"].dtype == torch.float32
            finals.append(trainer.model.state_dict())
        assert_same(*finals)


# What is split over two processes, from here on: half of the rows of each batch to each.
CONFIG = tiny_config("peer", "dense", "peer", share_experts_across_layers=True)
BATCHES = [random_tokens(4, 12, seed=seed) for seed in range(3)]
# With a small eps, Adam turns the rounding of a vanishing gradient into a step of full size.
JOINT_OPTIONS = {"eps": 1e-3, "weight_decay": 0.1}


def joint_model(sparse):
    config = copy.deepcopy(CONFIG)
    config.sparse_expert_gradients = sparse
    torch.manual_seed(0)
    return PeerForCausalLM(config).train()


def optimizer_of(model, **options):
    return RowAdamW(
        expert_parameter_groups(model, learning_rate=1e-2, weight_decay=0.1), **{**JOINT_OPTIONS, **options}
    )


def take_model_steps(model, optimizer, batches, rank=0, world_size=1):
    for batch in batches:
        own = batch.chunk(world_size)[rank]
        optimizer.zero_grad()
        model(input_ids=own, labels=own).loss.backward()
        optimizer.step()


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def whole_state(model, optimizer):
    """Parameters, and the state of the tables, under their names."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = whole(parameter)
        if "row_steps" in optimizer.state[parameter]:
            found |= {f"{name}.{key}": whole(value) for key, value in optimizer.state[parameter].items()}
    return found


def data_parallel(rank):
    model = joint_model(sparse=True)
    optimizer = optimizer_of(model)
    take_model_steps(DistributedDataParallel(model), optimizer, BATCHES, rank, 2)
    assert model.model.expert_pool.up_proj.weight.grad.is_sparse
    return whole_state(model, optimizer)


def fully_sharded(rank, second_moment="row"):
    """With a save and a load in between, of optimizer state gathered whole."""
    model = joint_model(sparse=False)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = optimizer_of(model, second_moment=second_moment)
    take_model_steps(model, optimizer, BATCHES[:2], rank, 2)
    saved = get_optimizer_state_dict(model, optimizer)
    before = whole_state(model, optimizer)
    optimizer = optimizer_of(model, second_moment=second_moment)
    set_optimizer_state_dict(model, optimizer, saved)
    assert_same(whole_state(model, optimizer), before)
    take_model_steps(model, optimizer, BATCHES[2:], rank, 2)
    return whole_state(model, optimizer)


def tensor_parallel(rank):
    """A table split along its width; some of its rows have a gradient in one half alone."""
    mesh = init_device_mesh("cpu", (2,))
    table = nn.Parameter(distribute_tensor(random_table().detach(), mesh, [Shard(1)]))
    try:
        rows_of(table, second_moment="row")
    except ValueError as error:
        assert '`second_moment` must be "full" for a table whose rows are split' in str(error), error
    else:
        raise AssertionError("a mean over a part of a row")
    optimizer = rows_of(table)
    take_steps(optimizer, table, [distribute_tensor(gradient, mesh, [Shard(1)]) for gradient in half_gradients()])
    return {name: whole(value) for name, value in optimizer.state[table].items()} | {"table": whole(table)}


def half_gradients():
    gradients = list(random_gradients(5))
    for gradient in gradients:
        gradient[::2, WIDTH // 2 :] = 0
    return gradients


PARTS = (data_parallel, fully_sharded, tensor_parallel)


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    run_on_two_processes(save_parts, str(folder), PARTS)
    return folder


@pytest.mark.parametrize("rank", [0, 1])
class TestDistributed:
    def compare(self, folder, name, rank, expected):
        found = torch.load(folder / f"{name}-{rank}")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=lambda message, key=key: f"{key}: {message}")

    def test_data_parallel_sparse_gradients_are_those_of_the_joint_batch(self, distributed, rank):
        model = joint_model(sparse=True)
        optimizer = optimizer_of(model)
        take_model_steps(model, optimizer, BATCHES)
        self.compare(distributed, "data_parallel", rank, whole_state(model, optimizer))

    def test_tables_sharded_by_rows(self, distributed, rank):
        model = joint_model(sparse=False)
        optimizer = optimizer_of(model, second_moment="row")
        take_model_steps(model, optimizer, BATCHES)
        self.compare(distributed, "fully_sharded", rank, whole_state(model, optimizer))

    def test_tables_split_along_their_width(self, distributed, rank):
        table = random_table()
        optimizer = rows_of(table)
        take_steps(optimizer, table, half_gradients())
        self.compare(distributed, "tensor_parallel", rank, copied(optimizer, table))


def test_a_model_cast_in_the_midst_of_training_keeps_its_state():
    table = random_table()
    optimizer = rows_of(table)
    take_steps(optimizer, table, random_gradients(2))
    table.data = table.data.double()
    table.grad = None
    expected = LiteralAdamW(table)
    expected.m, expected.v = (optimizer.state[table][name].tolist() for name in ("exp_avg", "exp_avg_sq"))
    expected.t = optimizer.state[table]["row_steps"].tolist()
    (gradient,) = random_gradients(1, torch.float64, seed=5)
    take_steps(optimizer, table, [gradient])
    expected.step(gradient)
    assert_close(table.detach(), torch.tensor(expected.table, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_a_graph_that_saved_a_table_is_not_run_backward_after_a_step(path):
    table = random_table()
    optimizer = rows_of(table)
    loss = table.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
