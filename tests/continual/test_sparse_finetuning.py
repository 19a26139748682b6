# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Sparse memory finetuning moves the experts that TF-IDF by the letter ranks first, and nothing else."""

import json
import math
from collections import Counter

import pytest
import torch
from background_models import CORPUS, FIRST_POOL, LAST_POOL, PKM, measured, model_of_three
from release_names import CHECKPOINTING
from sparse_trainer import Observer, T, sparse_trainer
from torch.testing import assert_close
from trainer_worker import copy_of_state, logged, pad_right, small_model, train
from transformers import TrainerCallback

from modeling_peer import ExpertBackground, SparseFinetuningCallback, add_experts, freeze_experts
from modeling_peer.analysis.expert_sets import find_expert_sets
from modeling_peer.continual.sparse_finetuning import tf_idf
from modeling_peer.experts import expert_tables


def test_tf_idf_by_the_letter():
    counts, documents, num_documents = [5, 0, 2, 7, 1, 0], [0, 0, 10, 3, 9, 4], 10
    scores = tf_idf(torch.tensor(counts), torch.tensor(documents), num_documents)
    expected = [
        c / sum(counts) * math.log((num_documents + 1) / (d + 1)) for c, d in zip(counts, documents, strict=True)
    ]
    assert scores.tolist() == pytest.approx(expected, rel=1e-12)
    assert scores.dtype == torch.float64
    assert not tf_idf(torch.zeros(6, dtype=torch.int64), torch.tensor(documents), num_documents).any()


def ranked_by_hand(records, document_counts, num_documents, t):
    """The t experts that TF-IDF ranks first of those used, and whether padding would have changed them."""
    chosen = []
    for with_padding in (False, True):
        counts = Counter()
        for indices, padding_mask in records:
            for position in padding_mask.ne(-1).nonzero().tolist():
                if with_padding or padding_mask[tuple(position)]:
                    counts.update(indices[tuple(position)].flatten().tolist())
        total = sum(counts.values())
        scores = {
            index: count / total * math.log((num_documents + 1) / (int(document_counts[index]) + 1))
            for index, count in counts.items()
        }
        chosen.append(set(sorted(scores, key=lambda index: (-scores[index], index))[:t]))
    return chosen[0], chosen[0] != chosen[1]


class Interrupt(TrainerCallback):
    """Interrupts a training in an event, after so many steps."""

    def __init__(self, event, step=0):
        self.step = step
        setattr(self, event, self.interrupt)

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def hooks_of(model):
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


CASES = [
    ("stock", ("down_proj",), {}),
    ("sgd", ("down_proj",), {"eval_strategy": "steps", "eval_steps": 2}),
    ("rows", ("up_proj", "down_proj"), {"gradient_accumulation_steps": 3, "max_steps": 8}),
    (
        "stock",
        ("down_proj", "gate_proj", "up_proj"),
        {"gradient_accumulation_steps": 2, CHECKPOINTING: True},
    ),
    (
        "sgd",
        ("down_proj",),
        {
            "gradient_accumulation_steps": 2,
            CHECKPOINTING: True,
            f"{CHECKPOINTING}_kwargs": {"use_reentrant": True},
        },
    ),
]


