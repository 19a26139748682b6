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
"""Frozen experts keep their values, whatever trains, and all others train as if these had been put back by hand."""

import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from release_names import CHECKPOINTING
from rows_by_hand import without_rows
from table_gradients import DenseRowAdamW
from tiny_models import random_tokens, tiny_config
from torch import nn
from torch.utils.data import DataLoader
from trainer_worker import copy_of_state, counting_sequences, logged, pad_right, small_model, train, trainer_of
from transformers import TrainerCallback

from modeling_peer import RowAdamW, expert_parameter_groups
from modeling_peer.analysis.expert_background import ExpertBackground
from modeling_peer.analysis.expert_sets import find_expert_sets
from modeling_peer.continual.freezing import freeze_experts
from modeling_peer.expert_table import ExpertTable
from modeling_peer.feed_forward_peer import PeerFeedForward
from modeling_peer.optim.frozen_rows import freezes_of


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
    model = small_model("peer", "pkm", "peer", gated_experts=True, seed=seed)
    options = {"max_steps": 30, "weight_decay": 0.1, "max_grad_norm": 0.2, **options}
    trainer = trainer_of(model, folder, counting_sequences(40), callbacks=callbacks, **options)
    if optimizer != "stock":
        optimizer_class = DenseRowAdamW if optimizer == "dense rows" else RowAdamW
        trainer.optimizer = optimizer_class(expert_parameter_groups(model, learning_rate=1e-2, weight_decay=0.1))
    return trainer


EVEN = range(0, 64, 2)


class TestTrainer:
    @pytest.mark.parametrize("optimizer", ["stock", "dense rows", "rows"])
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

    @pytest.mark.parametrize("optimizer", ["stock", "rows"])
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
            [index in (3, 9) for index in range(64)],
            range(3, 10, 6),
            {9, 3},
        ],
    )
    def test_by_index(self, tmp_path, experts):
        model = small_model("peer", "peer")
        frozen = freeze_experts(model, experts)
        assert frozen.num_frozen == {f"model.layers.{layer}.mlp.expert_pool": 2 for layer in (0, 1)}
        for rows in moved_rows(model, tmp_path).values():
            assert (~rows).nonzero()[:, 0].tolist() == [3, 9]

    def test_by_an_iterator_in_each_layer(self):
        frozen = freeze_experts(small_model("peer", "peer"), iter([9, 3]), layers=iter([1, 0]))
        assert list(frozen.num_frozen.values()) == [2, 2]

    def test_none_sets_no_condition(self):
        frozen = freeze_experts(small_model("peer", "peer"), None, layers=None, used_in=None)
        assert set(frozen.num_frozen.values()) == {64}

    @pytest.mark.parametrize("layers", [1, [1], np.int64(1), np.array([1]), torch.tensor(1), range(1, 2)])
    def test_by_layer_indices_of_any_integer_type(self, layers):
        model = small_model("peer", "peer")
        assert freeze_experts(model, np.arange(3), layers=layers).num_frozen == {"model.layers.1.mlp.expert_pool": 3}

    def test_one_by_its_index(self, tmp_path):
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


class OtherModel(nn.Module):
    """A model of another kind, whose layers it calls in its own way."""

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
    model, corpus = OtherModel(), [{"input_ids": random_tokens(length, seed=length)} for length in (2, 3, 5)]
    labeled = [{**example, "labels": example["input_ids"]} for example in corpus]
    background = ExpertBackground.measure(model, DataLoader(labeled, 3, collate_fn=pad_right), progress_bar=False)
    alone = ExpertBackground.measure(model, corpus, batch_size=1, progress_bar=False)
    assert background.sizes == {f"h.{layer}.mlp.expert_pool": 36 for layer in range(3)}
    assert all(torch.equal(background.document_counts[name], alone.document_counts[name]) for name in alone.sizes)
    frozen = freeze_experts(model, layers=[1, 2], used_in=background)
    used = background.used("h.2.mlp.expert_pool")
    assert frozen.num_frozen["h.2.mlp.expert_pool"] == used.sum() < 36
    before = copy_of_state(model)
    model(random_tokens(4, 12), torch.ones(4, 12)).square().sum().backward()
    torch.optim.AdamW(model.parameters(), weight_decay=0.1).step()
    for layer in range(3):
        moved = model.h[layer]["mlp"].expert_pool.down_proj.weight.ne(
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
    *(
        (
            {"experts": wrong},
            "`experts` must be an expert index, an iterable of expert indices, or a bool mask of shape "
            f"(num_experts,), got {found}",
        )
        for wrong, found in (
            (1.5, "1.5 (float)"),
            (True, "True (bool)"),
            ("3", "'3' (str)"),
            ([0.5], "[0.5] (list)"),
            (["3"], "['3'] (list)"),
            ([True, 3], "[True, 3] (list)"),
            ([None], "[None] (list)"),
            ([], "[] (list)"),
            (torch.tensor([0.5]), "tensor([0.5000]) (Tensor)"),
            (torch.tensor([], dtype=torch.int64), "tensor([], dtype=torch.int64) (Tensor)"),
        )
    ),
    *(
        (
            {"layers": wrong},
            "`layers` must be a layer index, an iterable of layer indices, or `None` for all layers, got " + found,
        )
        for wrong, found in (
            (1.0, "1.0 (float)"),
            (True, "True (bool)"),
            ("1", "'1' (str)"),
            ([0, 2.0], "[0, 2.0] (list)"),
            ([False], "[False] (list)"),
            ({"2"}, "['2'] (set)"),
        )
    ),
    (
        {"used_in": "corpus"},
        "`used_in` must be an ExpertBackground, as `ExpertBackground.measure(model, dataset)` returns",
    ),
    ({"used_in": "corpus"}, "returns it, got 'corpus' (str)"),
    ({"min_documents": 5}, "`min_documents` counts documents of `used_in`, which is not given, got 5"),
    ({"min_documents": 0}, "`min_documents` must be an integer of at least 1, got 0"),
    ({"min_documents": True}, "`min_documents` must be an integer of at least 1, got True"),
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
        assert not parameter._post_accumulate_grad_hooks
    assert not any(freezes_of(module) for module in model.modules())


def test_other_things_refused():
    with pytest.raises(ValueError, match=r"`model` must be an `nn.Module`, got \{\} \(dict\)"):
        freeze_experts({}, 1)
    model = small_model("dense", "moe")
    with pytest.raises(ValueError, match="PeerForCausalLM has no PEER or PKM layer"):
        freeze_experts(model)
    model = small_model()
    background = ExpertBackground({"model.layers.1.mlp.expert_pool": torch.ones(64, dtype=torch.int64)}, 1)
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match=f"`min_documents` must be an integer of at least 1, got {wrong}"):
            freeze_experts(model, used_in=background, min_documents=wrong)
