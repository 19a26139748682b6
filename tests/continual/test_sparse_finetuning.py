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
"""Sparse memory finetuning moves the experts that TF-IDF by the letter ranks first, and nothing else."""

import copy
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from peft import LoraConfig, get_peft_model
from release_names import CHECKPOINTING, enable_checkpointing
from safetensors.torch import save_file
from torch.testing import assert_close
from torch.utils.data import DataLoader
from trainer_worker import copy_of_state, counting_sequences, logged, pad_right, small_model, train, trainer_of
from transformers import TrainerCallback
from two_processes import leave_together, run_on_two_processes

from modeling_peer import RowAdamW, expert_parameter_groups
from modeling_peer.analysis.expert_background import ExpertBackground
from modeling_peer.analysis.expert_sets import find_expert_sets, observe_routers
from modeling_peer.continual.freezing import freeze_experts
from modeling_peer.continual.sparse_finetuning import SparseFinetuningCallback, tf_idf
from modeling_peer.expert_table import ExpertTable
from modeling_peer.product_key_router import ProductKeyRouter


CORPUS = counting_sequences(30, seed=3)
FIRST_POOL, PKM, LAST_POOL = "model.layers.0.mlp.expert_pool", "model.layers.1.mlp", "model.layers.2.mlp.expert_pool"


def model_of_three(**fields):
    """Two layers with a pool, of gated experts, and a PKM layer between, with 256 experts each."""
    return small_model("peer", "pkm", "peer", **{"num_experts": 16**2, "gated_experts": True, **fields})


def model_of_relu():
    """Many tokens find no key with a positive score: what they retrieve has a weight of zero."""
    model = model_of_three(scoring_func="relu")
    for router in model.modules():
        if isinstance(router, ProductKeyRouter):
            router.sub_keys.data += torch.randn(router.sub_keys.shape[-1], generator=torch.Generator().manual_seed(0))
    return model


def measured(model, **options):
    return ExpertBackground.measure(model, CORPUS, progress_bar=False, **options)


def documents_by_hand(model, sets):
    """Of each set, the experts that each document of the corpus uses when it is run by itself, without padding."""
    found = {name: Counter() for name in sets}
    for example in CORPUS:
        with torch.no_grad():
            output = model(example["input_ids"][None], output_router_indices=True, output_router_weights=True)
        used = {name: set() for name in sets}
        for name, indices, weights in zip(
            sets_of_layers(model), output.router_indices, output.router_weights, strict=True
        ):
            used[name] |= {int(i) for i, weight in zip(indices.flatten(), weights.flatten(), strict=True) if weight}
        for name in sets:
            found[name].update(used[name])
    return found


def sets_of_layers(model):
    """The name of the set of each layer with a router, in order; twice if two layers share it."""
    sets = find_expert_sets(model)
    return [name for layer in range(3) for name, each in sets.items() if layer in each.layers]


