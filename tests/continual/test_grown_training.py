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
"""A grown model that was loaded or copied does not train all of its experts without a word."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from grown_models import CONFIGS, SIZES, logits_of, train_a_little
from tiny_models import random_tokens, tiny_model
from trainer_worker import counting_sequences, train

from modeling_peer import (
    PeerForCausalLM,
    add_experts,
    freeze_experts,
    masked_experts,
    train_added_experts_only,
)


ADVICE = re.escape("call `train_added_experts_only(model)` before an optimizer gets it")


@pytest.fixture(params=["one layer", "shared pool"])
def grown(request):
    def make(mode):
        model = tiny_model(CONFIGS[request.param])
        add_experts(model, SIZES[mode], mode=mode)
        return model

    return make


def reload(model, folder):
    model.save_pretrained(folder)
    return PeerForCausalLM.from_pretrained(folder)


def advice_of_a_training(model):
    """The warnings of a training forward that speak of growth, each time they are given."""
    tokens = random_tokens(2, 8)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model.train()(tokens, labels=tokens)
    return [str(each.message) for each in found if "grown model" in str(each.message)]


@pytest.mark.parametrize("mode", SIZES)
class TestAdvice:
    def test_is_given_to_a_model_that_was_loaded(self, grown, mode, tmp_path):
        loaded = reload(grown(mode), tmp_path)
        (advice,) = advice_of_a_training(loaded)
        assert re.search(ADVICE, advice)
        train_added_experts_only(loaded)
        assert not advice_of_a_training(loaded)

    def test_is_not_given_where_none_is_needed(self, grown, mode, tmp_path):
        model = grown(mode)
        assert not advice_of_a_training(model)
        assert not advice_of_a_training(tiny_model(CONFIGS["one layer"]))
        loaded = reload(model, tmp_path)
        tokens = random_tokens(2, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded.eval()(tokens, labels=tokens)
            with torch.no_grad():
                loaded.train()(tokens)
        freeze_experts(loaded, range(36))  # a choice of one's own
        assert not advice_of_a_training(loaded)

    def test_is_given_once_the_freeze_is_lifted(self, grown, mode):
        model = grown(mode)
        train_added_experts_only(model).remove()
        if mode == "protected":  # freezes no rows, but whole parameters
            model.requires_grad_(True)
        assert advice_of_a_training(model)

    def test_is_given_if_any_old_expert_is_trained(self, grown, mode, tmp_path):
        model = grown(mode)
        one_frozen = reload(model, tmp_path)
        freeze_experts(one_frozen, [1])
        assert advice_of_a_training(one_frozen)
        one_trained = reload(model, tmp_path)
        freeze_experts(one_trained, range(35))
        assert advice_of_a_training(one_trained)
        others = reload(model, tmp_path)
        freeze_experts(others, range(1, 36 + SIZES[mode]))
        assert advice_of_a_training(others)

    def test_is_given_once_for_an_addition(self, grown, mode, tmp_path, monkeypatch):
        model = reload(grown(mode), tmp_path)
        (_,) = advice_of_a_training(model)
        monkeypatch.setattr(model.base_model.layers, "modules", lambda: pytest.fail("walked again"))
        assert not advice_of_a_training(model)
        monkeypatch.undo()
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert advice_of_a_training(copied)
        add_experts(model, 36 if mode == "protected" else 15, mode=mode)
        assert not advice_of_a_training(model)
        again = reload(model, tmp_path)
        assert advice_of_a_training(again)

    def test_names_how_to_silence_it(self, grown, mode, tmp_path):
        loaded = reload(grown(mode), tmp_path)
        (advice,) = advice_of_a_training(loaded)
        (statement,) = re.findall(r"`(warnings\.filterwarnings\(.*?\))`", advice)
        tokens = random_tokens(2, 8)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            eval(statement)
            loaded.train()(tokens, labels=tokens)
        assert not found

    def test_reaches_users_of_trainer_once(self, grown, mode, tmp_path):
        loaded = reload(grown(mode), tmp_path / "model")
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("default")
            train(loaded, tmp_path, counting_sequences(8), max_steps=3)
        assert len([each for each in found if re.search(ADVICE, str(each.message))]) == 1

    def test_heeded_gives_the_training_that_was_meant(self, grown, mode, tmp_path):
        model = grown(mode)
        before = logits_of(model)
        loaded = reload(model, tmp_path / "model")
        train_added_experts_only(loaded)
        train(loaded, tmp_path, counting_sequences(8), max_steps=3, weight_decay=0.1)
        assert not torch.equal(logits_of(loaded.eval()), logits_of(model))
        if mode == "protected":
            with masked_experts(loaded):
                assert torch.equal(logits_of(loaded), before)
        for name, tensor in model.state_dict().items():
            if "embed_tokens" in name or "self_attn" in name:
                assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_copy_of_an_openly_grown_model_gets_advice():
    """It knows which parameters are trained, but not which of their rows."""
    model = tiny_model(CONFIGS["one layer"])
    add_experts(model, SIZES["open"], mode="open")
    train_a_little(model, steps=1)
    copied = copy.deepcopy(model)
    assert advice_of_a_training(copied) and not advice_of_a_training(model)
    add_experts(model, 15, mode="open")
    assert not advice_of_a_training(model)


def test_a_model_that_is_compiled_gets_advice(tmp_path):
    model = tiny_model(CONFIGS["one layer"])
    add_experts(model, SIZES["open"], mode="open")
    loaded = reload(model, tmp_path).train()
    tokens = random_tokens(1, 8)
    with pytest.warns(UserWarning, match=ADVICE):
        torch.compile(loaded, backend="eager", fullgraph=True)(tokens, use_cache=False)
