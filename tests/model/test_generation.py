# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Every way to generate, and every way to run the forward, agree."""

import copy

import pytest
import torch
from tiny_models import VARIANTS, random_tokens, tiny_config, tiny_model
from transformers import ContinuousBatchingConfig, GenerationConfig, pipeline
from word_tokenizer import word_tokenizer


GREEDY = {"max_new_tokens": 8, "do_sample": False}

every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def generate(model, tokens, **options):
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)


def greedy_by_hand(model, tokens, steps):
    for _ in range(steps):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens


@every_variant
@torch.no_grad()
def test_greedy(config):
    model, tokens = tiny_model(config), random_tokens(2, 6)
    expected = greedy_by_hand(model, tokens, 8)
    assert torch.equal(generate(model, tokens, **GREEDY), expected)
    assert torch.equal(generate(model, tokens, use_cache=False, **GREEDY), expected)
    assert torch.equal(generate(model, tokens, cache_implementation="static", **GREEDY), expected)


@every_variant
@torch.no_grad()
def test_left_padded_prompts_generate_what_each_generates_alone(config):
    model = tiny_model(config)
    long, short = random_tokens(1, 9), random_tokens(1, 4, seed=3)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 5, dtype=torch.long), short], dim=1)])
    generated = model.generate(batch, attention_mask=(batch != 0).long(), **GREEDY)[:, 9:]
    assert torch.equal(generated[0], generate(model, long, **GREEDY)[0, 9:])
    assert torch.equal(generated[1], generate(model, short, **GREEDY)[0, 4:])


@every_variant
@torch.no_grad()
def test_sampling_follows_the_distribution(config):
    model, tokens = tiny_model(config), random_tokens(1, 5)
    torch.manual_seed(0)
    samples = generate(model, tokens, do_sample=True, max_new_tokens=1, num_return_sequences=4000, top_k=0)
    assert samples.shape == (4000, 6)
    frequencies = torch.bincount(samples[:, -1], minlength=config.vocab_size) / 4000
    assert (frequencies - model(tokens).logits[0, -1].softmax(-1)).abs().sum() < 0.15


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
def test_a_policy_generates_in_training_mode():
    """Nothing of it stays, and no sequence depends on the others."""
    model = tiny_model(VARIANTS["all_in_one"])
    long, short = random_tokens(1, 9), random_tokens(1, 4, seed=3)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 5, dtype=torch.long), short], dim=1)])
    expected = model.generate(batch, attention_mask=(batch != 0).long(), **GREEDY)
    buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
    assert torch.equal(model.train().generate(batch, attention_mask=(batch != 0).long(), **GREEDY), expected)
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in model.named_buffers())


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


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_compiled_forward(training):
    """One graph of all variants, whatever a backend makes of it."""
    torch._dynamo.reset()
    model = tiny_model(VARIANTS["all_in_one"]).train(training)
    model.set_experts_implementation("batched_mm")  # the loop over experts that tokens chose cannot be traced
    reference = copy.deepcopy(model)
    tokens = random_tokens(2, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss, expected = compiled(tokens, labels=tokens).loss, reference(tokens, labels=tokens).loss
    assert torch.allclose(loss, expected, atol=1e-5)
    if training:
        loss.backward()
        expected.backward()
        for (key, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert torch.allclose(parameter.grad, other.grad, atol=1e-4), key
        for (key, buffer), other in zip(model.named_buffers(), reference.buffers(), strict=True):
            assert torch.allclose(buffer, other, atol=1e-5), key


def test_compiled_with_the_default_backend():
    torch._dynamo.reset()
    model, tokens = tiny_model(VARIANTS["peer"]), random_tokens(2, 8)
    expected = model(tokens).logits
    assert torch.allclose(torch.compile(model, fullgraph=True)(tokens).logits, expected, atol=1e-5)