class TestBackground:
    @pytest.mark.parametrize(
        "model",
        [
            lambda: model_of_three(attention_dropout=0.5),
            lambda: small_model("peer", "dense", "peer", share_experts_across_layers=True, num_experts=16**2),
            model_of_relu,
        ],
        ids=["three", "shared", "relu"],
    )
    def test_counts_the_documents_that_use_each_expert(self, model):
        model = model()
        model.train()
        model.model.layers[0].eval()
        modes, before = [module.training for module in model.modules()], copy_of_state(model)
        background = measured(model, batch_size=4)
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert not any(router._forward_hooks for router in model.modules() if isinstance(router, ProductKeyRouter))
        by_hand = documents_by_hand(model.eval(), background.sizes)
        assert background.num_documents == len(CORPUS)
        assert background.document_counts.keys() == by_hand.keys() == set(sets_of_layers(model))
        for name, counts in background.document_counts.items():
            assert counts.dtype == torch.int64
            assert counts.tolist() == [by_hand[name][number] for number in range(256)]
            assert 0 < (counts > 0).sum() < 256
            assert counts.max() > 1

    def test_takes_batches_as_they_are(self):
        model = model_of_three()
        batches = DataLoader(CORPUS, 4, collate_fn=pad_right)
        expected = measured(model, batch_size=7)
        for found in (
            ExpertBackground.measure(model, batches, progress_bar=False),
            measured(model, data_collator=pad_left),
        ):
            assert found.num_documents == expected.num_documents
            assert all(
                torch.equal(found.document_counts[name], expected.document_counts[name]) for name in expected.sizes
            )

    def test_further_documents_are_added(self):
        model = model_of_three()
        first, second = (
            ExpertBackground.measure(model, part, progress_bar=False) for part in (CORPUS[:11], CORPUS[11:])
        )
        kept = {name: counts.clone() for name, counts in first.document_counts.items()}
        older = ExpertBackground(dict(first.document_counts), first.num_documents)
        first.update(second)
        expected = measured(model)
        assert first.num_documents == 30
        assert all(torch.equal(first.document_counts[name], expected.document_counts[name]) for name in expected.sizes)
        assert all(torch.equal(older.document_counts[name], kept[name]) for name in kept)
        other = measured(small_model("dense", "peer"))
        with pytest.raises(ValueError, match="of other experts than those of the other background"):
            first.update(other)
        assert first.num_documents == 30

    def test_is_stored_beside_the_model(self, tmp_path):
        model = model_of_three()
        model.save_pretrained(tmp_path)
        background = measured(model)
        background.save_pretrained(tmp_path)
        for folder in (tmp_path, str(tmp_path)):
            loaded = ExpertBackground.from_pretrained(folder)
            loaded.check(type(model).from_pretrained(tmp_path))
            assert loaded.num_documents == 30
            for name, counts in background.document_counts.items():
                assert torch.equal(loaded.document_counts[name], counts)

    def test_comes_from_the_hub(self, tmp_path):
        ExpertBackground({"pool": torch.arange(4)}, 7).save_pretrained(tmp_path / "checkpoint")
        script = """if True:
            from huggingface_hub import HfApi
            HfApi().create_repo("user/peer")
            HfApi().upload_folder(repo_id="user/peer", folder_path="checkpoint")
            from modeling_peer.analysis.expert_background import ExpertBackground
            background = ExpertBackground.from_pretrained("user/peer")
            print(background.document_counts["pool"].tolist(), background.num_documents)
        """
        root = Path(__file__).parents[2]
        with HubServer() as hub:
            environment = {**os.environ, **hub.environment(tmp_path / "home"), "PYTHONPATH": str(root)}
            command = [sys.executable, "-c", script]
            run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert run.stdout == "[0, 1, 2, 3] 7\n", run.stderr

    def test_what_is_no_background_is_refused(self, tmp_path):
        with pytest.raises(OSError, match="expert_background.safetensors"):
            ExpertBackground.from_pretrained(tmp_path)
        path = tmp_path / "expert_background.safetensors"
        path.write_bytes(b"no such thing")
        with pytest.raises(ValueError, match="expert_background.safetensors is no safetensors file"):
            ExpertBackground.from_pretrained(tmp_path)
        counts = {"document_counts.pool": torch.arange(4)}
        for tensors, metadata in (
            ({"pool": torch.arange(4)}, {"num_documents": "3"}),
            (counts, {"format": "pt"}),
            (counts, None),
        ):
            save_file(tensors, path, metadata)
            with pytest.raises(
                ValueError, match=re.escape("tensors named `document_counts.…` and `num_documents` in its")
            ):
                ExpertBackground.from_pretrained(tmp_path)

    def test_of_another_pool_is_refused(self):
        background = measured(model_of_three())
        for other in (model_of_three(num_experts=17**2), small_model("peer", "pkm", num_experts=16**2)):
            expected = {name: each.num_experts for name, each in find_expert_sets(other).items()}
            message = re.escape(f"found {background.sizes}, expected {expected}")
            with pytest.raises(ValueError, match=message):
                background.check(other)
            requires = [parameter.requires_grad for parameter in other.parameters()]
            with pytest.raises(ValueError, match=message):
                SparseFinetuningCallback(other, background)
            assert [parameter.requires_grad for parameter in other.parameters()] == requires

    def test_from_before_a_pool_grew_is_refused(self):
        from modeling_peer.continual.growth import add_experts

        model = small_model("peer", "dense")
        background = measured(model)
        add_experts(model, 16)
        with pytest.raises(
            ValueError, match=re.escape("mlp.expert_pool': 64}, expected {'model.layers.0.mlp.expert_pool': 80}")
        ):
            background.check(model)
        background = measured(model)
        background.check(model)
        assert background.document_counts[FIRST_POOL][64:].any()

    def test_needs_a_document(self):
        with pytest.raises(ValueError, match="`dataset` must have at least one document, got none"):
            ExpertBackground.measure(small_model(), [], progress_bar=False)
        with pytest.raises(ValueError, match="no PEER or PKM layer"):
            measured(small_model("dense"))


