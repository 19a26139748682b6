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
"""Frozen rows keep their values to the bit, whatever optimizer steps, and all others move as without the freeze."""

import copy
import gc
import io
import math
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
from rows_by_hand import (
    FROZEN,
    NUM_ROWS,
    OF_SPARSE_GRADIENTS,
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
from modeling_peer.optim.frozen_rows import freeze_rows, freezes_of, require_gradients


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


CASES = [("dense", name) for name in OPTIMIZERS] + [("sparse", name) for name in OF_SPARSE_GRADIENTS]
CASES += [("factored", name) for name in OPTIMIZERS]


class TestRows:
    @pytest.mark.parametrize(("layout", "name"), CASES)
    def test_stay_and_others_move_as_by_hand(self, layout, name):
        module, other = random_module(), random_parameter()
        parameter = module.weight
        make = (OF_SPARSE_GRADIENTS if layout == "sparse" else OPTIMIZERS)[name]
        optimizer, by_hand = make(parameter), make(other)
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

    @pytest.mark.parametrize(
        ("name", "copies"),
        [("AdamW", True), ("SGD with momentum", True), ("SGD with decay", True), ("RowAdamW", False), ("SGD", False)],
    )
    def test_are_copied_where_the_optimizer_moves_them(self, monkeypatch, name, copies):
        copied = []
        state_class = frozen_rows._FrozenParameter
        original = state_class.copy_of_rows
        monkeypatch.setattr(state_class, "copy_of_rows", lambda *args: copied.append(1) or original(*args))
        module = random_module()
        parameter = module.weight
        freeze_rows(module, "weight", FROZEN)
        optimizer = OPTIMIZERS[name](parameter)
        backward(parameter, 0)
        optimizer.step()
        assert bool(copied) == copies
        optimizer.zero_grad()
        optimizer.step()  # has no gradient to step with
        assert len(copied) == copies
        assert not any(vars(optimizer)[frozen_rows.SAVED_ROWS])

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
        freeze_rows(module, "weight", columns, dim=-2)
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

    def test_of_several_freezes_add_up_and_these_end_in_any_order(self):
        first, second = torch.arange(NUM_ROWS) < 4, torch.arange(NUM_ROWS) >= 9
        for order in (0, 1), (1, 0):
            module = random_module()
            parameter = module.weight
            optimizer = OPTIMIZERS["AdamW"](parameter)
            freezes = [freeze_rows(module, "weight", first), freeze_rows(module, "weight", second)]
            assert torch.equal(freezes[0].frozen_by_others(), second)
            held = [first | second, (second, first)[order[0]], torch.zeros_like(first)]
            for step, rows in enumerate(held):
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

    def test_of_a_whole_parameter_may_become_fewer(self):
        module = random_module()
        parameter = module.weight
        freeze = freeze_rows(module, "weight", torch.ones(NUM_ROWS, dtype=torch.bool))
        freeze.set_rows(FROZEN)
        assert parameter.requires_grad

    def test_may_change(self):
        module = random_module()
        parameter = module.weight
        optimizer = OPTIMIZERS["AdamW"](parameter)
        rows = FROZEN.clone()
        freeze = freeze_rows(module, "weight", rows)
        rows.logical_not_()  # its own business
        freeze_rows(module, "weight", torch.zeros_like(FROZEN))
        backward(parameter, 0)
        assert torch.equal(parameter.grad.ne(0).any(1), ~FROZEN)
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
            for index in order:
                assert parameter.requires_grad == (required and not {0, 2} & set(order[order.index(index) :]))
                freezes[index].remove()
            assert parameter.requires_grad == required

    def test_a_whole_parameter_stays_with_a_gradient_from_before(self):
        module = random_module()
        parameter = module.weight
        optimizer, before = OPTIMIZERS["AdamW"](parameter), parameter.detach().clone()
        backward(parameter, 0)
        freeze_rows(module, "weight", torch.ones(NUM_ROWS, dtype=torch.bool))
        optimizer.step()
        assert torch.equal(parameter, before)

    def test_of_what_requires_no_gradient_yet(self):
        module = random_module()
        parameter = module.weight.requires_grad_(False)
        freeze_rows(module, "weight", FROZEN)
        assert not parameter.requires_grad
        parameter.requires_grad_(True)
        backward(parameter, 0)
        assert torch.equal(parameter.grad.ne(0).any(1), ~FROZEN)

    def test_survive_a_cast(self):
        module = nn.Linear(WIDTH, NUM_ROWS, bias=False)
        freeze_rows(module, "weight", FROZEN)
        module.double()
        before = module.weight.detach().clone()
        backward(module.weight, 0)
        OPTIMIZERS["AdamW"](module.weight).step()
        assert torch.equal(module.weight[FROZEN], before[FROZEN])

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

    def test_of_a_state_dict_and_a_parameter_do_not_travel(self):
        module = random_module()
        freeze_rows(module, "weight", FROZEN)
        for saved_object in (module.state_dict(keep_vars=True), module.weight):
            found = torch.load(saved(saved_object), weights_only=True)
            (parameter,) = found.values() if isinstance(found, dict) else [found]
            assert torch.equal(parameter, module.weight) and not vars(parameter)

    def test_are_not_held_by_a_copy_of_their_handle(self):
        module = random_module()
        freeze = freeze_rows(module, "weight", FROZEN, holder=module)
        for other in (copy.deepcopy(freeze), pickle.loads(pickle.dumps(freeze))):
            other.remove()
            with pytest.raises(RuntimeError, match="no longer frozen"):
                other.set_rows(~FROZEN)
        assert freezes_of(module) == [freeze] and torch.equal(freeze.rows, FROZEN)

    def test_are_found_by_what_made_the_freeze(self):
        module = nn.Sequential(random_module())
        freezes = [freeze_rows(module[0], "weight", FROZEN, holder=holder) for holder in ("first", None, "first")]
        assert freezes_of(module[0]) == freezes and not freezes_of(module)
        assert [freeze.holder for freeze in freezes_of(module[0])] == ["first", None, "first"]

    def test_for_the_steps_of_one_optimizer_stop_those_of_others(self):
        module, other = random_module(), random_module()
        own = OPTIMIZERS["AdamW"](module.weight)
        freeze = freeze_rows(module, "weight", FROZEN, holder=module, optimizer=own)
        before = module.weight.detach().clone()
        with pytest.raises(RuntimeError, match=r"A Module .* another optimizer, a SGD, .* `remove\(\)`"):
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
        with pytest.raises(
            RuntimeError, match=re.escape("another parameter has taken its place since, of shape (11, 5)")
        ):
            optimizer.step()
        assert torch.equal(module.weight, before)
        OPTIMIZERS["AdamW"](random_parameter()).step()  # another's business
        again = freeze_rows(module, "weight", FROZEN)
        optimizer.step()
        assert torch.equal(module.weight[FROZEN], before[FROZEN])
        again.remove()
        freeze.remove()
        optimizer.step()
        assert module.weight.ne(before).all()

    @pytest.mark.parametrize(
        ("rows", "dim", "message"),
        [
            (
                FROZEN[:-1],
                0,
                "`rows` must be a torch.bool tensor of shape (11,), one for each row, got torch.bool of shape (10,)",
            ),
            (
                FROZEN.long(),
                0,
                "`rows` must be a torch.bool tensor of shape (11,), one for each row, got torch.int64 of",
            ),
            (
                FROZEN,
                1,
                "`rows` must be a torch.bool tensor of shape (5,), one for each row, got torch.bool of shape (11,)",
            ),
            ([True] * 11, 0, "`rows` must be a torch.bool tensor of shape (11,), one for each row, got [True, "),
            (FROZEN, 2, "`dim` must be a dimension of the parameter, of shape (11, 5), got 2"),
        ],
    )
    def test_of_another_size_are_refused(self, rows, dim, message):
        module = random_module()
        parameter = module.weight
        with pytest.raises(ValueError, match=re.escape(message)):
            freeze_rows(module, "weight", rows, dim)
        assert not freezes_of(module)
        assert not parameter._post_accumulate_grad_hooks

    def test_what_else_is_refused(self):
        with pytest.raises(ValueError, match="Rows of an `nn.Parameter` can be frozen, got a Tensor"):
            freeze_rows(SimpleNamespace(weight=torch.ones(NUM_ROWS, WIDTH)), "weight", FROZEN)
        module = random_module()
        freeze = freeze_rows(module, "weight", FROZEN)
        with pytest.raises(ValueError, match="`dim` must be 0, along which rows of this parameter are frozen, got 1"):
            freeze_rows(module, "weight", torch.ones(WIDTH, dtype=torch.bool), dim=1)
        with pytest.raises(
            ValueError, match=re.escape("of shape (11,), one for each row, got torch.bool of shape (5,)")
        ):
            freeze.set_rows(torch.ones(WIDTH, dtype=torch.bool))
        assert [found.rows.tolist() for found in freezes_of(module)] == [FROZEN.tolist()]


def test_required_gradients_outlast_the_end_of_an_earlier_freeze():
    for required in (True, False):
        module, other = random_module(), random_module()
        freeze = freeze_rows(module, "weight", torch.ones(NUM_ROWS, dtype=torch.bool))
        require_gradients([module.weight, other.weight], required)
        freeze.remove()
        assert module.weight.requires_grad == other.weight.requires_grad == required