class TestTraining:
    @pytest.mark.parametrize(
        ("optimizer", "tables", "options"), CASES, ids=["adamw", "sgd", "u and v", "all", "reentrant"]
    )
    def test_moves_the_experts_that_rank_first_and_nothing_else(self, tmp_path, optimizer, tables, options):
        observer = Observer()
        trainer, background = sparse_trainer(tmp_path, optimizer, tables=tables, observer=observer, **options)
        model = trainer.model
        if f"{CHECKPOINTING}_kwargs" in options:
            model.enable_input_require_grads()
        before = copy_of_state(model)
        trainer.train()
        padding_mattered, chosen_by_step = 0, []
        for step, moved in enumerate(observer.moved):
            gradients, whole = observer.gradients[step]
            norms = []
            for name, each in find_expert_sets(model).items():
                records = observer.steps[step][name]
                micro_batches = options.get("gradient_accumulation_steps", 1)
                assert len(records) in (micro_batches, 11 % micro_batches)
                counts = background.document_counts[name]
                chosen, padding = ranked_by_hand(records, counts, background.num_documents, T)
                padding_mattered += padding
                chosen_by_step.append(chosen)
                assert len(chosen) == T
                for role, parts in each.tables.items():
                    for _, table in parts:
                        (full_name,) = (key for key, p in model.named_parameters() if p is table.weight)
                        rows = set(moved[full_name].nonzero()[:, 0].tolist())
                        assert rows == (chosen if role in tables else set()), (full_name, step)
                        if role in tables:
                            mask = torch.tensor([index in chosen for index in range(256)])
                            kept = torch.where(mask[:, None], whole[full_name], 0.0)
                            # All that was accumulated, of those that rank first.
                            assert_close(gradients.pop(full_name), kept, rtol=1e-4, atol=1e-7)
                            norms.append(kept.norm())
            assert not gradients
            assert logged(trainer, "grad_norm")[step] == pytest.approx(torch.stack(norms).norm().item(), rel=1e-4)
        assert padding_mattered
        assert len(set(map(frozenset, chosen_by_step))) > 3
        trained = {f"{name}.{role}.weight" for name in (FIRST_POOL, LAST_POOL) for role in tables}
        trained.add(f"{PKM}.values.weight")
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]) == (name not in trained), name
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trained

    def test_all_that_is_used_moves_if_it_is_fewer(self, tmp_path):
        """And the model learns; logs are means over their steps."""
        observer, batch = Observer(), pad_right(CORPUS)
        trainer, _ = sparse_trainer(tmp_path, t=250, observer=observer)
        before = trainer.model.eval()(**batch).loss
        trainer.train()
        assert trainer.model.eval()(**batch).loss < before
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        for step, moved in enumerate(observer.moved):
            for layer, name in enumerate((FIRST_POOL, PKM, LAST_POOL)):
                used = set()
                for indices, padding_mask in observer.steps[step][name]:
                    used |= set(indices[padding_mask.bool()].flatten().tolist())
                table = f"{name}.values.weight" if name == PKM else f"{name}.down_proj.weight"
                assert set(moved[table].nonzero()[:, 0].tolist()) == used
                assert T < len(used) < 250
                assert entries[step][f"sparse_finetuning/trained_experts/layer_{layer}"] == len(used)
        in_threes, _ = sparse_trainer(tmp_path, t=250, logging_steps=3, observer=Observer())
        in_threes.train()
        name = "sparse_finetuning/trained_experts/layer_0"
        trained = logged(trainer, name)
        assert logged(in_threes, name) == pytest.approx([sum(trained[:3]) / 3, sum(trained[3:]) / 3])
        json.dumps(in_threes.state.log_history, allow_nan=False)

    def test_of_added_experts(self, tmp_path):
        model = small_model("peer", "dense")
        add_experts(model, 36)
        callback = SparseFinetuningCallback(model, measured(model), T)
        freeze_experts(model, range(70))
        observer, before = Observer(), copy_of_state(model)
        train(model, tmp_path, max_steps=1, callbacks=[observer, callback], optim="sgd", learning_rate=1.0)
        counts = callback.background.document_counts[FIRST_POOL]
        ranking = ranked_by_hand(observer.steps[0][FIRST_POOL], counts, callback.background.num_documents, 100)[0]
        assert {index for index in ranking if index < 70}
        table = model.model.layers[0].mlp.expert_pool.added[0].down_proj.weight
        moved = table.ne(0).any(1).nonzero()[:, 0].tolist()  # they started with zeros
        assert len(moved) == T
        assert {64 + row for row in moved} <= {index for index in ranking if index >= 70}
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed == {f"{FIRST_POOL}.added.0.down_proj.weight"}

    def test_of_some_layers_alone(self, tmp_path):
        model = model_of_three()
        before = copy_of_state(model)
        callback = SparseFinetuningCallback(model, measured(model), T, "up_proj", layers=[2])
        train(model, tmp_path, max_steps=2, callbacks=[callback])
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed == {f"{LAST_POOL}.up_proj.weight"}

    def test_of_a_shared_pool_ranks_what_all_layers_use(self, tmp_path):
        model = small_model("peer", "dense", "peer", num_experts=16**2, share_experts_across_layers=True)
        background, observer = measured(model), Observer()
        callback = SparseFinetuningCallback(model, background, T)
        trainer = train(model, tmp_path, max_steps=3, callbacks=[observer, callback], optim="sgd", learning_rate=1.0)
        for step, moved in enumerate(observer.moved):
            records = observer.steps[step]["model.expert_pool"]
            assert len(records) == 2
            counts = background.document_counts["model.expert_pool"]
            chosen, _ = ranked_by_hand(records, counts, background.num_documents, T)
            assert set(moved["model.expert_pool.down_proj.weight"].nonzero()[:, 0].tolist()) == chosen
        assert "sparse_finetuning/trained_experts/layer_0_2" in trainer.state.log_history[0]

    def test_resumes_to_the_bit_and_keeps_the_background(self, tmp_path):
        options = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 4, "max_steps": 9}
        unbroken, background = sparse_trainer(tmp_path, **options)
        unbroken.train()
        kept = ExpertBackground.from_pretrained(tmp_path / "checkpoint-4")
        assert kept.num_documents == background.num_documents
        assert torch.equal(kept.document_counts[PKM], background.document_counts[PKM])
        resumed, _ = sparse_trainer(tmp_path, seed=1, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert logged(resumed) == logged(unbroken)
        assert_close(resumed.model.state_dict(), unbroken.model.state_dict(), rtol=0, atol=0)

    def test_leaves_nothing_behind_and_may_train_again(self, tmp_path):
        model = model_of_three()
        hooks = hooks_of(model)
        callback, fresh = SparseFinetuningCallback(model, measured(model), T), copy_of_state(model)
        with pytest.raises(KeyboardInterrupt):
            train(model, tmp_path, max_steps=4, callbacks=[callback, Interrupt("on_step_end", 2)])
        finals = []
        for _ in range(2):
            model.load_state_dict(fresh)
            train(model, tmp_path, max_steps=4, callbacks=[callback])
            finals.append(copy_of_state(model))
            assert hooks_of(model) == hooks
            assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        assert all(torch.equal(tensor, finals[1][name]) for name, tensor in finals[0].items())
        # Without it, all rows of what requires a gradient are trained.
        before = model.model.layers[1].mlp.values.weight.detach().clone()
        train(model, tmp_path, max_steps=1, weight_decay=0.1)
        assert model.model.layers[1].mlp.values.weight.ne(before).any(1).all()

    def test_interrupted_in_a_step_holds_the_model_until_it_is_removed(self, tmp_path):
        model = model_of_three()
        tables = [table.weight for table in expert_tables(model).values()]
        hooks, interrupt = hooks_of(model), Interrupt("on_pre_optimizer_step")
        callback = SparseFinetuningCallback(model, measured(model), 2)
        with pytest.raises(KeyboardInterrupt):
            train(model, tmp_path, callbacks=[callback, interrupt])
        before = [weight.detach().clone() for weight in tables]
        with pytest.raises(RuntimeError, match="another optimizer"):
            train(model, tmp_path, max_steps=1)
        assert all(map(torch.equal, tables, before))
        # A new callback takes its place, with more experts in a step.
        second = SparseFinetuningCallback(model, callback.background, 20)
        with pytest.raises(KeyboardInterrupt):
            train(model, tmp_path, max_steps=1, callbacks=[second, interrupt])
        assert all(chosen > 2 for chosen in second._num_chosen.values())
        second.remove()
        assert hooks_of(model) == hooks
        model.requires_grad_(True)
        train(model, tmp_path, max_steps=1, weight_decay=0.1)
        assert all(weight.ne(old).any(1).all() for weight, old in zip(tables, before, strict=True))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"tables": ["v"]}, "tables"),
        ({"tables": []}, "tables"),
        ({"tables": ["up_proj"]}, "tables"),  # the PKM layer has none
        ({"layers": [3]}, "layers"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(options, name):
    model = model_of_three()
    with pytest.raises(ValueError, match=name):
        SparseFinetuningCallback(model, measured(model), **options)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_background_or_model_of_other_experts_is_refused(tmp_path):
    background, other = measured(model_of_three()), model_of_three(num_experts=17**2)
    with pytest.raises(ValueError, match="other experts"):
        SparseFinetuningCallback(other, background)
    assert all(parameter.requires_grad for parameter in other.parameters())
    callback = SparseFinetuningCallback(model_of_three(), background)
    with pytest.raises(ValueError, match="another model"):
        train(model_of_three(), tmp_path, callbacks=[callback])