def pad_left(examples):
    batch = pad_right([{"input_ids": example["input_ids"].flip(0)} for example in examples])
    return {name: tensor.flip(1) for name, tensor in batch.items()}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_forward_repeated_in_the_backward_is_not_observed(use_reentrant):
    model, seen = model_of_three().train(), []
    enable_checkpointing(model, {"use_reentrant": use_reentrant})
    observe_routers(find_expert_sets(model), lambda name, *output: seen.append(name))
    tokens = torch.arange(1, 13)[None]
    model(inputs_embeds=model.model.embed_tokens(tokens), labels=tokens).loss.backward()
    assert seen == [FIRST_POOL, PKM, LAST_POOL]


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
            number: count / total * math.log((num_documents + 1) / (int(document_counts[number]) + 1))
            for number, count in counts.items()
        }
        chosen.append(set(sorted(scores, key=lambda number: (-scores[number], number))[:t]))
    return chosen[0], chosen[0] != chosen[1]


class Observer(TrainerCallback):
    """What a training retrieved in each step, by layer; what the gradients were; and which rows moved."""

    def __init__(self):
        self.steps, self.inputs, self.gradients, self.moved = [], [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.retrieved = {name: [] for name in find_expert_sets(model)}
        for name, each in find_expert_sets(model).items():
            for router in each.routers:
                router.register_forward_hook(lambda *call, name=name: self.record(name, *call))
        model.register_forward_pre_hook(lambda module, args, kwargs: self.keep(module, kwargs), with_kwargs=True)

    def record(self, name, router, args, output):
        if self.learns and torch._C._current_graph_task_id() == -1:
            self.retrieved[name].append((output[0].clone(), args[1].clone()))

    def keep(self, model, kwargs):
        self.learns = model.training and torch.is_grad_enabled()
        if self.learns:
            self.inputs.append({name: copy.deepcopy(value) for name, value in kwargs.items()})

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.model, self.inputs, self.before = copy.deepcopy(model), [], copy_of_state(model)
        for records in self.retrieved.values():
            records.clear()
        # Forwards from which nothing is learned.
        model.eval()(torch.full((1, 40), 51))
        with torch.no_grad():
            model.train()(torch.full((1, 40), 50))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(
            {name: p.grad.to_dense().clone() for name, p in model.named_parameters() if p.grad is not None}
        )
        # What the gradients are without anything frozen.
        for module in self.model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        self.model.enable_input_require_grads()  # for reentrant checkpointing
        self.model.zero_grad()
        for kwargs in self.inputs:
            self.model(**kwargs).loss.backward()
        whole = {name: p.grad.to_dense() for name, p in self.model.named_parameters() if p.grad is not None}
        self.gradients[-1] = (self.gradients[-1], whole)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: list(records) for name, records in self.retrieved.items()})
        self.moved.append(
            {name: p.ne(self.before[name]).flatten(1).any(1) for name, p in model.named_parameters() if p.ndim == 2}
        )


