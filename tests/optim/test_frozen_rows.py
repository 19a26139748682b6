# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Frozen rows keep their values to the bit, whatever optimizer steps, and all others move as without the freeze."""

import copy
import gc
import io
import math
import weakref

import pytest
import torch
from rows_by_hand import FROZEN, NUM_ROWS, OPTIMIZERS, WIDTH, backward, random_module, random_parameter, without_rows
from torch import nn
from torch.nn.utils import clip_grad_norm_

from modeling_peer import RowAdamW, expert_parameter_groups
from modeling_peer.optim import frozen_rows
from modeling_peer.optim.frozen_rows import freeze_rows, freezes_of


def loaded(module):
    """From a file."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def bits(tensor):
    return tensor.detach().view(torch.int32)


def frozen_module(rows=FROZEN):
    """A module, its parameter, and a freeze of rows of this, which lasts as long as the module."""
    module = random_module()
    freeze = freeze_rows(module, "weight", rows)
    return module, module.weight, freeze


def take_step(optimizer, parameter, step=0):
    optimizer.zero_grad()
    backward(parameter, step)
    optimizer.step(None)  # as Accelerate does


def assert_step_moves(moved, optimizer, parameter, step=0):
    """That rows have a gradient, and are moved by a step in all columns, where `moved` is True, and only there."""
    before = parameter.detach().clone()
    take_step(optimizer, parameter, step)
    assert torch.equal(parameter.grad.ne(0).any(1), moved)
    assert torch.equal(parameter.ne(before), moved[:, None].expand_as(before))


def put_back_by_hand(parameter, step):
    """Makes a step with frozen rows by the letter: their gradient is zeroed, and they are put back after it."""
    parameter.grad = without_rows(parameter.grad, FROZEN)
    before = parameter.detach().clone()
    step()
    parameter.data = torch.where(FROZEN[:, None], before, parameter.data)


CASES = [(layout, name) for layout in ("dense", "factored") for name in OPTIMIZERS]


class TestRows:
    @pytest.mark.parametrize(("layout", "name"), CASES)
    def test_stay_and_others_move_as_by_hand(self, layout, name):
        module, other = random_module(), random_parameter()
        parameter = module.weight
        optimizer, by_hand = OPTIMIZERS[name](parameter), OPTIMIZERS[name](other)
        for step in range(30):
            if step == 5:
                for each in (parameter, other):
                    each.data[0, 0] = -0.0  # to which even adding a zero may do something
                before = parameter.detach().clone()
                assert torch.equal(before, other)
                freeze_rows(module, "weight", FROZEN)
            for each, its_optimizer in ((parameter, optimizer), (other, by_hand)):
                its_optimizer.zero_grad()
                backward(each, step, layout)
                if each is other and step >= 5:
                    put_back_by_hand(other, by_hand.step)
                else:
                    its_optimizer.step()
        assert torch.equal(bits(parameter)[FROZEN], bits(before)[FROZEN])
        assert parameter.ne(before).any(1)[~FROZEN].all()
        assert torch.equal(bits(parameter), bits(other))

    @pytest.mark.parametrize(("name", "copies"), [("AdamW", 1), ("SGD with decay", 1), ("RowAdamW", 0), ("SGD", 0)])
    def test_are_copied_where_the_optimizer_moves_them(self, monkeypatch, name, copies):
        copied = []
        original = frozen_rows.FrozenRows.copy_of_rows
        monkeypatch.setattr(frozen_rows.FrozenRows, "copy_of_rows", lambda *args: copied.append(1) or original(*args))
        _module, parameter, _ = frozen_module()
        optimizer = OPTIMIZERS[name](parameter)
        take_step(optimizer, parameter)
        optimizer.zero_grad()
        optimizer.step(None)  # has no gradient to step with
        assert len(copied) == copies and not any(vars(optimizer)[frozen_rows.SAVED_ROWS])

    @pytest.mark.parametrize(("name", "shape", "dim"), [("AdamW", (2, 3, 7, 4), 2), ("RowAdamW", (11, 5), 1)])
    def test_along_another_dimension(self, name, shape, dim):
        """Also where rows move by their gradients, and by their momentum from before."""
        module, held = random_module(shape), torch.arange(shape[dim]) % 2 == 0
        parameter = module.weight
        optimizer = OPTIMIZERS[name](parameter)
        take_step(optimizer, parameter)
        freeze_rows(module, "weight", held, dim)
        before = parameter.detach().clone()
        for step in range(1, 4):
            take_step(optimizer, parameter, step)
            assert not parameter.grad.movedim(dim, 0)[held].any()
        moved = bits(parameter).ne(bits(before)).movedim(dim, 0)
        assert moved[~held].all() and not moved[held].any()

    def test_along_another_dimension_of_factors(self):
        table, held = nn.Embedding(64, 4), torch.tensor([True, False, False, False])
        optimizer = RowAdamW(expert_parameter_groups(table, 0.1, embeddings=True))
        freeze_rows(table, "weight", held, dim=1)
        before = table.weight.detach().clone()
        table(torch.tensor([1, 40])).sum().backward()
        optimizer.step()
        moved = table.weight.ne(before)
        assert not moved[:, held].any() and moved[[1, 40]][:, ~held].all()

    @pytest.mark.parametrize("name", ["AdamW", "RowAdamW"])
    def test_stay_where_zeros_did_not_last(self, name):
        """A norm that is not finite makes clipping leave none, and a gradient may be set by hand."""
        for value in (math.nan, 1.0):
            _module, parameter, _ = frozen_module()
            before = parameter.detach().clone()
            backward(parameter, 0)
            parameter.grad[0] = value
            clip_grad_norm_([parameter], 1.0)
            assert parameter.grad[FROZEN].isnan().all() == parameter.grad[~FROZEN].isnan().all() == math.isnan(value)
            OPTIMIZERS[name](parameter).step()
            assert torch.equal(parameter.ne(before), ~FROZEN[:, None].expand_as(before))
            assert parameter[~FROZEN].isnan().all() == math.isnan(value)

    @pytest.mark.parametrize("by_name", [False, True])
    @pytest.mark.parametrize("name", ["AdamW", "RowAdamW"])
    def test_stay_in_a_step_with_a_closure(self, name, by_name):
        _module, parameter, _ = frozen_module()
        optimizer, before = OPTIMIZERS[name](parameter), parameter.detach().clone()

        def closure():
            optimizer.zero_grad()
            backward(parameter, 0)
            parameter.grad.mul_(factors.pop())

        factors = [math.nan, 1.0]  # as clipping by a norm that is not finite does
        while factors:
            optimizer.zero_grad()
            optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        assert torch.equal(parameter.ne(before).any(1), ~FROZEN)

    def test_stay_in_a_step_within_a_step(self):
        """An optimizer that moves parameters itself, after the step of the class it is made from."""

        class Shrinking(torch.optim.AdamW):
            def step(self, closure=None):
                super().step(closure)
                with torch.no_grad():
                    for parameter in self.param_groups[0]["params"]:
                        parameter.mul_(0.5)

        _module, parameter, _ = frozen_module()
        OPTIMIZERS["AdamW"](random_parameter())  # so that its step has hooks too
        optimizer = Shrinking([parameter])
        for step in range(2):
            assert_step_moves(~FROZEN, optimizer, parameter, step)

    def test_a_step_that_failed_takes_nothing_back_later(self):
        _module, parameter, freeze = frozen_module()
        optimizer = torch.optim.AdamW([parameter], lr=0.05, weight_decay=0.1)

        def fails():
            raise MemoryError

        with pytest.raises(MemoryError):
            optimizer.step(fails)
        freeze.remove()
        assert_step_moves(torch.ones_like(FROZEN), optimizer, parameter)

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_of_several_freezes_add_up_and_these_end_in_any_order(self, order):
        first, second = torch.arange(NUM_ROWS) < 4, torch.arange(NUM_ROWS) >= 9
        module, parameter, freeze = frozen_module(first)
        optimizer = OPTIMIZERS["AdamW"](parameter)
        freezes = [freeze, freeze_rows(module, "weight", second)]
        for step, rows in enumerate([first | second, (second, first)[order[0]], torch.zeros_like(first)]):
            assert_step_moves(~rows, optimizer, parameter, step)
            if step < 2:
                freezes[order[step]].remove()
                freezes[order[step]].remove()  # once more does nothing
        with pytest.raises(RuntimeError, match="no longer frozen"):
            freezes[0].set_rows(first)

    def test_may_change(self):
        _module, parameter, freeze = frozen_module(torch.ones_like(FROZEN))
        optimizer = OPTIMIZERS["AdamW"](parameter)
        assert not parameter.requires_grad
        for step, held in enumerate([FROZEN, ~FROZEN, torch.zeros_like(FROZEN)]):
            freeze.set_rows(held)
            assert_step_moves(~held, optimizer, parameter, step)

    @pytest.mark.parametrize("required", [True, False])
    def test_a_whole_parameter_requires_no_gradient_until_it_is_free(self, required):
        everything = torch.ones(NUM_ROWS, dtype=torch.bool)
        for order in (0, 1, 2), (2, 1, 0), (1, 0, 2):
            module = random_module()
            parameter = module.weight.requires_grad_(required)
            freezes = [freeze_rows(module, "weight", rows) for rows in (everything, FROZEN, everything)]
            assert not parameter.requires_grad
            for index in order:
                freezes[index].remove()
            assert parameter.requires_grad == required

    def test_of_what_requires_no_gradient_yet(self):
        module = random_module()
        parameter = module.weight.requires_grad_(False)
        freeze_rows(module, "weight", FROZEN)
        assert not parameter.requires_grad
        parameter.requires_grad_(True)
        assert_step_moves(~FROZEN, OPTIMIZERS["AdamW"](parameter), parameter)

    @pytest.mark.parametrize("copied", [copy.deepcopy, loaded])
    def test_do_not_travel_to_copies_and_hinder_none(self, copied):
        module = nn.Linear(WIDTH, NUM_ROWS, bias=False)
        freeze = freeze_rows(module, "weight", FROZEN)
        other = copied(module)
        assert not freezes_of(other)
        assert_step_moves(torch.ones_like(FROZEN), OPTIMIZERS["AdamW"](other.weight), other.weight)
        again = freeze_rows(other, "weight", ~FROZEN)
        assert freezes_of(other) == [again] and freezes_of(module) == [freeze]

    def test_are_not_held_by_a_copy_of_their_handle(self):
        module, _, freeze = frozen_module()
        other = copy.deepcopy(freeze)
        other.remove()
        with pytest.raises(RuntimeError, match="no longer frozen"):
            other.set_rows(~FROZEN)
        assert freezes_of(module) == [freeze] and torch.equal(freeze.rows, FROZEN)

    def test_for_the_steps_of_one_optimizer_stop_those_of_others(self):
        module, others = random_module(), random_parameter()
        parameter = module.weight
        own, other = OPTIMIZERS["AdamW"](parameter), OPTIMIZERS["SGD"](parameter)
        freeze = freeze_rows(module, "weight", FROZEN, optimizer=own)
        with pytest.raises(RuntimeError, match="another optimizer"):
            other.step()
        OPTIMIZERS["SGD"](others).step()
        assert_step_moves(~FROZEN, own, parameter)
        del own
        gc.collect()
        with pytest.raises(RuntimeError, match="another optimizer"):
            other.step()
        freeze.remove()
        assert_step_moves(torch.ones_like(FROZEN), other, parameter)

    def test_a_parameter_that_took_the_place_is_not_moved(self):
        module = nn.Linear(WIDTH, NUM_ROWS, bias=False)
        freeze = freeze_rows(module, "weight", FROZEN)
        module.weight = random_parameter()
        before = module.weight.detach().clone()
        optimizer = OPTIMIZERS["AdamW"](module.weight)
        with pytest.raises(RuntimeError, match="another parameter has taken its place"):
            take_step(optimizer, module.weight)
        assert not vars(optimizer).get(frozen_rows.SAVED_ROWS)
        assert torch.equal(module.weight, before)
        OPTIMIZERS["AdamW"](random_parameter()).step()  # another's business
        again = freeze_rows(module, "weight", FROZEN)
        assert_step_moves(~FROZEN, optimizer, module.weight)
        again.remove()
        freeze.remove()
        assert_step_moves(torch.ones_like(FROZEN), optimizer, module.weight)

    def test_go_with_the_parameter_and_do_not_hold_it(self):
        """Without the garbage collector: a table may take most of the memory."""
        module, parameter, freeze = frozen_module()
        take_step(OPTIMIZERS["AdamW"](parameter), parameter)
        references = [weakref.ref(module), weakref.ref(parameter)]
        gc.disable()
        try:
            del module, parameter
            assert [reference() for reference in references] == [None, None]
        finally:
            gc.enable()
        freeze.remove()
        with pytest.raises(RuntimeError, match="no longer frozen"):
            freeze.set_rows(FROZEN)
