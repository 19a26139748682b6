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
from rows_by_hand import (
    FROZEN,
    NUM_ROWS,
    OPTIMIZERS,
    WIDTH,
    backward,
    random_module,
    random_parameter,
    rows_by_row_adamw,
    without_rows,
)
from table_gradients import dense
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.testing import assert_close

from modeling_peer.optim import frozen_rows
from modeling_peer.optim.frozen_rows import freeze_rows, freezes_of


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def bits(tensor):
    return tensor.detach().view(torch.int32)


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
        module = random_module()
        freeze_rows(module, "weight", FROZEN)
        optimizer = OPTIMIZERS[name](module.weight)
        backward(module.weight, 0)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()  # has no gradient to step with
        assert len(copied) == copies and not any(vars(optimizer)[frozen_rows.SAVED_ROWS])

    @pytest.mark.parametrize("layout", ["dense", "factored"])
    def test_do_not_count_in_the_norm(self, layout):
        module, other = random_module(), random_parameter()
        parameter = module.weight
        freeze_rows(module, "weight", FROZEN)
        for each in (parameter, other):
            backward(each, 0, layout)
            backward(each, 1, layout)
        kept = dense(other.grad)[~FROZEN]
        assert 0 < kept.norm() < 0.9 * dense(other.grad).norm()
        assert_close(dense(parameter.grad)[~FROZEN], kept, rtol=0, atol=0)
        assert_close(clip_grad_norm_([parameter], 1e-3), kept.norm())

    def test_along_another_dimension(self):
        module = random_module((2, 3, 7, 4))
        parameter = module.weight
        optimizer = OPTIMIZERS["AdamW"](parameter)
        columns = torch.arange(7) < 4
        freeze_rows(module, "weight", columns, dim=2)
        before = parameter.detach().clone()
        for step in range(3):
            backward(parameter, step)
            assert not parameter.grad[:, :, columns].any()
            optimizer.step()
        assert torch.equal(parameter[:, :, columns], before[:, :, columns])
        assert parameter.ne(before)[:, :, ~columns].all()

    @pytest.mark.parametrize("name", ["AdamW", "RowAdamW"])
    def test_stay_where_zeros_did_not_last(self, name):
        """A norm that is not finite makes clipping leave none, and a gradient may be set by hand."""
        module = random_module()
        parameter = module.weight
        freeze_rows(module, "weight", FROZEN)
        optimizer, before = OPTIMIZERS[name](parameter), parameter.detach().clone()
        backward(parameter, 0)
        parameter.grad[1, 0] = math.nan
        clip_grad_norm_([parameter], 1.0)
        assert parameter.grad.isnan().all()
        optimizer.step()
        assert torch.equal(parameter[FROZEN], before[FROZEN])
        assert parameter[~FROZEN].isnan().all()
        module = random_module()
        parameter = module.weight
        freeze_rows(module, "weight", FROZEN)
        parameter.grad = torch.ones_like(parameter)
        OPTIMIZERS[name](parameter).step()
        assert torch.equal(parameter[FROZEN], before[FROZEN])

    @pytest.mark.parametrize("by_name", [False, True])
    @pytest.mark.parametrize("name", ["AdamW", "RowAdamW"])
    def test_stay_in_a_step_with_a_closure(self, name, by_name):
        module = random_module()
        parameter = module.weight
        freeze_rows(module, "weight", FROZEN)
        optimizer, before = OPTIMIZERS[name](parameter), parameter.detach().clone()

        def closure():
            optimizer.zero_grad()
            backward(parameter, 0)

        for _ in range(2):
            optimizer.zero_grad()
            optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        assert torch.equal(parameter[FROZEN], before[FROZEN])
        assert parameter.ne(before).any(1)[~FROZEN].all()

    def test_stay_in_a_step_within_a_step(self):
        """An optimizer that moves parameters itself, after the step of the class it is made from."""

        class Shrinking(torch.optim.AdamW):
            def step(self, closure=None):
                super().step(closure)
                with torch.no_grad():
                    for parameter in self.param_groups[0]["params"]:
                        parameter.mul_(0.5)

        module = random_module()
        parameter = module.weight
        freeze_rows(module, "weight", FROZEN)
        OPTIMIZERS["AdamW"](random_parameter())  # so that its step has hooks too
        optimizer, before = Shrinking([parameter]), parameter.detach().clone()
        for step in range(2):
            backward(parameter, step)
            optimizer.step()
        assert torch.equal(parameter[FROZEN], before[FROZEN])

    def test_a_step_that_failed_takes_nothing_back_later(self):
        module = random_module()
        parameter = module.weight
        freeze = freeze_rows(module, "weight", FROZEN)
        optimizer = torch.optim.AdamW([parameter], lr=0.05, weight_decay=0.1)

        def fails():
            raise MemoryError

        with pytest.raises(MemoryError):
            optimizer.step(fails)
        freeze.remove()
        before = parameter.detach().clone()
        backward(parameter, 0)
        optimizer.step()
        assert parameter.ne(before).all()

    def test_columns_are_held_where_rows_move_by_their_gradients(self):
        module = random_module()
        parameter = module.weight
        columns = torch.arange(WIDTH) % 2 == 0
        optimizer = rows_by_row_adamw(parameter)
        backward(parameter, 0)
        optimizer.step()  # momentum from before
        freeze_rows(module, "weight", columns, dim=1)
        before = parameter.detach().clone()
        optimizer.zero_grad()
        backward(parameter, 1)
        optimizer.step()
        assert torch.equal(bits(parameter[:, columns]), bits(before[:, columns]))
        assert parameter[:, ~columns].ne(before[:, ~columns]).all()

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_of_several_freezes_add_up_and_these_end_in_any_order(self, order):
        first, second = torch.arange(NUM_ROWS) < 4, torch.arange(NUM_ROWS) >= 9
        module = random_module()
        parameter = module.weight
        optimizer = OPTIMIZERS["AdamW"](parameter)
        freezes = [freeze_rows(module, "weight", first), freeze_rows(module, "weight", second)]
        for step, rows in enumerate([first | second, (second, first)[order[0]], torch.zeros_like(first)]):
            before = parameter.detach().clone()
            optimizer.zero_grad()
            backward(parameter, step)
            assert torch.equal(parameter.grad.ne(0).any(1), ~rows)
            optimizer.step()
            assert torch.equal(parameter.ne(before).any(1), ~rows)
            if step < 2:
                freezes[order[step]].remove()
                freezes[order[step]].remove()  # once more does nothing
        with pytest.raises(RuntimeError, match="no longer frozen"):
            freezes[0].set_rows(first)

    def test_may_change(self):
        module = random_module()
        parameter = module.weight
        optimizer = OPTIMIZERS["AdamW"](parameter)
        freeze = freeze_rows(module, "weight", torch.ones_like(FROZEN))
        assert not parameter.requires_grad
        for step, held in enumerate([FROZEN, ~FROZEN, torch.zeros_like(FROZEN)]):
            freeze.set_rows(held)
            before = parameter.detach().clone()
            optimizer.zero_grad()
            backward(parameter, step)
            assert torch.equal(parameter.grad.ne(0).any(1), ~held)
            optimizer.step()
            assert torch.equal(parameter.ne(before).any(1), ~held)

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
        backward(parameter, 0)
        assert torch.equal(parameter.grad.ne(0).any(1), ~FROZEN)

    def test_do_not_travel_to_copies_and_hinder_none(self):
        module = nn.Linear(WIDTH, NUM_ROWS, bias=False)
        freeze = freeze_rows(module, "weight", FROZEN)
        for other in (copy.deepcopy(module), torch.load(saved(module), weights_only=False)):
            assert not freezes_of(other)
            before = other.weight.detach().clone()
            backward(other.weight, 0)
            OPTIMIZERS["AdamW"](other.weight).step()
            assert other.weight.ne(before).any(1).all()
            again = freeze_rows(other, "weight", ~FROZEN)
            assert freezes_of(other) == [again] and freezes_of(module) == [freeze]

    def test_are_not_held_by_a_copy_of_their_handle(self):
        module = random_module()
        freeze = freeze_rows(module, "weight", FROZEN)
        other = copy.deepcopy(freeze)
        other.remove()
        with pytest.raises(RuntimeError, match="no longer frozen"):
            other.set_rows(~FROZEN)
        assert freezes_of(module) == [freeze] and torch.equal(freeze.rows, FROZEN)

    def test_for_the_steps_of_one_optimizer_stop_those_of_others(self):
        module, other = random_module(), random_module()
        own = OPTIMIZERS["AdamW"](module.weight)
        freeze = freeze_rows(module, "weight", FROZEN, optimizer=own)
        before = module.weight.detach().clone()
        with pytest.raises(RuntimeError, match="another optimizer"):
            OPTIMIZERS["SGD"](module.weight).step()
        OPTIMIZERS["SGD"](other.weight).step()
        backward(module.weight, 0)
        own.step()
        assert torch.equal(module.weight.ne(before).any(1), ~FROZEN)
        del own
        gc.collect()
        with pytest.raises(RuntimeError, match="another optimizer"):
            OPTIMIZERS["SGD"](module.weight).step()
        freeze.remove()
        OPTIMIZERS["SGD"](module.weight).step()
        assert module.weight.ne(before).any(1)[~FROZEN].all()

    def test_a_parameter_that_took_the_place_is_not_moved(self):
        module = nn.Linear(WIDTH, NUM_ROWS, bias=False)
        freeze = freeze_rows(module, "weight", FROZEN)
        module.weight = random_parameter()
        before = module.weight.detach().clone()
        optimizer = OPTIMIZERS["AdamW"](module.weight)
        backward(module.weight, 0)
        with pytest.raises(RuntimeError, match="another parameter has taken its place"):
            optimizer.step()
        assert not vars(optimizer).get(frozen_rows.SAVED_ROWS)
        assert torch.equal(module.weight, before)
        OPTIMIZERS["AdamW"](random_parameter()).step()  # another's business
        again = freeze_rows(module, "weight", FROZEN)
        optimizer.step()
        assert torch.equal(module.weight[FROZEN], before[FROZEN])
        again.remove()
        freeze.remove()
        optimizer.step()
        assert module.weight.ne(before).all()

    @pytest.mark.parametrize(("rows", "dim"), [(FROZEN[:-1], 0), (FROZEN.long(), 0), (FROZEN, 1), ([True] * 11, 0)])
    def test_of_another_size_are_refused(self, rows, dim):
        module = random_module()
        with pytest.raises(ValueError, match="`rows`"):
            freeze_rows(module, "weight", rows, dim)
        assert not freezes_of(module) and not module.weight._post_accumulate_grad_hooks
        freeze = freeze_rows(module, "weight", FROZEN)
        with pytest.raises(ValueError, match="`rows`"):
            freeze.set_rows(FROZEN[:-1])
        assert torch.equal(freeze.rows, FROZEN)

    def test_go_with_the_parameter_and_do_not_hold_it(self):
        """Without the garbage collector: a table may take most of the memory."""
        module = random_module()
        freeze = freeze_rows(module, "weight", FROZEN)
        optimizer = OPTIMIZERS["AdamW"](module.weight)
        backward(module.weight, 0)
        optimizer.step()
        references = [weakref.ref(module), weakref.ref(module.weight)]
        gc.disable()
        try:
            del module, optimizer
            assert [reference() for reference in references] == [None, None]
        finally:
            gc.enable()
        freeze.remove()
        with pytest.raises(RuntimeError, match="no longer frozen"):
            freeze.set_rows(FROZEN)
