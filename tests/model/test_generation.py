# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Every way to generate, and every way to run the forward, agree. And what users of Transformers take for granted, beyond
its common tests: losses, outputs, packing, dtypes.
"""

import copy

import pytest
import torch
from tiny_models import ALL_CONFIGS, VARIANTS, random_tokens, tiny_config, tiny_model
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import ContinuousBatchingConfig, DataCollatorWithFlattening, GenerationConfig, pipeline
from word_tokenizer import word_tokenizer

from modeling_peer import PeerForCausalLM, PeerForSequenceClassification


GREEDY = {"max_new_tokens": 8, "do_sample": False}

every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def generate(model, tokens, **options):
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)


@every_variant
@torch.no_grad()
def test_greedy(config):
    model, tokens = tiny_model(config), random_tokens(2, 6)
    expected = tokens
    for _ in range(8):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(model, tokens, **GREEDY), expected)
    assert torch.equal(generate(model, tokens, use_cache=False, **GREEDY), expected)
    assert torch.equal(generate(model, tokens, cache_implementation="static", **GREEDY), expected)


@every_variant
@torch.no_grad()
def test_left_padded_prompts_generate_what_each_generates_alone(config):
    """Also in training mode, as policies do, of which nothing stays."""
    model = tiny_model(config)
    long, short = random_tokens(1, 9), random_tokens(1, 4, seed=3)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 5, dtype=torch.long), short], dim=1)])
    generated = model.generate(batch, attention_mask=(batch != 0).long(), **GREEDY)
    assert torch.equal(generated[0, 9:], generate(model, long, **GREEDY)[0, 9:])
    assert torch.equal(generated[1, 9:], generate(model, short, **GREEDY)[0, 4:])
    buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
    assert torch.equal(model.train().generate(batch, attention_mask=(batch != 0).long(), **GREEDY), generated)
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in model.named_buffers())


@every_variant
@torch.no_grad()
def test_beams(config):
    model, tokens = tiny_model(config), random_tokens(2, 5)
    beams = generate(model, tokens, num_beams=4, num_return_sequences=3, **GREEDY)
    assert beams.shape == (6, 13)
    assert torch.equal(beams, generate(model, tokens, num_beams=4, num_return_sequences=3, use_cache=False, **GREEDY))

    def log_probability(sequences):
        log_probabilities = model(sequences).logits[:, 4:-1].log_softmax(-1)
        return log_probabilities.gather(-1, sequences[:, 5:, None]).sum((1, 2))

    best = log_probability(beams).view(2, 3)
    assert (best.diff(dim=1) <= 1e-5).all()
    assert (best[:, 0] >= log_probability(generate(model, tokens, **GREEDY)) - 1e-5).all()


@every_variant
@torch.no_grad()
def test_assisted_and_prompt_lookup_decoding_are_greedy(config):
    model, tokens = tiny_model(config), random_tokens(1, 6).repeat(1, 3)
    expected = generate(model, tokens, **GREEDY)
    assistant = tiny_model(tiny_config("peer"), seed=1)
    assert torch.equal(generate(model, tokens, assistant_model=assistant, **GREEDY), expected)
    assert torch.equal(generate(model, tokens, assistant_model=copy.deepcopy(model), **GREEDY), expected)
    assert torch.equal(generate(model, tokens, prompt_lookup_num_tokens=3, **GREEDY), expected)


@pytest.mark.parametrize("name", ["peer", "all_in_one"])
@torch.no_grad()
def test_continuous_batching(name):
    model = tiny_model(VARIANTS[name])
    prompts = [random_tokens(length, seed=length) for length in (5, 9, 3)]
    expected = [generate(model, prompt[None], **GREEDY)[0, len(prompt) :].tolist() for prompt in prompts]
    options = GenerationConfig(eos_token_id=-1, pad_token_id=0, **GREEDY)
    outputs = model.generate_batch(
        [prompt.tolist() for prompt in prompts],
        generation_config=options,
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64),
    )
    generated = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    assert [generated[tuple(prompt.tolist())] for prompt in prompts] == expected


@torch.no_grad()
def test_pipeline():
    tokenizer = word_tokenizer()
    tokenizer.pad_token = "w0"
    model = tiny_model(VARIANTS["peer"])
    texts = ["w5 w9 w3", "w7 w2 w8 w11 w30"]
    results = pipeline("text-generation", model=model, tokenizer=tokenizer)(texts, batch_size=2, **GREEDY)
    for text, [result] in zip(texts, results, strict=True):
        input_ids = tokenizer(text, return_tensors="pt").input_ids
        expected = generate(model, input_ids, **GREEDY)[0, input_ids.shape[1] :]
        assert result["generated_text"] == text + tokenizer.decode(expected)


@torch.no_grad()
def test_attention_implementations_agree():
    model, tokens = tiny_model(VARIANTS["all_in_one"]), random_tokens(2, 16)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    logits = {}
    for implementation in ("eager", "sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
        logits[implementation] = model(tokens, attention_mask=mask).logits[mask.bool()]
    assert torch.allclose(logits["sdpa"], logits["eager"], atol=1e-4, rtol=1e-4)
    assert torch.allclose(logits["flex_attention"], logits["eager"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "backend", "training"),
    [("all_in_one", "aot_eager", False), ("all_in_one", "aot_eager", True), ("peer", "inductor", False)],
)
def test_compiled_forward(name, backend, training):
    """One graph of all variants, whatever a backend makes of it."""
    torch._dynamo.reset()
    model = tiny_model(VARIANTS[name]).train(training)
    model.set_experts_implementation("batched_mm")  # the loop over experts that tokens chose cannot be traced
    reference = copy.deepcopy(model)
    tokens = random_tokens(2, 8)
    output = torch.compile(model, fullgraph=True, backend=backend)(tokens, labels=tokens)
    expected = reference(tokens, labels=tokens)
    assert torch.allclose(output.loss, expected.loss, atol=1e-5)
    assert torch.allclose(output.logits, expected.logits, atol=1e-5)
    if training:
        output.loss.backward()
        expected.loss.backward()
        gradients, others = ([parameter.grad for parameter in each.parameters()] for each in (model, reference))
        torch.testing.assert_close(gradients, others, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close([*model.buffers()], [*reference.buffers()], rtol=1e-5, atol=1e-5)


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
    flags = {f"output_router_{name}": True for name in ("logits", "indices", "weights")}
    for own, expected in zip(
        model.model(tokens, return_dict=False, **flags)[-3:], model.model(tokens, **flags).to_tuple()[-3:], strict=True
    ):
        assert all(map(torch.equal, own, expected))
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


def test_sequence_classification_reads_the_last_token():
    config = tiny_config("peer", "dense", num_labels=3)
    torch.manual_seed(0)
    model = PeerForSequenceClassification(config).eval()
    long, short = random_tokens(9), random_tokens(4, seed=2)
    batch = pad_sequence([long, short], batch_first=True)
    logits = model(batch, attention_mask=(batch != 0).long()).logits
    assert torch.allclose(logits[0], model(long[None]).logits[0], atol=1e-5)
    assert torch.allclose(logits[1], model(short[None]).logits[0], atol=1e-5)
