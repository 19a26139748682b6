# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A model of fewer heads computes what its first heads did."""

import pytest
import torch
from tiny_models import PROTECTED, random_tokens, tiny_config, tiny_model
from torch.testing import assert_close

from modeling_peer import PeerForCausalLM, keep_heads


OPTIONS = {
    "batch": {},
    "keys per head": {"sub_keys_per_head": True},
    "rms": {"query_norm": "rms", "scoring_func": "sigmoid"},
    "no norm": {"query_norm": None},
    "grown": {"expert_additions": [{"layers": [0], **PROTECTED, "num_retrieval_heads": 2}]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layers_return_the_sum_over_the_first_heads(options, tmp_path):
    """By hand: the softmax of a head is its own, so the others are taken out of what the router returns."""
    config = tiny_config("peer", "pkm", num_retrieval_heads=4, **options)
    model, whole = tiny_model(config).double(), tiny_model(config).double()
    other = PeerForCausalLM(model.config)
    for layer in whole.model.layers:
        layer.mlp.router.register_forward_hook(lambda router, args, output: (output[0][:, :, :3], output[1][:, :, :3]))
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        expected = whole(tokens).logits
        assert not torch.equal(model(tokens).logits, expected)
        assert keep_heads(model, 3) is model and other.config.num_retrieval_heads == 4
        assert_close(model(tokens).logits, expected)
        model.save_pretrained(tmp_path)
        loaded = PeerForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.num_retrieval_heads == 3
        assert_close(loaded.eval()(tokens).logits, model(tokens).logits)
    for name, parameter in loaded.named_parameters():
        assert parameter.shape == model.get_parameter(name).shape


@pytest.mark.parametrize("number", [-1, 0, 5])
def test_heads_that_there_are_not(number):
    model = tiny_model(tiny_config("peer", num_retrieval_heads=4))
    with pytest.raises(ValueError, match=f"from 1 to 4, got {number}"):
        keep_heads(model, number)
    assert model.model.layers[0].mlp.router.num_heads == 4
