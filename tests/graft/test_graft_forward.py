# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What grafts know of the forward pass of their decoder: padding, training, recomputation, threads and copies."""

import copy
import pickle
import threading

import pytest
import torch
from graft_models import graft_config, grafted, grafts_of, logits_of, trained
from peft import LoraConfig, get_peft_model
from release_names import CACHE, enable_checkpointing
from slow_tests import slow
from tiny_models import random_tokens
from torch import nn
from transformers import DynamicCache

from modeling_peer.graft_layer import PeerGraft, find_decoder_layers


def decoder_of(model):
    return find_decoder_layers(model.base_model.model)[1]


def statistics_of(model):
    return grafts_of(model)[0].router.query_norm.state_dict()


def masked_tokens():
    tokens = random_tokens(2, 9)
    return {"input_ids": tokens, "attention_mask": (torch.arange(9) < 6).long().expand_as(tokens)}


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
            statistics.append(statistics_of(model))
        torch.testing.assert_close(*statistics, rtol=1e-4, atol=1e-6)
        assert statistics[0]["num_batches_tracked"] == 1 and statistics[0]["running_mean"].abs().max() > 0

    def test_of_a_mask_given_by_position(self):
        model, other = (grafted(query_norm="batch").train() for _ in range(2))
        model.base_model.model.model(*masked_tokens().values())
        other(**masked_tokens())
        torch.testing.assert_close(statistics_of(model), statistics_of(other), rtol=0, atol=0)

    def test_statistics_rest_without_gradients_and_when_frozen(self):
        model = grafted(query_norm="batch").train()
        tokens = random_tokens(2, 9)
        with torch.no_grad():
            model(input_ids=tokens)
        model.eval()(input_ids=tokens)
        with model.disable_adapter():
            model.train()(input_ids=tokens)
        assert statistics_of(model)["num_batches_tracked"] == 0

    @pytest.mark.parametrize("layers", [[0], [1]])
    def test_a_mask_of_past_and_present_tokens_is_taken_in_training(self, layers):
        """The statistics are of the present tokens, of which the mask has the last columns."""
        statistics = []
        for padding in (0, 3):
            model = grafted(query_norm="batch", layers_to_transform=layers).train()
            decoder, tokens = decoder_of(model), random_tokens(2, 9)
            past = {CACHE: DynamicCache(config=decoder.config)}
            with torch.no_grad():
                decoder(tokens[:, :4], use_cache=True, **past)
            present = torch.cat([tokens[:, 4:], torch.zeros(2, padding, dtype=torch.int64)], dim=1)
            mask = torch.cat([torch.ones_like(tokens[:, :4]), (present != 0).long()], dim=1)
            decoder(present, attention_mask=mask, use_cache=True, **past)
            statistics.append(statistics_of(model))
        torch.testing.assert_close(*statistics, rtol=1e-4, atol=1e-6)
        assert statistics[0]["num_batches_tracked"] == 1

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_generation_takes_its_caches(self, cache):
        model = trained(grafted(query_norm="batch"))
        tokens = random_tokens(2, 9)
        tokens[0, :2] = 0
        options = {"attention_mask": (tokens != 0).long(), "max_new_tokens": 8, "do_sample": False}
        found = model.generate(input_ids=tokens, cache_implementation=cache, **options)
        assert torch.equal(found, model.generate(input_ids=tokens, use_cache=False, **options))

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize(
        ("family", "query_norm", "lengths"),
        [("llama", "batch", [9]), ("gpt2", "batch", [9]), ("llama", "rms", [12, 5]), ("llama", None, [12, 5])],
    )
    def test_activation_checkpointing_changes_nothing(self, family, query_norm, lengths, use_reentrant):
        """Without a BatchNorm also where the backward runs a batch again after the mask of another was seen."""
        results = []
        for checkpointing in (False, True):
            model = grafted(family, query_norm=query_norm)
            graft = grafts_of(model)[0]
            nn.init.normal_(graft.expert_pool.down_proj.weight)
            if checkpointing:
                enable_checkpointing(model.base_model.model, {"use_reentrant": use_reentrant})
                model.enable_input_require_grads()
            model.train()
            losses = []
            for length in lengths:
                tokens = random_tokens(2, length)
                mask = torch.ones_like(tokens)
                mask[:, length // 2 :] = 0
                losses.append(model(input_ids=tokens, attention_mask=mask, labels=tokens).loss)
            sum(losses).backward()
            model.eval()(input_ids=tokens)  # a second forward that the backward ran counts neither here nor there
            gradients = [parameter.grad for parameter in graft.parameters()]
            results.append((gradients, graft.router.state_dict()))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)
        assert query_norm != "batch" or results[0][1]["query_norm.num_batches_tracked"] == 1


