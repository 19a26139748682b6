# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Frozen experts keep their values, whatever trains, and all others train as if these had been put back by hand."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_config
from torch import nn
from torch.testing import assert_close
from trainer_worker import copy_of_state, counting_sequences, logged, small_model, train, trainer_of

from modeling_peer import ExpertBackground, RowAdamW, add_experts, expert_parameter_groups, freeze_experts
from modeling_peer.analysis.expert_sets import find_expert_sets
from modeling_peer.experts import expert_tables
from modeling_peer.feed_forward import PeerFeedForward
from modeling_peer.optim.frozen_rows import freezes_of


def tables_of(model):
    return list(expert_tables(model).values())


def trainer_of_experts(folder, optimizer="stock", seed=0, **options):
    model = small_model("peer", "pkm", "peer", gated_experts=True, seed=seed)
    options = {"max_steps": 30, "weight_decay": 0.1, "max_grad_norm": 0.2, **options}
    trainer = trainer_of(model, folder, counting_sequences(40), **options)
    if optimizer != "stock":
        trainer.optimizer = RowAdamW(expert_parameter_groups(model, learning_rate=1e-2, weight_decay=0.1))
    return trainer


EVEN = range(0, 64, 2)


class TestTrainer:
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
        assert_close(resumed.model.state_dict(), unbroken.model.state_dict(), rtol=0, atol=0)
        for name, table in expert_tables(resumed.model).items():
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
    return {name: table.weight.ne(before[f"{name}.weight"]).any(1) for name, table in expert_tables(model).items()}


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

    @pytest.mark.parametrize("layers", [1, [1], np.int64(1), np.array([1]), range(1, 2), iter([1])])
    def test_by_layer_indices_of_any_integer_type(self, layers):
        model = small_model("peer", "peer")
        assert freeze_experts(model, np.arange(3), layers=layers).num_frozen == {"model.layers.1.mlp.expert_pool": 3}

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
        with pytest.raises(ValueError, match="layers"):
            freeze_experts(model, EVEN, layers=[2])
        assert [parameter.requires_grad for parameter in model.parameters()] == before
        for layers in (None, [0, 2]):
            frozen = freeze_experts(model, EVEN, layers=layers)
            assert frozen.num_frozen == {"model.expert_pool": 32}
            assert all(torch.equal(~rows, torch.arange(64) % 2 == 0) for rows in moved_rows(model, tmp_path).values())
            frozen.remove()
        with pytest.raises(ValueError):
            freeze_experts(model.model.layers[0])  # which does not hold the pool

    def test_added_experts_follow_those_of_before(self, tmp_path):
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


def test_experts_in_any_module():
    layers = nn.ModuleList([PeerFeedForward(tiny_config("peer"), 0) for _ in range(3)])
    frozen = freeze_experts(layers, range(10), layers=[1, 2])
    assert frozen.num_frozen == {"1.expert_pool": 10, "2.expert_pool": 10}


def test_no_experts_are_none():
    assert freeze_experts(small_model(), []).num_frozen == {"model.layers.1.mlp.expert_pool": 0}


@pytest.mark.parametrize(
    ("last_layer", "conditions", "name"),
    [
        ("peer", {"layers": [1, 5]}, "layers"),
        ("peer", {"layers": []}, "layers"),
        ("peer", {"experts": [3, 64, 99]}, "64"),
        ("peer", {"experts": torch.ones(63, dtype=torch.bool)}, "63"),
        ("peer", {"used_in": ExpertBackground({"other": torch.ones(64, dtype=torch.int64)}, 1)}, "other experts"),
        ("moe", {}, "no PEER or PKM layer"),
    ],
)
def test_what_is_unknown_is_refused_and_changes_nothing(last_layer, conditions, name):
    model = small_model("dense", last_layer)
    before = copy_of_state(model)
    with pytest.raises((ValueError, IndexError), match=name):
        freeze_experts(model, **conditions)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and not p._post_accumulate_grad_hooks for p in model.parameters())
    assert not any(freezes_of(module) for module in model.modules())


def test_a_layer_without_the_experts_leaves_all_layers_trained():
    model = small_model("peer", "peer")
    add_experts(model, 16, layers=[0])
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="in layer_1, got 64"):
        freeze_experts(model, range(64, 80))
    assert not any(freezes_of(module) for module in model.modules())