OPTIMIZERS = {
    "stock": {"weight_decay": 0.1},
    "sgd": {"optim": "sgd", "learning_rate": 1.0},
    "sparse rows": {},
}
T = 6


def sparse_trainer(
    folder, optimizer="stock", t=T, tables=("down_proj",), observer=None, seed=0, num_examples=42, **options
):
    model = model_of_three(sparse_expert_gradients=optimizer == "sparse rows", seed=seed)
    background = measured(model_of_three())
    callback = SparseFinetuningCallback(model, background, t, tables)
    callbacks = [callback] if observer is None else [observer, callback]
    defaults = {"max_steps": 6, "max_grad_norm": 1e6, **OPTIMIZERS[optimizer]}
    trainer = trainer_of(
        model, folder, counting_sequences(num_examples, seed=5), callbacks=callbacks, **{**defaults, **options}
    )
    if optimizer == "sparse rows":
        trainer.optimizer = RowAdamW(expert_parameter_groups(model, learning_rate=1e-2, weight_decay=0.1))
    return trainer, background


CASES = [
    ("stock", ("down_proj",), {}),
    ("sgd", ("down_proj",), {"eval_strategy": "steps", "eval_steps": 2}),
    ("sparse rows", ("up_proj", "down_proj"), {"gradient_accumulation_steps": 3, "max_steps": 8}),
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
                            mask = torch.tensor([number in chosen for number in range(256)])
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

    def test_values_of_the_only_layer_do_not_change_what_it_retrieves(self, tmp_path):
        model = small_model("dense", "peer", num_experts=16**2)
        callback = SparseFinetuningCallback(model, measured(model), 20)
        batch = pad_right(CORPUS)

        def run():
            with torch.no_grad():
                return model.eval()(**batch, output_router_indices=True, output_router_weights=True)

        before = run()
        train(model, tmp_path, max_steps=10, callbacks=[callback])
        after = run()
        assert torch.equal(after.router_indices[0], before.router_indices[0])
        assert torch.equal(after.router_weights[0], before.router_weights[0])
        assert not torch.allclose(after.logits, before.logits)
        assert after.loss < before.loss

    def test_all_that_is_used_moves_if_it_is_fewer(self, tmp_path):
        observer = Observer()
        trainer, _ = sparse_trainer(tmp_path, t=250, observer=observer)
        trainer.train()
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

    def test_logs_the_mean_over_steps(self, tmp_path):
        trainer, _ = sparse_trainer(tmp_path, t=250, logging_steps=3, observer=Observer())
        each_step, _ = sparse_trainer(tmp_path, t=250, observer=Observer())
        trainer.train()
        each_step.train()
        name = "sparse_finetuning/trained_experts/layer_0"
        numbers = logged(each_step, name)
        assert logged(trainer, name) == pytest.approx([sum(numbers[:3]) / 3, sum(numbers[3:]) / 3])
        json.dumps(trainer.state.log_history, allow_nan=False)

    def test_frozen_experts_leave_their_place_to_others(self, tmp_path):
        observer = Observer()
        trainer, background = sparse_trainer(tmp_path, observer=observer)
        freeze_experts(trainer.model, range(128))
        trainer.train()
        for step, moved in enumerate(observer.moved):
            records = [(indices, mask) for indices, mask in observer.steps[step][FIRST_POOL]]
            ranking = ranked_by_hand(records, background.document_counts[FIRST_POOL], background.num_documents, 256)[0]
            rows = set(moved[f"{FIRST_POOL}.down_proj.weight"].nonzero()[:, 0].tolist())
            assert len(rows) == min(T, len([number for number in ranking if number >= 128]))
            assert min(rows) >= 128

    def test_of_added_experts(self, tmp_path):
        from modeling_peer.continual.growth import add_experts

        model = small_model("peer", "dense")
        add_experts(model, 36)
        callback = SparseFinetuningCallback(model, measured(model), T)
        freeze_experts(model, range(70))
        observer, before = Observer(), copy_of_state(model)
        train(model, tmp_path, max_steps=1, callbacks=[observer, callback], optim="sgd", learning_rate=1.0)
        counts = callback.background.document_counts[FIRST_POOL]
        ranking = ranked_by_hand(observer.steps[0][FIRST_POOL], counts, callback.background.num_documents, 100)[0]
        assert {number for number in ranking if number < 70}
        table = model.model.layers[0].mlp.expert_pool.added[0].down_proj.weight
        moved = table.ne(0).any(1).nonzero()[:, 0].tolist()  # they started with zeros
        assert len(moved) == T
        assert {64 + row for row in moved} <= {number for number in ranking if number >= 70}
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
        for name, tensor in unbroken.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], tensor), name

    def test_leaves_nothing_behind_and_may_train_again(self, tmp_path):
        class Interrupt(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 2:
                    raise KeyboardInterrupt

        model = model_of_three()
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        callback, fresh = SparseFinetuningCallback(model, measured(model), T), copy_of_state(model)
        with pytest.raises(KeyboardInterrupt):
            train(model, tmp_path, max_steps=4, callbacks=[callback, Interrupt()])
        finals = []
        for _ in range(2):
            model.load_state_dict(fresh)
            train(model, tmp_path, max_steps=4, callbacks=[callback])
            finals.append(copy_of_state(model))
            assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
            assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        assert all(torch.equal(tensor, finals[1][name]) for name, tensor in finals[0].items())
        # Without it, all rows of what requires a gradient are trained.
        before = model.model.layers[1].mlp.values.weight.detach().clone()
        train(model, tmp_path, max_steps=1, weight_decay=0.1)
        assert model.model.layers[1].mlp.values.weight.ne(before).any(1).all()

    def test_interrupted_in_a_step_holds_the_model_until_it_is_removed(self, tmp_path):
        class Interrupt(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                raise KeyboardInterrupt

        model = model_of_three()
        tables = [module.weight for module in model.modules() if isinstance(module, ExpertTable)]
        hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        callback = SparseFinetuningCallback(model, measured(model), 2)
        with pytest.raises(KeyboardInterrupt):
            train(model, tmp_path, callbacks=[callback, Interrupt()])
        before = [weight.detach().clone() for weight in tables]
        with pytest.raises(RuntimeError, match="did not come to its end .* `remove\\(\\)`"):
            train(model, tmp_path, max_steps=1)
        assert all(map(torch.equal, tables, before))
        # A new callback takes its place, with more experts in a step.
        second = SparseFinetuningCallback(model, callback.background, 20)
        with pytest.raises(KeyboardInterrupt):
            train(model, tmp_path, max_steps=1, callbacks=[second, Interrupt()])
        assert all(number > 2 for number in second._num_chosen.values())
        second.remove()
        assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
        model.requires_grad_(True)
        train(model, tmp_path, max_steps=1, weight_decay=0.1)
        assert all(weight.ne(old).any(1).all() for weight, old in zip(tables, before, strict=True))

    def test_trains_a_table_after_the_end_of_an_earlier_freeze_of_it(self, tmp_path):
        model = model_of_three()
        frozen = freeze_experts(model)
        callback = SparseFinetuningCallback(model, measured(model), T)
        frozen.remove()
        # What the callback does not train stays so.
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert {name.split(".")[-2] for name in trained} == {"down_proj", "values"}
        before = copy_of_state(model)
        train(model, tmp_path, max_steps=2, callbacks=[callback])
        after = copy_of_state(model)
        moved = {name for name in after if "down_proj" in name and not torch.equal(after[name], before[name])}
        assert len(moved) == sum("down_proj" in name and ".mlp." in name for name in after) > 1

    def test_of_a_wrapped_model(self, tmp_path):
        model = get_peft_model(model_of_three(), LoraConfig(target_modules=["q_proj"]))
        callback = SparseFinetuningCallback(model, measured(model), T)
        tables = {name: module for name, module in model.named_modules() if isinstance(module, ExpertTable)}
        before = copy_of_state(model)
        train(model, tmp_path, max_steps=1, callbacks=[callback], optim="sgd", learning_rate=1.0)
        for name, table in tables.items():
            moved = table.weight.ne(before[f"{name}.weight"]).any(1).sum()
            assert moved == (T if "down_proj" in name or "values" in name else 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_trained_experts": 0}, "`num_trained_experts` must be a whole number, at least 1, got 0"),
        ({"num_trained_experts": True}, "`num_trained_experts` must be a whole number, at least 1, got True"),
        (
            {"tables": ["v"]},
            "`tables` must be some of ['down_proj', 'gate_proj', 'up_proj'], which the model's experts have",
        ),
        (
            {"tables": []},
            "`tables` must be some of ['down_proj', 'gate_proj', 'up_proj'], which the model's experts have",
        ),
        ({"tables": ["up_proj", "up_proj"]}, "which the model's experts have, got ['up_proj', 'up_proj']"),
        (
            {"tables": ["up_proj"]},
            "`tables` must have one of ['down_proj'] for model.layers.1.mlp, got ['up_proj']; or leave",
        ),
        ({"layers": [3]}, "`layers` must be some of [0, 1, 2], the layers with experts, got [3]"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(options, message):
    model = model_of_three()
    background = measured(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        SparseFinetuningCallback(model, background, **options)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_gates_that_are_not_there_are_refused():
    model = small_model()
    with pytest.raises(
        ValueError, match=re.escape("some of ['down_proj', 'up_proj'], which the model's experts have")
    ):
        SparseFinetuningCallback(model, measured(model), tables=["gate_proj"])


def test_of_another_model_is_refused(tmp_path):
    callback = SparseFinetuningCallback(model_of_three(), measured(model_of_three()))
    with pytest.raises(
        ValueError, match="The callback was made for another model than the PeerForCausalLM that is trained"
    ):
        train(model_of_three(), tmp_path, callbacks=[callback])


# What two processes do, from here on: half of the rows of each micro-batch to each.
def joint_training(folder, optimizer, world_size=1):
    """Of each step the rows that moved, and what the tables are in the end."""
    observer = Observer()
    options = {"per_device_train_batch_size": 8 // world_size, "gradient_accumulation_steps": 2, "max_steps": 4}
    options |= {"num_examples": 64}  # whole batches
    trainer, _ = sparse_trainer(folder, optimizer, observer=observer, train_sampling_strategy="sequential", **options)
    # A copy of the model would take part in reductions.
    observer.on_pre_optimizer_step = lambda *args, **kwargs: None
    trainer.train()
    tables = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {
        "moved": observer.moved,
        "tables": tables,
        "wrapper": type(trainer.model_wrapped).__name__,
        "numbers": logged(trainer, "sparse_finetuning/trained_experts/layer_0"),
        "norms": logged(trainer, "grad_norm"),
    }


def work(rank, folder, port):
    """One of two processes, which leaves all that it found."""
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    for optimizer in ("sgd", "sparse rows"):
        torch.save(joint_training(f"{folder}/{rank}", optimizer, 2), f"{folder}/{optimizer}-{rank}")
    leave_together()


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    run_on_two_processes(work, str(folder), port)
    return folder


@pytest.mark.parametrize("optimizer", ["sgd", "sparse rows"])
def test_two_processes_move_what_one_moves_on_the_joint_batch(distributed, tmp_path, optimizer):
    expected = joint_training(tmp_path, optimizer)
    for rank in (0, 1):
        found = torch.load(distributed / f"{optimizer}-{rank}")
        assert found["wrapper"] == "DistributedDataParallel"
        assert found["numbers"] == expected["numbers"] == [T] * 4
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        for moved, by_one in zip(found["moved"], expected["moved"], strict=True):
            for name in expected["tables"]:
                assert torch.equal(moved[name], by_one[name])
                assert moved[name].sum() == T
        assert_close(found["tables"], expected["tables"], rtol=1e-3, atol=1e-5)
