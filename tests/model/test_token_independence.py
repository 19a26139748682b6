# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""In evaluation a token depends on its own sequence's past and on nothing else, for every variant and option."""

import copy

import pytest
import torch
from release_names import CACHE
from tiny_models import ALL_CONFIGS, VARIANTS, random_tokens, tiny_model
from torch.nn.utils.rnn import pad_sequence
from transformers import QuantizedCache, StaticCache


every_config = pytest.mark.parametrize("config", ALL_CONFIGS.values(), ids=ALL_CONFIGS)


def assert_close(actual, expected, tolerance=2e-5):
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance * max(1.0, expected.abs().max().item()), difference


def padded(sequences, side):
    """Token ids and attention mask of sequences of different lengths."""
    input_ids = pad_sequence(sequences, batch_first=True, padding_side=side)
    return input_ids, (input_ids != 0).long()


@every_config
@torch.no_grad()
def test_no_token_sees_the_future(config):
    model = tiny_model(config)
    tokens = random_tokens(2, 12)
    changed = tokens.clone()
    changed[:, 7:] = random_tokens(2, 5, seed=9)
    logits, changed_logits = model(tokens).logits, model(changed).logits
    assert_close(changed_logits[:, :7], logits[:, :7], 1e-6)
    assert (changed_logits[:, 7:] - logits[:, 7:]).abs().max() > 1e-3


@every_config
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_sequence_depends_neither_on_its_batch_nor_on_padding(config, side):
    model = tiny_model(config)
    sequences = [random_tokens(length, seed=length) for length in (11, 4, 7)]
    input_ids, mask = padded(sequences, side)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids, attention_mask=mask, position_ids=position_ids).logits
    for row, sequence in enumerate(sequences):
        assert_close(logits[row, mask[row].bool()], model(sequence[None]).logits[0])


@every_config
@pytest.mark.parametrize("cache_type", ["dynamic", "static"])
@torch.no_grad()
def test_decoding_with_a_cache_equals_the_full_forward(config, cache_type):
    model = tiny_model(config)
    tokens = random_tokens(2, 10)
    expected = model(tokens).logits
    cache = StaticCache(config=config, max_cache_len=16) if cache_type == "static" else None
    logits = []
    for part in (tokens[:, :4], tokens[:, 4:6], *tokens[:, 6:].split(1, dim=1)):  # a prompt, a chunk, single tokens
        output = model(part, **{CACHE: cache}, use_cache=True)
        cache = output[CACHE]
        logits.append(output.logits)
    assert_close(torch.cat(logits, dim=1), expected)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_a_quantized_cache_stays_within_its_tolerance(config):
    config = copy.deepcopy(config)
    config.initializer_range = 0.1  # a model that does not magnify roundings from layer to layer
    model = tiny_model(config)
    tokens = random_tokens(1, 180)
    expected = model(tokens).logits[0]
    # Beyond its residual length the cache holds four bits a number: shorter prompts would not be quantized at all.
    cache = QuantizedCache("quanto", config, nbits=4, q_group_size=8, residual_length=16)
    logits = torch.cat([model(part, **{CACHE: cache}, use_cache=True).logits[0] for part in tokens.split(20, dim=1)])
    assert cache.layers[0]._quantized_keys.numel() > 0
    # In the median over positions: at one of them the error may flip a retrieved expert.
    errors = (logits - expected).std(-1) / expected.std(-1)
    assert 0 < errors[20:].median() < 0.06


@every_config
@torch.no_grad()
def test_a_batch_of_one_and_an_empty_row_do_not_crash(config):
    model = tiny_model(config)
    assert model(random_tokens(1, 1)).logits.isfinite().all()
    tokens, mask = random_tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1] = 0
    logits = model(tokens, attention_mask=mask).logits
    assert_close(logits[0], model(tokens[:1]).logits[0])
    model.train()
    loss = model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss
    assert loss.isfinite()
    model(tokens, attention_mask=torch.zeros_like(mask))
    assert all(buffer.isfinite().all() for buffer in model.buffers())