class TestDecoderForward:
    def test_threads_do_not_see_each_other(self):
        """A forward pass without gradients, of longer text, comes while another thread trains."""
        longer = {"input_ids": random_tokens(1, 20), "attention_mask": torch.ones(1, 20, dtype=torch.long)}
        statistics = []
        for interrupted in (False, True):
            model = grafted(query_norm="batch").train()

            def interrupt(module, args, model=model):
                if threading.current_thread() is threading.main_thread():
                    thread = threading.Thread(target=torch.no_grad()(model.forward), kwargs=longer)
                    thread.start()
                    thread.join()

            if interrupted:
                decoder_of(model).layers[1].register_forward_pre_hook(interrupt)
            model(**masked_tokens())
            statistics.append(statistics_of(model))
        torch.testing.assert_close(*statistics, rtol=0, atol=0)
        assert statistics[1]["num_batches_tracked"] == 1

    def test_a_copy_of_the_model_has_its_own_and_a_copy_of_a_layer_shares_it(self):
        model = trained(grafted(query_norm="batch"))
        other, layer = copy.deepcopy(model), copy.deepcopy(decoder_of(model).layers[1])
        (graft,), (of_other,), (of_layer,) = grafts_of(model), grafts_of(other), grafts_of(layer)
        assert graft.decoder_forward.decoder is decoder_of(model)
        assert of_other.decoder_forward.decoder is decoder_of(other)
        assert of_layer.decoder_forward is graft.decoder_forward
        loaded = pickle.loads(pickle.dumps(decoder_of(model)))
        assert grafts_of(loaded)[0].decoder_forward.decoder is loaded
        assert isinstance(pickle.loads(pickle.dumps(graft)), PeerGraft)
        logits = logits_of(model)
        trained(other)
        assert torch.equal(logits_of(model), logits)
        assert [statistics_of(each)["num_batches_tracked"].item() for each in (model, other)] == [3, 6]

    def test_reaches_a_graft_that_another_method_copied(self):
        """`modules_to_save` of PEFT trains a copy of a merged graft, which must know the padding as well."""
        plain = grafted(query_norm="batch").merge_and_unload()
        copied = get_peft_model(copy.deepcopy(plain), LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]))
        for model in (plain, copied):
            model.train()(**masked_tokens())
        original, trained_copy = grafts_of(copied)
        assert original.router.query_norm.num_batches_tracked == 0
        found = trained_copy.router.query_norm.state_dict()
        torch.testing.assert_close(found["running_mean"], statistics_of(plain)["running_mean"], rtol=0, atol=0)
        assert found["num_batches_tracked"] == 1

    def test_a_graft_that_comes_later_reads_it_too(self):
        model = grafted(adapter_name="first")
        model.add_adapter("second", graft_config(layers_to_transform=[0]))
        decoder = decoder_of(model)
        assert len({id(graft.decoder_forward) for graft in grafts_of(model)}) == 1
        assert (len(decoder._forward_pre_hooks), len(decoder._forward_hooks)) == (1, 1)

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
        statistics = []
        for compiles in (False, True):
            model = grafted(query_norm="batch").train()
            forward = torch.compile(model.base_model.model, backend="eager") if compiles else model
            forward(**masked_tokens())
            statistics.append(statistics_of(model))
        torch.testing.assert_close(*statistics)
        assert statistics[1]["num_batches_tracked"] == 1
