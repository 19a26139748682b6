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
"""What grafts know of the forward pass of their decoder: padding, training, recomputation, threads and copies."""

import copy
import pickle
import threading

import pytest
import torch
from graft_models import graft_config, grafted, grafts_of, logits_of, trained
from peft import LoraConfig, get_peft_model
from release_names import enable_checkpointing
from slow_tests import slow
from tiny_models import random_tokens
from torch import nn
from transformers import DynamicCache

from modeling_peer.graft_layer import PeerGraft, find_decoder_layers
from modeling_peer.library_releases import CACHE


class TestPadding:
    @pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
    @pytest.mark.parametrize("query_norm", ["rms", "batch"])
    def test_changes_no_token(self, family, query_norm):
        model = trained(grafted(family, query_norm=query_norm))
        tokens = random_tokens(2, 9)
        padded = torch.cat([torch.zeros(2, 4, dtype=torch.int64), tokens], dim=1)
        mask = (padded != 0).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        found = logits_of(model, padded, attention_mask=mask, position_ids=positions)[:, 4:]
        torch.testing.assert_close(found, logits_of(model, tokens), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_is_left_out_of_the_statistics(self, family):
        statistics = []
        tokens = random_tokens(2, 9)
        for width in (0, 5):
            model = grafted(family, query_norm="batch").train()
            padded = torch.cat([tokens, torch.zeros(2, width, dtype=torch.int64)], dim=1)
            model(input_ids=padded, attention_mask=(padded != 0).long())
            statistics.append(grafts_of(model)[0].router.query_norm.state_dict())
        torch.testing.assert_close(*statistics, rtol=1e-4, atol=1e-6)
        assert statistics[0]["num_batches_tracked"] == 1 and statistics[0]["running_mean"].abs().max() > 0

    def test_of_a_mask_given_by_position(self):
        model = grafted(query_norm="batch").train()
        tokens = random_tokens(2, 9)
        mask = torch.ones_like(tokens)
        mask[:, 4:] = 0
        model.base_model.model.model(tokens, mask)
        by_position = grafts_of(model)[0].router.query_norm.running_mean.clone()
        other = grafted(query_norm="batch").train()
        other(input_ids=tokens, attention_mask=mask)
        assert torch.equal(grafts_of(other)[0].router.query_norm.running_mean, by_position)

    def test_statistics_rest_without_gradients_and_when_frozen(self):
        model = grafted(query_norm="batch").train()
        tokens = random_tokens(2, 9)
        with torch.no_grad():
            model(input_ids=tokens)
        model.eval()(input_ids=tokens)
        with model.disable_adapter():
            model.train()(input_ids=tokens)
        assert grafts_of(model)[0].router.query_norm.num_batches_tracked == 0

    @pytest.mark.parametrize("merges", [False, True])
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_a_mask_longer_than_the_tokens_is_refused_in_training(self, family, merges):
        """Attention would read its first columns, the statistics its last."""
        model = grafted(family, query_norm="batch")
        model = (model.merge_and_unload() if merges else model).train()
        norm = grafts_of(model)[0].router.query_norm
        tokens, mask = random_tokens(2, 9), torch.ones(2, 12, dtype=torch.int64)
        message = (
            r"`attention_mask` must have the shape \(batch size, past and present length\) = \(2, 9\), got \(2, 12\)"
        )
        with pytest.raises(ValueError, match=message):
            model(input_ids=tokens, attention_mask=mask)
        assert norm.num_batches_tracked == 0
        model(input_ids=tokens, attention_mask=mask[:, :9])
        assert norm.num_batches_tracked == 1

    @pytest.mark.parametrize("layers", [[0], [1]])
    def test_a_mask_of_past_and_present_tokens_is_taken_in_training(self, layers):
        """The layers before the graft have added the present tokens to the cache by then."""
        model = grafted(query_norm="batch", layers_to_transform=layers).train()
        decoder, tokens = decoder_of(model), random_tokens(2, 9)
        past = {CACHE: DynamicCache(config=decoder.config)}
        with torch.no_grad():
            decoder(tokens[:, :4], use_cache=True, **past)
        mask = torch.ones(2, 10, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"= \(2, 9\), got \(2, 10\)"):
            decoder(tokens[:, 4:], attention_mask=mask, use_cache=True, **copy.deepcopy(past))
        decoder(tokens[:, 4:], attention_mask=mask[:, :9], use_cache=True, **past)
        assert grafts_of(model)[0].router.query_norm.num_batches_tracked == 1

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_generation_takes_its_caches(self, cache):
        model = trained(grafted(query_norm="batch"))
        tokens = random_tokens(2, 9)
        options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 4, "do_sample": False}
        found = model.generate(input_ids=tokens, cache_implementation=cache, **options)
        assert torch.equal(found, model.generate(input_ids=tokens, use_cache=False, **options))

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_activation_checkpointing_changes_nothing(self, family, use_reentrant):
        results = []
        for checkpointing in (False, True):
            model = grafted(family, query_norm="batch")
            nn.init.normal_(grafts_of(model)[0].expert_pool.down_proj.weight)
            if checkpointing:
                enable_checkpointing(model.base_model.model, {"use_reentrant": use_reentrant})
                model.enable_input_require_grads()
            tokens = random_tokens(2, 9)
            mask = torch.ones_like(tokens)
            mask[:, 6:] = 0
            model.train()(input_ids=tokens, attention_mask=mask, labels=tokens).loss.backward()
            graft = grafts_of(model)[0]
            gradients = [parameter.grad for parameter in graft.parameters()]
            model.eval()(input_ids=tokens)  # a second forward that the backward ran counts neither here nor there
            results.append((gradients, graft.router.query_norm.state_dict()))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)
        assert results[0][1]["num_batches_tracked"] == 1

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("query_norm", ["rms", None])
    def test_activation_checkpointing_of_two_forwards(self, query_norm, use_reentrant):
        """The backward runs the longer batch again, after the mask of the shorter one was seen."""
        results = []
        for checkpointing in (False, True):
            model = grafted(query_norm=query_norm)
            nn.init.normal_(grafts_of(model)[0].expert_pool.down_proj.weight)
            if checkpointing:
                enable_checkpointing(model.base_model.model, {"use_reentrant": use_reentrant})
                model.enable_input_require_grads()
            model.train()
            losses = [
                model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss
                for tokens in (random_tokens(2, 12), random_tokens(2, 5))
            ]
            sum(losses).backward()
            results.append([parameter.grad for parameter in grafts_of(model)[0].parameters()])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def decoder_of(model):
    return find_decoder_layers(model.base_model.model)[1]


