# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A background counts in how many documents of a corpus each expert is used, and stays with the model."""

from collections import Counter

import pytest
import torch
from background_models import CORPUS, measured, model_of_three
from safetensors.torch import save
from torch.utils.data import DataLoader
from trainer_worker import copy_of_state, pad_right, small_model

from modeling_peer.analysis.expert_background import ExpertBackground
from modeling_peer.analysis.expert_sets import find_expert_sets
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


def assert_same(found, expected):
    assert found.num_documents == expected.num_documents
    torch.testing.assert_close(found.document_counts, expected.document_counts, rtol=0, atol=0)


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
        sizes = {name: len(counts) for name, counts in background.document_counts.items()}
        by_hand = documents_by_hand(model.eval(), sizes)
        assert background.num_documents == len(CORPUS)
        assert background.document_counts.keys() == by_hand.keys() == set(sets_of_layers(model))
        for name, counts in background.document_counts.items():
            assert counts.dtype == torch.int64
            assert counts.tolist() == [by_hand[name][number] for number in range(256)]
            assert 0 < (counts > 0).sum() < 256
            assert counts.max() > 1

    def test_takes_batches_as_they_are(self):
        model = model_of_three()
        expected = measured(model, batch_size=7)
        for collate in (pad_right, pad_left):
            batches = DataLoader(CORPUS, 4, collate_fn=collate)
            assert_same(ExpertBackground.measure(model, batches, progress_bar=False), expected)

    def test_is_stored_beside_the_model(self, tmp_path):
        model = model_of_three()
        model.save_pretrained(tmp_path)
        background = measured(model)
        background.save_pretrained(tmp_path)
        loaded = ExpertBackground.from_pretrained(tmp_path)
        loaded.check(type(model).from_pretrained(tmp_path))
        assert_same(loaded, background)

    @pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: save({"a": torch.ones(2)})])
    def test_a_damaged_file_is_named(self, damage, tmp_path):
        measured(model_of_three()).save_pretrained(tmp_path)
        (file,) = tmp_path.iterdir()
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(ValueError, match=f"{file.name} is not a whole file"):
            ExpertBackground.from_pretrained(tmp_path)

    def test_of_no_documents_is_refused(self):
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
