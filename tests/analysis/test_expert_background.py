# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A background counts in how many documents of a corpus each expert is used, and stays with the model."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from background_models import CORPUS, FIRST_POOL, LAST_POOL, PKM, measured, model_of_three
from hub_server import HubServer
from release_names import enable_checkpointing
from torch.utils.data import DataLoader
from trainer_worker import copy_of_state, pad_right, small_model

from modeling_peer.analysis.expert_background import FILE_NAME, ExpertBackground
from modeling_peer.analysis.expert_sets import find_expert_sets, observe_routers
from modeling_peer.router import ProductKeyRouter


def model_of_relu():
    """Many tokens find no key with a positive score: what they retrieve has a weight of zero."""
    model = model_of_three(scoring_func="relu")
    for router in model.modules():
        if isinstance(router, ProductKeyRouter):
            router.sub_keys.data += torch.randn(router.sub_keys.shape[-1], generator=torch.Generator().manual_seed(0))
    return model


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
        with pytest.raises(ValueError, match="of other experts"):
            first.update(other)
        assert first.num_documents == 30

    def test_is_stored_beside_the_model(self, tmp_path):
        model = model_of_three()
        model.save_pretrained(tmp_path)
        background = measured(model)
        background.save_pretrained(tmp_path)
        loaded = ExpertBackground.from_pretrained(tmp_path)
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
            from modeling_peer.analysis.expert_background import FILE_NAME, ExpertBackground
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
        with pytest.raises(OSError, match=FILE_NAME):
            ExpertBackground.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="dataset"):
            ExpertBackground.measure(model_of_three(), [], progress_bar=False)

    def test_of_another_pool_is_refused(self):
        background = measured(model_of_three())
        grown = model_of_three(expert_additions=[{"layers": [0], "mode": "open", "num_experts": 33}])
        for other in (grown, small_model("peer", "pkm", num_experts=16**2)):
            with pytest.raises(ValueError, match="of other experts"):
                background.check(other)
        measured(grown).check(grown)


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
