# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What users of Transformers take for granted, beyond its common tests: losses, outputs, packing, dtypes."""

import copy

import pytest
import torch
from tiny_models import ALL_CONFIGS, VARIANTS, random_tokens, tiny_config, tiny_model
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening

from modeling_peer import PeerForCausalLM, PeerForSequenceClassification


every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


@every_variant
def test_the_loss_is_next_token_cross_entropy(config):
    model, tokens = tiny_model(config), random_tokens(2, 9)
    labels = tokens.clone()
    labels[0, :4] = -100
    output = model(tokens, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert torch.allclose(output.loss, expected)
    # With the number of targets of all micro-batches, losses add up to the mean over them.
    halves = [model(tokens[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=13).loss for i in (0, 1)]
    assert torch.allclose(sum(halves), expected)


@every_variant
def test_logits_to_keep(config):
    model, tokens = tiny_model(config), random_tokens(2, 9)
    logits = model(tokens).logits
    assert torch.allclose(model(tokens, logits_to_keep=3).logits, logits[:, -3:], atol=1e-5)
    kept = torch.tensor([1, 4])
    assert torch.allclose(model(tokens, logits_to_keep=kept).logits, logits[:, kept], atol=1e-5)


def test_router_outputs():
    config = VARIANTS["all_in_one"]  # peer, moe, pkm, dense
    model, tokens = tiny_model(config), random_tokens(2, 9)
    assert model(tokens).router_indices is None
    output = model(tokens, output_router_indices=True, output_router_weights=True, output_router_logits=True)
    assert [tuple(indices.shape) for indices in output.router_indices] == [(2, 9, 2, 3), (18, 2), (2, 9, 2, 3)]
    assert [weights.shape for weights in output.router_weights] == [indices.shape for indices in output.router_indices]
    assert [logits.shape for logits in output.router_logits] == [(18, 4)]
    hidden = model(tokens, output_hidden_states=True).hidden_states[0]
    layer = model.model.layers[0]
    embeddings = layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm
    attended, _ = embeddings[0](
        embeddings[1](hidden), position_embeddings=model.model.rotary_emb(hidden, torch.arange(9)[None])
    )
    indices, weights = layer.mlp.router(embeddings[2](hidden + attended))
    assert torch.equal(output.router_indices[0], indices)
    assert torch.allclose(output.router_weights[0], weights, atol=1e-5)


@pytest.mark.parametrize("config", ALL_CONFIGS.values(), ids=ALL_CONFIGS)
def test_padding_free_inputs_equal_separate_sequences(config):
    """Sequences laid end to end, told apart by their positions."""
    model = tiny_model(config)
    sequences = [random_tokens(length, seed=length) for length in (5, 8, 3)]
    packed = DataCollatorWithFlattening()([{"input_ids": sequence.tolist()} for sequence in sequences])
    with torch.no_grad():
        logits = model(packed["input_ids"], position_ids=packed["position_ids"], use_cache=False).logits[0]
        expected = torch.cat([model(sequence[None]).logits[0] for sequence in sequences])
    assert torch.allclose(logits, expected, atol=5e-5, rtol=1e-4)


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near_float32(config, dtype):
    model, tokens = tiny_model(config), random_tokens(2, 9)
    with torch.no_grad():
        expected = model(tokens).logits
        logits = model.to(dtype)(tokens).logits
    assert logits.dtype == dtype
    # A rounding may flip a retrieved expert or a coarse one: near in the mean, not everywhere.
    assert (logits.float() - expected).abs().median() < 0.1 * expected.std()


@every_variant
def test_input_embeddings_equal_input_ids(config):
    model, tokens = tiny_model(config), random_tokens(2, 9)
    embeddings = model.get_input_embeddings()(tokens)
    assert torch.allclose(model(inputs_embeds=embeddings).logits, model(tokens).logits)


@every_variant
def test_it_runs_on_the_meta_device(config):
    """Shapes without memory, as tools ask for that estimate or trace a model."""
    with torch.device("meta"):
        model = PeerForCausalLM(copy.deepcopy(config))
        model.set_experts_implementation("batched_mm")
    assert model(torch.ones(2, 5, dtype=torch.long, device="meta")).logits.shape == (2, 5, config.vocab_size)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid", "relu"])
def test_a_pool_of_one_expert(scoring_func):
    model = tiny_model(tiny_config(num_experts=1, num_experts_per_head=1, scoring_func=scoring_func))
    tokens = random_tokens(2, 5)
    assert model(tokens, labels=tokens).loss.isfinite()


def test_pre_shifted_labels_as_sequence_parallelism_hands_them_over():
    model, tokens = tiny_model(VARIANTS["peer"]), random_tokens(2, 10)
    output = model(tokens, labels=tokens)
    shifted = F.pad(tokens[:, 1:], (0, 1), value=-100)
    losses = [
        model.loss_function(logits.contiguous(), None, 64, shift_labels=labels.contiguous(), num_items_in_batch=18)
        for logits, labels in zip(output.logits.split(5, dim=1), shifted.split(5, dim=1), strict=True)
    ]
    assert torch.allclose(sum(losses), output.loss)


def test_resized_embeddings_keep_the_experts():
    model, tokens = tiny_model(VARIANTS["peer"]), random_tokens(2, 9)
    before = model(tokens).logits
    tables = [p.clone() for name, p in model.named_parameters() if "expert_pool" in name]
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    after = model(tokens).logits
    assert after.shape[-1] == 70
    assert torch.allclose(after[..., :64], before, atol=1e-5)
    kept = [p for name, p in model.named_parameters() if "expert_pool" in name]
    assert all(torch.equal(a, b) for a, b in zip(tables, kept, strict=True))


def test_sequence_classification_reads_the_last_token():
    config = tiny_config("peer", "dense", num_labels=3)
    torch.manual_seed(0)
    model = PeerForSequenceClassification(config).eval()
    long, short = random_tokens(9), random_tokens(4, seed=2)
    batch = torch.zeros(2, 9, dtype=torch.long)
    batch[0], batch[1, :4] = long, short
    logits = model(batch, attention_mask=(batch != 0).long()).logits
    assert torch.allclose(logits[0], model(long[None]).logits[0], atol=1e-5)
    assert torch.allclose(logits[1], model(short[None]).logits[0], atol=1e-5)
