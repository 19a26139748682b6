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
"""Frozen experts stay to the bit what they were, whatever trains, and all others train as if these had been put back by hand."""

import copy
import gc
import io
import math
import re
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from release_names import CHECKPOINTING
from tiny_models import random_tokens, tiny_config
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.testing import assert_close
from torch.utils.data import DataLoader
from trainer_worker import copy_of_state, counting_sequences, logged, pad_right, small_model, train, trainer_of
from transformers import TrainerCallback
from transformers.optimization import Adafactor
from two_processes import run_on_two_processes, save_parts

from modeling_peer import PeerForCausalLM, RowAdamW, expert_parameter_groups
from modeling_peer.analysis.expert_background import ExpertBackground
from modeling_peer.analysis.expert_sets import find_expert_sets
from modeling_peer.continual.freezing import freeze_experts
from modeling_peer.expert_table import ExpertTable
from modeling_peer.feed_forward_peer import PeerFeedForward
from modeling_peer.optim import frozen_rows
from modeling_peer.optim.frozen_rows import freeze_rows


NUM_ROWS, WIDTH = 11, 5
FROZEN = torch.arange(NUM_ROWS) % 3 != 1


def rows_by_row_adamw(parameter):
    return RowAdamW([{"params": [parameter], "rows": True}], lr=0.05, weight_decay=0.1)


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW([p], lr=0.05, weight_decay=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW([p], lr=0.05, weight_decay=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW([p], lr=0.05, weight_decay=0.1, fused=True),
    "RowAdamW": rows_by_row_adamw,
    "RowAdamW without rows": lambda p: RowAdamW([p], lr=0.05, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD([p], lr=0.05),
    "SGD upwards": lambda p: torch.optim.SGD([p], lr=0.05, maximize=True),
    "SGD with decay": lambda p: torch.optim.SGD([p], lr=0.05, weight_decay=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD([p], lr=0.05, momentum=0.9),
    "Adafactor": lambda p: Adafactor([p], lr=0.05, relative_step=False, weight_decay=0.1),
}
OF_SPARSE_GRADIENTS = {
    "RowAdamW": rows_by_row_adamw,
    "SGD": OPTIMIZERS["SGD"],
    "SGD with momentum": OPTIMIZERS["SGD with momentum"],
    "SparseAdam": lambda p: torch.optim.SparseAdam([p], lr=0.05),
}


def random_parameter(shape=(NUM_ROWS, WIDTH)):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def bits(tensor):
    return tensor.detach().view(torch.int32)


def backward(parameter, step, sparse=False):
    """Of something with a gradient in every row, or in some, some of them more than once."""
    generator = torch.Generator().manual_seed(step)
    if sparse:
        rows = torch.randint(len(parameter), (8,), generator=generator)
        F.embedding(rows, parameter, sparse=True).square().sum().backward()
    else:
        (parameter * torch.randn(parameter.shape, generator=generator)).square().sum().backward()


def without_rows(gradient, rows):
    """A gradient whose frozen rows are zeros, `rows` being True there; another tensor."""
    if not gradient.is_sparse:
        return torch.where(rows[:, None], 0.0, gradient)
    values = torch.where(rows[gradient._indices()[0], None], 0.0, gradient._values())
    return torch.sparse_coo_tensor(gradient._indices().clone(), values, gradient.shape, check_invariants=True)


def put_back_by_hand(parameter, step):
    """Makes a step with frozen rows by the letter: their gradient is zeroed, and they are put back after it."""
    parameter.grad = without_rows(parameter.grad, FROZEN)
    before = parameter.detach().clone()
    step()
    parameter.data = torch.where(FROZEN[:, None], before, parameter.data)


CASES = [("dense", name) for name in OPTIMIZERS] + [("sparse", name) for name in OF_SPARSE_GRADIENTS]


class TestRows:
    @pytest.mark.parametrize(("layout", "name"), CASES)
    def test_stay_and_others_move_as_by_hand(self, layout, name):
        sparse = layout == "sparse"
        parameter, other = random_parameter(), random_parameter()
        make = (OF_SPARSE_GRADIENTS if sparse else OPTIMIZERS)[name]
        optimizer, by_hand = make(parameter), make(other)
        for step in range(30):
            if step == 5:
                for each in (parameter, other):
                    each.data[0, 0] = -0.0  # to which even adding a zero may do something
                before = parameter.detach().clone()
                assert torch.equal(before, other)
                freeze_rows(parameter, FROZEN)
            for each, its_optimizer in ((parameter, optimizer), (other, by_hand)):
                its_optimizer.zero_grad()
                backward(each, step, sparse)
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
        state_class = frozen_rows._FrozenRowsOfParameter
        original = state_class.copy_of_rows
        monkeypatch.setattr(state_class, "copy_of_rows", lambda *args: copied.append(1) or original(*args))
        parameter = random_parameter()
        freeze_rows(parameter, FROZEN)
        optimizer = OPTIMIZERS[name](parameter)
        backward(parameter, 0)
        optimizer.step()
        assert bool(copied) == copies
        optimizer.zero_grad()
        optimizer.step()  # has no gradient to step with
        assert len(copied) == copies
        assert not any(frozen_rows._SAVED.get(optimizer, []))

    @pytest.mark.parametrize("sparse", [False, True])
    def test_do_not_count_in_the_norm(self, sparse):
        parameter, other = random_parameter(), random_parameter()
        freeze_rows(parameter, FROZEN)
        for each in (parameter, other):
            backward(each, 0, sparse)
            backward(each, 1, sparse)
        kept = other.grad.to_dense()[~FROZEN]
        assert 0 < kept.norm() < 0.9 * other.grad.to_dense().norm()
        assert_close(parameter.grad.to_dense()[~FROZEN], kept, rtol=0, atol=0)
        assert_close(clip_grad_norm_([parameter], 1e-3), kept.norm())

    def test_along_another_dimension(self):
        parameter = random_parameter((2, 3, 7, 4))
        optimizer = OPTIMIZERS["AdamW"](parameter)
        columns = torch.arange(7) < 4
        freeze_rows(parameter, columns, dim=-2)
        before = parameter.detach().clone()
        for step in range(3):
            backward(parameter, step)
            assert not parameter.grad[:, :, columns].any()
            optimizer.step()
        assert torch.equal(parameter[:, :, columns], before[:, :, columns])
        assert parameter.ne(before)[:, :, ~columns].all()

    @pytest.mark.parametrize("name", ["AdamW", "RowAdamW"])
    def test_stay_where_zeros_did_not_last(self, name):
        """A norm that is not a number makes clipping leave none, and a gradient may be set by hand."""
        parameter = random_parameter()
        freeze_rows(parameter, FROZEN)
        optimizer, before = OPTIMIZERS[name](parameter), parameter.detach().clone()
        backward(parameter, 0)
        parameter.grad[1, 0] = math.nan
        clip_grad_norm_([parameter], 1.0)
        assert parameter.grad.isnan().all()
        optimizer.step()
        assert torch.equal(parameter[FROZEN], before[FROZEN])
        assert parameter[~FROZEN].isnan().all()
        parameter = random_parameter()
        freeze_rows(parameter, FROZEN)
        parameter.grad = torch.ones_like(parameter)
        OPTIMIZERS[name](parameter).step()
        assert torch.equal(parameter[FROZEN], before[FROZEN])

    @pytest.mark.parametrize("by_name", [False, True])
    @pytest.mark.parametrize("name", ["AdamW", "RowAdamW"])
    def test_stay_in_a_step_with_a_closure(self, name, by_name):
        parameter = random_parameter()
        freeze_rows(parameter, FROZEN)
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

        parameter = random_parameter()
        freeze_rows(parameter, FROZEN)
        OPTIMIZERS["AdamW"](random_parameter())  # so that its step has hooks too
        optimizer, before = Shrinking([parameter]), parameter.detach().clone()
        for step in range(2):
            backward(parameter, step)
            optimizer.step()
        assert torch.equal(parameter[FROZEN], before[FROZEN])

    def test_a_step_that_failed_takes_nothing_back_later(self):
        parameter = random_parameter()
        cause = freeze_rows(parameter, FROZEN)
        optimizer = torch.optim.AdamW([parameter], lr=0.05, weight_decay=0.1)

        def fails():
            raise MemoryError

        with pytest.raises(MemoryError):
            optimizer.step(fails)
        cause.remove()
        before = parameter.detach().clone()
        backward(parameter, 0)
        optimizer.step()
        assert parameter.ne(before).all()

    def test_columns_are_held_where_rows_move_by_their_gradients(self):
        parameter = random_parameter()
        columns = torch.arange(WIDTH) % 2 == 0
        optimizer = rows_by_row_adamw(parameter)
        backward(parameter, 0)
        optimizer.step()  # momentum from before
        freeze_rows(parameter, columns, dim=1)
        before = parameter.detach().clone()
        optimizer.zero_grad()
        backward(parameter, 1)
        optimizer.step()
        assert torch.equal(bits(parameter[:, columns]), bits(before[:, columns]))
        assert parameter[:, ~columns].ne(before[:, ~columns]).all()

    def test_causes_add_up_and_end_in_any_order(self):
        first, second = torch.arange(NUM_ROWS) < 4, torch.arange(NUM_ROWS) >= 9
        for order in (0, 1), (1, 0):
            parameter = random_parameter()
            optimizer = OPTIMIZERS["AdamW"](parameter)
            causes = [freeze_rows(parameter, first), freeze_rows(parameter, second)]
            assert torch.equal(causes[0].frozen_by_others(), second)
            held = [first | second, (second, first)[order[0]], torch.zeros_like(first)]
            for step, rows in enumerate(held):
                before = parameter.detach().clone()
                optimizer.zero_grad()
                backward(parameter, step)
                assert torch.equal(parameter.grad.ne(0).any(1), ~rows)
                optimizer.step()
                assert torch.equal(parameter.ne(before).any(1), ~rows)
                if step < 2:
                    causes[order[step]].remove()
                    causes[order[step]].remove()  # once more does nothing
            with pytest.raises(RuntimeError, match="frozen no more"):
                causes[0].set_rows(first)

    def test_of_a_whole_parameter_may_become_fewer(self):
        parameter = random_parameter()
        cause = freeze_rows(parameter, torch.ones(NUM_ROWS, dtype=torch.bool))
        cause.set_rows(FROZEN)
        assert parameter.requires_grad

    def test_may_change(self):
        parameter = random_parameter()
        optimizer = OPTIMIZERS["AdamW"](parameter)
        rows = FROZEN.clone()
        cause = freeze_rows(parameter, rows)
        rows.logical_not_()  # its own business
        freeze_rows(parameter, torch.zeros_like(FROZEN))
        backward(parameter, 0)
        assert torch.equal(parameter.grad.ne(0).any(1), ~FROZEN)
        for step, held in enumerate([FROZEN, ~FROZEN, torch.zeros_like(FROZEN)]):
            cause.set_rows(held)
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
            parameter = random_parameter().requires_grad_(required)
            causes = [freeze_rows(parameter, rows) for rows in (everything, FROZEN, everything)]
            for index in order:
                assert parameter.requires_grad == (required and not {0, 2} & set(order[order.index(index) :]))
                causes[index].remove()
            assert parameter.requires_grad == required

    def test_a_whole_parameter_stays_with_a_gradient_from_before(self):
        parameter = random_parameter()
        optimizer, before = OPTIMIZERS["AdamW"](parameter), parameter.detach().clone()
        backward(parameter, 0)
        freeze_rows(parameter, torch.ones(NUM_ROWS, dtype=torch.bool))
        optimizer.step()
        assert torch.equal(parameter, before)

    def test_of_what_requires_no_gradient_yet(self):
        parameter = random_parameter().requires_grad_(False)
        freeze_rows(parameter, FROZEN)
        assert not parameter.requires_grad
        parameter.requires_grad_(True)
        backward(parameter, 0)
        assert torch.equal(parameter.grad.ne(0).any(1), ~FROZEN)

    def test_survive_a_cast(self):
        module = nn.Linear(WIDTH, NUM_ROWS, bias=False)
        freeze_rows(module.weight, FROZEN)
        module.double()
        before = module.weight.detach().clone()
        backward(module.weight, 0)
        OPTIMIZERS["AdamW"](module.weight).step()
        assert torch.equal(module.weight[FROZEN], before[FROZEN])

    def test_do_not_travel_to_copies_and_hinder_none(self):
        module = nn.Linear(WIDTH, NUM_ROWS, bias=False)
        freeze_rows(module.weight, FROZEN, owner=module)
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
            before = other.weight.detach().clone()
            backward(other.weight, 0)
            OPTIMIZERS["AdamW"](other.weight).step()
            assert other.weight.ne(before).any(1).all()

    def test_are_forgotten_with_their_parameter(self):
        module = nn.Linear(WIDTH, NUM_ROWS, bias=False)
        freeze_rows(module.weight, FROZEN, owner=module)
        optimizer = OPTIMIZERS["AdamW"](module.weight)
        backward(module.weight, 0)
        optimizer.step()
        number, reference = len(frozen_rows._OWNERS), weakref.ref(module.weight)
        del module, optimizer
        gc.collect()
        assert reference() is None
        assert len(frozen_rows._OWNERS) == number - 1

    def test_a_parameter_that_took_the_place_is_not_moved(self):
        module = nn.Linear(WIDTH, NUM_ROWS, bias=False)
        cause = freeze_rows(module.weight, FROZEN, owner=module)
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
        again = freeze_rows(module.weight, FROZEN)
        optimizer.step()
        assert torch.equal(module.weight[FROZEN], before[FROZEN])
        again.remove()
        cause.remove()
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
        parameter = random_parameter()
        with pytest.raises(ValueError, match=re.escape(message)):
            freeze_rows(parameter, rows, dim)
        assert parameter not in frozen_rows._FROZEN
        assert not parameter._post_accumulate_grad_hooks

    def test_what_else_is_refused(self):
        with pytest.raises(ValueError, match="Rows of an `nn.Parameter` can be frozen, got a Tensor"):
            freeze_rows(torch.ones(NUM_ROWS, WIDTH), FROZEN)
        parameter = random_parameter()
        cause = freeze_rows(parameter, FROZEN)
        with pytest.raises(ValueError, match="`dim` must be 0, along which rows of this parameter are frozen, got 1"):
            freeze_rows(parameter, torch.ones(WIDTH, dtype=torch.bool), dim=1)
        with pytest.raises(
            ValueError, match=re.escape("of shape (11,), one for each row, got torch.bool of shape (5,)")
        ):
            cause.set_rows(torch.ones(WIDTH, dtype=torch.bool))
        assert torch.equal(frozen_rows._FROZEN[parameter].mask, FROZEN)


class FreezeLate(TrainerCallback):
    """Freezes experts after five steps; without the package, by the letter, if `by_hand`."""

    def __init__(self, by_hand=False, **conditions):
        self.by_hand, self.conditions, self.before = by_hand, conditions, None

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 5:
            self.before = copy_of_state(model)
            if not self.by_hand:
                freeze_experts(model, **self.conditions)
                return
            for table in tables_of(model):
                self.hold_by_hand(table, torch.arange(table.num_embeddings) % 2 == 0, optimizer.optimizer)

    def hold_by_hand(self, table, rows, optimizer):
        before = table.weight.detach().clone()

        def zero(weight):
            weight.grad = without_rows(weight.grad, rows)

        def put_back(*args):
            table.weight.data[rows] = before[rows]

        table.weight.register_post_accumulate_grad_hook(zero)
        optimizer.register_step_post_hook(put_back)


def tables_of(model):
    return [module for module in model.modules() if isinstance(module, ExpertTable)]


def trainer_of_experts(folder, optimizer="stock", callbacks=None, seed=0, **options):
    model = small_model(
        "peer", "pkm", "peer", gated_experts=True, sparse_expert_gradients=optimizer == "sparse rows", seed=seed
    )
    options = {"max_steps": 30, "weight_decay": 0.1, "max_grad_norm": 0.2, **options}
    trainer = trainer_of(model, folder, counting_sequences(40), callbacks=callbacks, **options)
    if optimizer != "stock":
        trainer.optimizer = RowAdamW(expert_parameter_groups(model, learning_rate=1e-2, weight_decay=0.1))
    return trainer


EVEN = range(0, 64, 2)


class TestTrainer:
    @pytest.mark.parametrize("optimizer", ["stock", "dense rows", "sparse rows"])
    @pytest.mark.parametrize(
        "options",
        [{}, {"gradient_accumulation_steps": 2, CHECKPOINTING: True}],
        ids=["plain", "accumulated"],
    )
    def test_frozen_experts_stay_and_all_else_trains_as_by_hand(self, tmp_path, optimizer, options):
        late, by_hand = FreezeLate(experts=EVEN), FreezeLate(by_hand=True)
        trainer, other = (
            trainer_of_experts(tmp_path, optimizer, [callback], **options) for callback in (late, by_hand)
        )
        trainer.train()
        other.train()
        state = trainer.model.state_dict()
        compared = 0
        for name, table in trainer.model.named_modules():
            if isinstance(table, ExpertTable):
                before = late.before[f"{name}.weight"]
                assert torch.equal(table.weight[::2], before[::2])
                assert table.weight[1::2].ne(before[1::2]).any(1).sum() > 20
                compared += 1
        assert compared == 7
        for name, tensor in other.model.state_dict().items():
            assert torch.equal(state[name], tensor), name
        # Of the gradients that are not frozen: what is logged, and what is clipped.
        assert logged(trainer, "grad_norm") == logged(other, "grad_norm")
        assert min(logged(trainer, "grad_norm")) > 0.2
        assert logged(trainer) == logged(other)

    @pytest.mark.parametrize("optimizer", ["stock", "sparse rows"])
    def test_a_resumed_training_that_freezes_anew_is_the_unbroken_one(self, tmp_path, optimizer):
        options = {"save_strategy": "steps", "save_steps": 12, "gradient_accumulation_steps": 2}
        unbroken = trainer_of_experts(tmp_path, optimizer, **options)
        freeze_experts(unbroken.model, EVEN, layers=[0, 1])
        freeze_experts(unbroken.model, layers=2)
        before = copy_of_state(unbroken.model)
        unbroken.train()
        resumed = trainer_of_experts(tmp_path, optimizer, seed=1, **options)
        freeze_experts(resumed.model, EVEN, layers=[0, 1])
        freeze_experts(resumed.model, layers=2)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
        assert resumed.state.global_step == 30
        state = resumed.model.state_dict()
        for name, tensor in unbroken.model.state_dict().items():
            assert torch.equal(state[name], tensor), name
        for name, table in resumed.model.named_modules():
            if isinstance(table, ExpertTable):
                rows = slice(None) if "layers.2" in name else slice(0, None, 2)
                assert torch.equal(table.weight[rows], before[f"{name}.weight"][rows])
        assert logged(resumed, "grad_norm") == logged(unbroken, "grad_norm")

    def test_an_adapter_around_a_table_hides_nothing(self):
        model = small_model()
        frozen = freeze_experts(get_peft_model(model, LoraConfig(target_modules=["router.query_proj"])), EVEN)
        assert frozen.num_frozen == {"base_model.model.model.layers.1.mlp.expert_pool": 32}


def moved_rows(model, folder, **options):
    """Of each table, by its name, which rows a training of a few steps with decay moves."""
    before = copy_of_state(model)
    train(model, folder, max_steps=2, weight_decay=0.1, **options)
    return {
        name: table.weight.ne(before[f"{name}.weight"]).any(1)
        for name, table in model.named_modules()
        if isinstance(table, ExpertTable)
    }


class TestSelection:
    def test_by_layer(self, tmp_path):
        model = small_model("peer", "pkm", "peer", gated_experts=True)
        frozen = freeze_experts(model, layers=[0, 1])
        assert frozen.num_frozen == {"model.layers.0.mlp.expert_pool": 64, "model.layers.1.mlp": 64}
        assert not any(table.weight.requires_grad for table in tables_of(model)[:4])
        for name, rows in moved_rows(model, tmp_path).items():
            assert rows.all() if "layers.2" in name else not rows.any()
        frozen.remove()
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert all(rows.all() for rows in moved_rows(model, tmp_path).values())

    @pytest.mark.parametrize(
        "experts",
        [
            [3, 9, 3],
            torch.tensor([3, 9]),
            (torch.arange(64) == 3) | (torch.arange(64) == 9),
            [number in (3, 9) for number in range(64)],
            range(3, 10, 6),
            {9, 3},
        ],
    )
    def test_by_number(self, tmp_path, experts):
        model = small_model("peer", "peer")
        frozen = freeze_experts(model, experts)
        assert frozen.num_frozen == {f"model.layers.{layer}.mlp.expert_pool": 2 for layer in (0, 1)}
        for rows in moved_rows(model, tmp_path).values():
            assert (~rows).nonzero()[:, 0].tolist() == [3, 9]

    def test_by_an_iterator_in_each_layer(self):
        frozen = freeze_experts(small_model("peer", "peer"), iter([9, 3]))
        assert set(frozen.num_frozen.values()) == {2}

    def test_one_by_its_number(self, tmp_path):
        model = small_model()
        freeze_experts(model, 7)
        for rows in moved_rows(model, tmp_path).values():
            assert (~rows).nonzero()[:, 0].tolist() == [7]

    def test_by_usage(self, tmp_path):
        model = small_model("peer", "peer")
        counts = {f"model.layers.{i}.mlp.expert_pool": (torch.arange(64) + i) % 4 for i in (0, 1)}
        background = ExpertBackground(counts, 3)
        frozen = freeze_experts(model, range(32), used_in=background, min_documents=2)
        assert set(frozen.num_frozen.values()) == {16}
        for name, rows in moved_rows(model, tmp_path).items():
            used = counts[name.rpartition(".")[0]] >= 2
            assert torch.equal(~rows, used & (torch.arange(64) < 32))
        frozen.remove()
        assert set(freeze_experts(model, used_in=background).num_frozen.values()) == {48}

    def test_of_a_shared_pool(self, tmp_path):
        model = small_model("peer", "dense", "peer", share_experts_across_layers=True)
        before = [parameter.requires_grad for parameter in model.parameters()]
        with pytest.raises(
            ValueError, match=re.escape("`layers` must name all or none of [0, 2], as they share one pool")
        ):
            freeze_experts(model, EVEN, layers=[2])
        assert [parameter.requires_grad for parameter in model.parameters()] == before
        for layers in (None, [0, 2]):
            frozen = freeze_experts(model, EVEN, layers=layers)
            assert frozen.num_frozen == {"model.expert_pool": 32}
            assert all(torch.equal(~rows, torch.arange(64) % 2 == 0) for rows in moved_rows(model, tmp_path).values())
            frozen.remove()
        with pytest.raises(
            ValueError, match="shares its experts with other layers, and PeerDecoderLayer does not hold them"
        ):
            freeze_experts(model.model.layers[0])

    def test_added_experts_follow_those_of_before(self, tmp_path):
        from modeling_peer.continual.growth import add_experts

        model = small_model("peer", "dense", "peer")
        add_experts(model, 16, layers=[2], mode="protected")
        model.requires_grad_(True)
        (_, other), (name, grown) = find_expert_sets(model).items()
        assert (other.num_experts, grown.num_experts) == (64, 80)
        frozen = freeze_experts(model, range(60, 70), layers=[2])
        assert frozen.num_frozen == {name: 10}
        rows = moved_rows(model, tmp_path)
        for table in ("up_proj", "down_proj"):
            assert (~rows[f"{name}.{table}"]).nonzero()[:, 0].tolist() == [60, 61, 62, 63]
            assert (~rows[f"{name}.added.0.{table}"]).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5]


class Host(nn.Module):
    """A model of another kind, with layers of its own that it calls in its own way."""

    def __init__(self):
        super().__init__()
        config = tiny_config("peer")
        self.embed = nn.Embedding(64, config.hidden_size)
        self.h = nn.ModuleList([nn.ModuleDict({"mlp": PeerFeedForward(config, 0)}) for _ in range(3)])
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, input_ids, attention_mask):
        hidden_states = self.embed(input_ids)
        for layer in self.h:
            hidden_states = hidden_states + layer["mlp"](hidden_states, padding_mask=attention_mask)
        return hidden_states


def test_experts_in_any_module():
    torch.manual_seed(0)
    host, corpus = Host(), [{"input_ids": random_tokens(length, seed=length)} for length in (2, 3, 5)]
    labelled = [{**example, "labels": example["input_ids"]} for example in corpus]
    background = ExpertBackground.measure(host, DataLoader(labelled, 3, collate_fn=pad_right), progress_bar=False)
    alone = ExpertBackground.measure(host, corpus, batch_size=1, progress_bar=False)
    assert background.sizes == {f"h.{layer}.mlp.expert_pool": 36 for layer in range(3)}
    assert all(torch.equal(background.document_counts[name], alone.document_counts[name]) for name in alone.sizes)
    frozen = freeze_experts(host, layers=[1, 2], used_in=background)
    used = background.used("h.2.mlp.expert_pool")
    assert frozen.num_frozen["h.2.mlp.expert_pool"] == used.sum() < 36
    before = copy_of_state(host)
    host(random_tokens(4, 12), torch.ones(4, 12)).square().sum().backward()
    torch.optim.AdamW(host.parameters(), weight_decay=0.1).step()
    for layer in range(3):
        moved = host.h[layer]["mlp"].expert_pool.down_proj.weight.ne(
            before[f"h.{layer}.mlp.expert_pool.down_proj.weight"]
        )
        held = background.used(f"h.{layer}.mlp.expert_pool") if layer else torch.zeros(36, dtype=torch.bool)
        assert torch.equal(moved.any(1), ~held)


UNKNOWN = [
    ({"layers": [1, 5]}, "`layers` must be some of [0, 2], the layers with experts, got [1, 5]"),
    ({"layers": []}, "`layers` must be some of [0, 2], the layers with experts, got []"),
    ({"experts": [3, 64, 99, -1]}, "has experts 0 to 63, but `experts` has 3 others, [64, 99, -1] among them"),
    (
        {"experts": torch.ones(63, dtype=torch.bool)},
        "`experts` must be of shape (64,), as model.layers.0.mlp.expert_pool",
    ),
    ({"experts": [0.5]}, "`experts` must be numbers of experts or a bool mask, got [0.5]"),
    ({"experts": ["3"]}, "`experts` must be numbers of experts or a bool mask, got ['3']"),
    ({"used_in": "corpus"}, "`used_in` must be an ExpertBackground, got a str"),
    ({"min_documents": 5}, "`min_documents` is of the documents of `used_in`, got 5 without it"),
    ({"min_documents": 0}, "`min_documents` must be a whole number, at least 1, got 0"),
    ({"experts": []}, "`experts` must be numbers of experts or a bool mask, got tensor([])"),
    (
        {"used_in": ExpertBackground({"model.layers.0.mlp.expert_pool": torch.ones(64, dtype=torch.int64)}, 1)},
        "found {'model.layers.0.mlp.expert_pool': 64}, expected {'model.layers.0.mlp.expert_pool': 64, "
        "'model.layers.2.mlp.expert_pool': 64}",
    ),
]


@pytest.mark.parametrize(("conditions", "message"), UNKNOWN)
def test_what_is_unknown_is_refused_and_changes_nothing(conditions, message):
    model = small_model("peer", "dense", "peer")
    before = copy_of_state(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        freeze_experts(model, **conditions)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for parameter in model.parameters():
        assert parameter.requires_grad
        assert parameter not in frozen_rows._FROZEN
        assert not parameter._post_accumulate_grad_hooks


def test_other_things_refused():
    model = small_model("dense", "moe")
    with pytest.raises(ValueError, match="PeerForCausalLM has no PEER or PKM layer"):
        freeze_experts(model)
    model = small_model()
    background = ExpertBackground({"model.layers.1.mlp.expert_pool": torch.ones(64, dtype=torch.int64)}, 1)
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match=f"`min_documents` must be a whole number, at least 1, got {wrong}"):
            freeze_experts(model, used_in=background, min_documents=wrong)


# What two processes do, from here on: half of the rows of each batch to each.
BATCHES = [random_tokens(4, 12, seed=seed) for seed in range(8)]


def joint_model(sparse):
    torch.manual_seed(0)
    return PeerForCausalLM(tiny_config("peer", "pkm", sparse_expert_gradients=sparse)).train()


def frozen_training(sparse, rank=0, world_size=1, **wrapping):
    """What is left of a model after three steps, a freeze of every second expert, and five more; and the norms."""
    model = joint_model(sparse)
    groups = expert_parameter_groups(model, learning_rate=1e-2, weight_decay=0.1)
    # With a small eps, Adam turns the rounding of a vanishing gradient into a step of full size.
    if sparse:
        optimizer = RowAdamW(groups, eps=1e-3)
    else:
        optimizer = torch.optim.AdamW(
            [p for group in groups for p in group["params"]], lr=1e-2, eps=1e-3, weight_decay=0.1
        )
    wrapped = DistributedDataParallel(model, **wrapping) if world_size > 1 else model
    norms, before = [], None
    for step, batch in enumerate(BATCHES):
        if step == 3:
            freeze_experts(model, range(0, 36, 2))
            before = copy_of_state(model)
        optimizer.zero_grad()
        own = batch.chunk(world_size)[rank]
        wrapped(input_ids=own, labels=own).loss.backward()
        norms.append(clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
    return {"before": before, "after": copy_of_state(model), "norms": torch.stack(norms)}


def data_parallel(rank):
    return {
        "dense": frozen_training(False, rank, 2),
        "sparse": frozen_training(True, rank, 2),
        "view": frozen_training(False, rank, 2, gradient_as_bucket_view=True),
    }


def fully_sharded(rank):
    """The error of a model that is sharded after a freeze, and that of one before; rows are where they were."""
    errors = []
    model = joint_model(False)
    freeze_experts(model, range(0, 36, 2))
    fully_shard(model)
    before = {name: tensor.full_tensor().clone() for name, tensor in model.state_dict().items() if "_proj" in name}
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    own = BATCHES[0].chunk(2)[rank]
    model(input_ids=own, labels=own).loss.backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        errors.append(str(error))
    after = model.state_dict()
    assert all(torch.equal(after[name].full_tensor(), tensor) for name, tensor in before.items())
    try:
        freeze_experts(model, range(0, 36, 2))
    except ValueError as error:
        errors.append(str(error))
    return errors


def flat(rank):
    """The same of the first FSDP, which takes parameters out of their modules."""
    model = joint_model(False)
    freeze_experts(model, range(0, 36, 2))
    model = FullyShardedDataParallel(model, use_orig_params=False, device_id=torch.device("cpu"))
    own = BATCHES[0].chunk(2)[rank]
    model(input_ids=own, labels=own).loss.backward()
    try:
        torch.optim.AdamW(model.parameters(), weight_decay=0.1).step()
    except RuntimeError as error:
        return [str(error)]
    return []


def tensor_parallel(rank):
    table = nn.Parameter(distribute_tensor(random_parameter().detach(), init_device_mesh("cpu", (2,)), [Shard(1)]))
    try:
        freeze_rows(table, FROZEN)
    except ValueError as error:
        return [str(error)]
    return []


PARTS = (data_parallel, fully_sharded, flat, tensor_parallel)


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    run_on_two_processes(save_parts, str(folder), PARTS)
    return folder


@pytest.mark.parametrize("rank", [0, 1])
class TestDistributed:
    @pytest.mark.parametrize("layout", ["dense", "sparse", "view"])
    def test_data_parallel_training_holds_them_and_is_that_of_the_joint_batch(self, distributed, layout, rank):
        found = torch.load(distributed / f"data_parallel-{rank}")[layout]
        tables = [name for name in found["before"] if "expert_pool" in name or "values" in name]
        assert len(tables) == 3
        for name in tables:
            before, after = found["before"][name], found["after"][name]
            assert torch.equal(after[::2], before[::2])
            assert after.ne(before).any(1).sum() > 12
        expected = frozen_training(layout == "sparse")
        assert_close(found["norms"], expected["norms"], rtol=1e-4, atol=1e-5)
        for name, tensor in expected["after"].items():
            assert_close(found["after"][name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")

    def test_split_tables_are_refused(self, distributed, rank):
        late, early = torch.load(distributed / f"fully_sharded-{rank}")
        assert "another parameter has taken its place since, of shape (36, 24) (DTensor)" in late
        (flat_late,) = torch.load(distributed / f"flat-{rank}")
        assert "another parameter has taken its place since, of shape" in flat_late
        assert (
            "splits over processes cannot be frozen, got one of shape (36, 24) with placements (Shard(dim=0),)"
            in early
        )
        (error,) = torch.load(distributed / f"tensor_parallel-{rank}")
        assert "with placements (Shard(dim=1),)" in error