class TestDecoderForward:
    def test_no_module_is_searched_in_a_forward_pass(self):
        model = grafted(query_norm="batch").train()
        decoder, (graft,) = decoder_of(model), grafts_of(model)
        decoder.modules = decoder.named_modules = lambda *_, **__: pytest.fail("the decoder was searched")
        tokens = random_tokens(2, 9)
        model(input_ids=tokens, labels=tokens).loss.backward()
        assert graft.router.query_norm.num_batches_tracked == 1

    def test_threads_do_not_see_each_other(self):
        """A forward pass without gradients, of longer text, comes while another thread trains."""
        statistics = []
        for interrupted in (False, True):
            model = grafted(query_norm="batch").train()
            tokens = random_tokens(2, 9)
            mask = torch.ones_like(tokens)
            mask[:, 6:] = 0

            @torch.no_grad()
            def generate(model=model):
                model(input_ids=random_tokens(1, 20), attention_mask=torch.ones(1, 20, dtype=torch.long))

            def interrupt(module, args, generate=generate):
                if threading.current_thread() is threading.main_thread():
                    thread = threading.Thread(target=generate)
                    thread.start()
                    thread.join()

            if interrupted:
                decoder_of(model).layers[1].register_forward_pre_hook(interrupt)
            model(input_ids=tokens, attention_mask=mask)
            statistics.append(grafts_of(model)[0].router.query_norm.state_dict())
        torch.testing.assert_close(*statistics, rtol=0, atol=0)
        assert statistics[1]["num_batches_tracked"] == 1

    def test_a_copy_of_the_model_has_its_own_and_a_copy_of_a_layer_shares_it(self):
        model = grafted()
        other, layer = copy.deepcopy(model), copy.deepcopy(decoder_of(model).layers[1])
        (graft,), (of_other,), (of_layer,) = grafts_of(model), grafts_of(other), grafts_of(layer)
        assert graft.decoder_forward.decoder is decoder_of(model)
        assert of_other.decoder_forward.decoder is decoder_of(other)
        assert of_layer.decoder_forward is graft.decoder_forward
        loaded = pickle.loads(pickle.dumps(decoder_of(model)))
        assert grafts_of(loaded)[0].decoder_forward.decoder is loaded
        assert isinstance(pickle.loads(pickle.dumps(graft)), PeerGraft)

    def test_reaches_a_graft_that_another_method_copied(self):
        """`modules_to_save` of PEFT trains a copy of a merged graft, which must know the padding as well."""
        tokens = random_tokens(2, 9)
        mask = torch.ones_like(tokens)
        mask[:, 6:] = 0
        plain = grafted(query_norm="batch").merge_and_unload()
        copied = get_peft_model(copy.deepcopy(plain), LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]))
        for model in (plain, copied):
            model.train()(input_ids=tokens, attention_mask=mask)
        (graft,) = grafts_of(plain)
        original, trained_copy = grafts_of(copied)
        assert original.router.query_norm.num_batches_tracked == 0
        found, expected = trained_copy.router.query_norm, graft.router.query_norm
        torch.testing.assert_close(found.running_mean, expected.running_mean, rtol=0, atol=0)
        assert found.num_batches_tracked == 1

    def test_a_graft_that_comes_later_reads_it_too_and_unloading_ends_it(self):
        model = grafted(adapter_name="first")
        model.add_adapter("second", graft_config(layers_to_transform=[0]))
        decoder = decoder_of(model)
        assert len({id(graft.decoder_forward) for graft in grafts_of(model)}) == 1
        assert (len(decoder._forward_pre_hooks), len(decoder._forward_hooks)) == (1, 1)
        unloaded = copy.deepcopy(model).unload()
        decoder = find_decoder_layers(unloaded)[1]
        assert not decoder._forward_pre_hooks and not decoder._forward_hooks
        assert not [name for name in vars(decoder) if name.startswith("peer_graft")]

    def test_ends_where_a_forward_pass_fails(self):
        model = grafted()
        decoder, graft = decoder_of(model), grafts_of(model)[0]
        hook = decoder.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=random_tokens(2, 9), attention_mask=torch.ones(2, 9, dtype=torch.long))
        hook.remove()
        assert graft.decoder_forward.attention_mask is None and graft.decoder_forward.learns is None
        assert graft(torch.randn(1, 20, 24)).isfinite().all()

    @slow
    def test_is_read_where_the_model_is_compiled(self):
        tokens = random_tokens(2, 9)
        mask = torch.ones_like(tokens)
        mask[:, 6:] = 0
        statistics = []
        for compiles in (False, True):
            model = grafted(query_norm="batch").train()
            forward = torch.compile(model.base_model.model, backend="eager") if compiles else model
            forward(input_ids=tokens, attention_mask=mask)
            statistics.append(grafts_of(model)[0].router.query_norm.state_dict())
        torch.testing.assert_close(*statistics)
        assert statistics[1]["num_batches_tracked"] == 1
