# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Which gradients of tables come in factors, who takes them, and how often their assignments are grouped."""

import copy
import gc
import io
import pickle

import pytest
import torch
from table_gradients import DenseRowAdamW, dense, model_of, optimizer_of, tables_of
from tiny_models import random_tokens
from torch import nn
from torch.testing import assert_close

from modeling_peer import RowAdamW, expert_parameter_groups
from modeling_peer.ops.factored_gradient import FactoredGradient, takes_factors


def backward(model, seed=1):
    tokens = random_tokens(3, 9, seed=seed)
    model(tokens, labels=tokens).loss.backward()


def come_in_factors(model) -> set[bool]:
    """Of the gradients of the tables after another backward, which are in factors. Others never are."""
    model.zero_grad()
    backward(model)
    tables = tables_of(model)
    assert len(tables) >= 2
    for name, parameter in model.named_parameters():
        assert type(parameter.grad) is torch.Tensor or name in tables
    return {isinstance(table.grad, FactoredGradient) for table in tables.values()}


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_factors_come_while_an_optimizer_takes_them():
    model = model_of()
    *others, tables, down_tables = expert_parameter_groups(model, 1e-2)
    optimizer = RowAdamW(others)
    assert come_in_factors(model) == {False}
    optimizer.add_param_group(tables)
    optimizer.add_param_group(down_tables)
    assert come_in_factors(model) == {True}
    another = optimizer_of(model)
    del optimizer
    gc.collect()
    assert come_in_factors(model) == {True}
    another = None
    gc.collect()
    assert another is None and come_in_factors(model) == {False}


@pytest.mark.parametrize(
    "optimizer_class",
    [
        lambda model: torch.optim.AdamW(model.parameters()),
        lambda model: RowAdamW(model.parameters()),
        lambda model: RowAdamW([{"params": list(model.parameters()), "rows": False}]),
        lambda model: optimizer_of(model, DenseRowAdamW),
    ],
)
def test_other_optimizers_take_none(optimizer_class):
    model = model_of()
    _optimizer = optimizer_class(model)
    assert come_in_factors(model) == {False}


def test_casts_and_loaded_states_keep_them():
    model = model_of()
    optimizer = optimizer_of(model)
    model.bfloat16()
    assert come_in_factors(model) == {True}
    assert {table.grad.dtype for table in tables_of(model).values()} == {torch.bfloat16}
    optimizer.load_state_dict(optimizer.state_dict())
    model.load_state_dict(model.state_dict())
    assert come_in_factors(model) == {True}


def test_copies_of_a_model_have_dense_gradients():
    model = model_of()
    _optimizer = optimizer_of(model)
    backward(model)
    for other in (copy.deepcopy(model), torch.load(saved(model), weights_only=False)):
        assert come_in_factors(other) == {False}
        assert come_in_factors(model) == {True}
        its_own = optimizer_of(other)
        assert come_in_factors(other) == {True}
        del its_own


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_of_an_optimizer_take_those_of_their_parameters(copied):
    table = nn.Parameter(torch.ones(3, 4))
    optimizer = RowAdamW([{"params": [table], "rows": True}])
    other = copied(optimizer)
    (its_table,) = other.param_groups[0]["params"]
    assert its_table is not table and takes_factors(its_table) and takes_factors(table)
    del other
    gc.collect()
    assert not takes_factors(its_table) and takes_factors(table)


def test_marked_tables_can_be_saved():
    model = model_of()
    _optimizer = optimizer_of(model)
    backward(model)
    for name, table in tables_of(model).items():
        for found in (
            torch.load(saved(table), weights_only=True),
            torch.load(saved(model.state_dict(keep_vars=True)), weights_only=True)[name],
            pickle.loads(pickle.dumps(table)),
            copy.deepcopy(table),
            copy.copy(table),
        ):
            assert torch.equal(found, table) and takes_factors(table) and not takes_factors(found)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True}], ids=str)
