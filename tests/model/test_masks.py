# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Attention and padding masks: which tokens query norms learn from."""

import pytest
import torch
from release_names import CACHE
from tiny_models import VARIANTS, random_tokens, tiny_config, tiny_model


def training_statistics(*chunks):
    """The running means of a query norm after a training forward on the last chunk; earlier chunks are cached."""
    model = tiny_model(VARIANTS["peer"]).train()
    cache = None
    with torch.no_grad():
        for tokens, masks in chunks[:-1]:
            cache = model(tokens, use_cache=True, **{CACHE: cache}, **masks)[CACHE]
    tokens, masks = chunks[-1]
    model(tokens, use_cache=cache is not None, **{CACHE: cache}, **masks)
    return model.model.layers[0].mlp.router.query_norm.running_mean


def test_of_a_mask_of_past_and_present_the_present_counts():
    tokens = random_tokens(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = mask[1, 8:] = 0
    prompt = tokens[:, :6], {"attention_mask": mask[:, :6]}
    implied, explicit = (
        training_statistics(prompt, (tokens[:, 6:], {"attention_mask": mask, **masks}))
        for masks in ({}, {"padding_mask": mask[:, 6:]})
    )
    assert torch.equal(implied, explicit)


def test_a_padding_mask_beside_a_mask_of_attention():
    """A four-dimensional mask is left to the attention and does not say what is padding; the keyword does."""
    model, tokens = tiny_model(VARIANTS["peer"]), random_tokens(2, 6)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        assert torch.allclose(model(tokens, attention_mask=causal).logits, model(tokens).logits, atol=1e-5)
    padding = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    causal = causal & padding[:, None, None].bool()
    implied, explicit, unknown = (
        training_statistics((tokens, masks))
        for masks in (
            {"attention_mask": padding},
            {"attention_mask": causal, "padding_mask": padding},
            {"attention_mask": causal},
        )
    )
    assert torch.allclose(implied, explicit, atol=1e-6)
    assert not torch.allclose(implied, unknown, atol=1e-4)


def test_a_mask_without_tokens_is_the_error_of_transformers():
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        tiny_model(tiny_config())(attention_mask=torch.ones(1, 4))