def test_another_optimizer_steps_as_with_dense_gradients(options):
    """The one that takes factors may be alive, and need not be the one that steps."""
    states = []
    for optimizer_class in (DenseRowAdamW, RowAdamW):
        model = model_of()
        taker = optimizer_of(model, optimizer_class)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
        for step in range(4):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            backward(model, seed=step)
            backward(model, seed=step + 1)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            kinds = {isinstance(table.grad, FactoredGradient) for table in tables_of(model).values()}
            assert kinds == {optimizer_class is RowAdamW}
            optimizer.step()
        states.append(model.state_dict())
        assert not taker.state
    assert_close(*states, rtol=1e-9, atol=1e-12)


def test_tables_that_grow_need_an_optimizer_of_their_own():
    model = model_of()
    _optimizer = optimizer_of(model)
    pool = model.model.layers[0].mlp.expert_pool
    more = torch.zeros(3, pool.up_proj.embedding_dim, dtype=torch.float64)
    pool.up_proj.weight = nn.Parameter(torch.cat([pool.up_proj.weight.detach(), more]))
    backward(model)
    assert type(pool.up_proj.weight.grad) is torch.Tensor
    assert pool.up_proj.weight.grad.shape == pool.up_proj.weight.shape
    assert type(pool.down_proj.weight.grad) is FactoredGradient


def test_a_pool_whose_tables_something_is_to_see_has_dense_gradients():
    """The same ones: the module is called."""
    model = model_of("peer", gated_experts=True)
    _optimizer = optimizer_of(model)
    assert come_in_factors(model) == {True}
    expected = {name: dense(parameter.grad) for name, parameter in model.named_parameters()}
    seen, pool = [], model.model.layers[0].mlp.expert_pool
    handle = pool.gate_proj.register_forward_hook(lambda module, args, output: seen.append(module))
    own, table = pool.up_proj.forward, pool.up_proj
    for change, undo in (
        (lambda: None, handle.remove),
        (
            lambda: setattr(table, "forward", lambda *args: seen.append(table) or own(*args)),
            lambda: delattr(table, "forward"),
        ),
    ):
        change()
        assert come_in_factors(model) == {False}
        assert len(seen) == 1 and seen.pop() in (pool.gate_proj, table)
        for name, parameter in model.named_parameters():
            assert_close(dense(parameter.grad), expected[name], rtol=1e-12, atol=1e-14)
        undo()
    assert come_in_factors(model) == {True} and not seen


class TestGrouping:
    """Sorting assignments is dear, and the tables of a pool have the same."""

    ENTRIES = 3 * 9 * 2 * 3  # tokens, heads, experts of each

    @pytest.mark.parametrize("optimizer_class", [RowAdamW, DenseRowAdamW])
    @pytest.mark.parametrize("gated", [False, True])
    def test_once_for_the_tables_of_a_pool(self, groupings, optimizer_class, gated):
        model = model_of("peer", "dense", "peer", gated_experts=gated)
        optimizer = optimizer_of(model, optimizer_class)
        backward(model)
        assert groupings == ([] if optimizer_class is RowAdamW else [self.ENTRIES] * 2)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        assert groupings == [self.ENTRIES] * 2

    def test_once_after_several_backwards(self, groupings):
        """And for a pool that layers share, whose tables are as many times in one."""
        for fields, number in (({}, [4, 4]), ({"share_experts_across_layers": True}, [8])):
            model = model_of("peer", "dense", "peer", num_experts=100**2, gated_experts=True, **fields)
            optimizer = optimizer_of(model)
            for seed in range(4):
                backward(model, seed)
            assert not groupings
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            assert groupings == [self.ENTRIES * each for each in number]
            groupings.clear()

    def test_as_often_for_all_tables_where_factors_are_summed(self, groupings):
        """As they are where they take more memory than the rows."""
        counts = []
        for gated in (False, True):
            model = model_of("peer", gated_experts=gated)
            optimizer = optimizer_of(model)
            for seed in range(12):
                backward(model, seed)
            optimizer.step()
            counts.append(len(groupings))
            groupings.clear()
        assert counts[0] == counts[1] > 1
