# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Generated text: sampled from all tokens at temperature 1, of one length, without a trace in the model."""

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from transformers import GenerationConfig

from modeling_peer import generate_text


BOS, EOS = 3, 7


@pytest.fixture
def model():
    return tiny_model(tiny_config("peer", "dense", bos_token_id=BOS, eos_token_id=EOS))


def generate(model, number=20, length=12, **options):
    return generate_text(model, number, length, progress_bar=False, **options)


def fix_predictions(model, probabilities):
    """Lets a model predict the tokens with these probabilities after any text, and no others."""
    logits = torch.full((model.config.vocab_size,), -torch.inf)
    for token, probability in probabilities.items():
        logits[token] = torch.tensor(probability).log()
    model.lm_head.register_forward_hook(lambda module, args, output: logits.expand_as(output))


def test_sequences_are_of_one_length_and_begin_as_a_text_does(model):
    sequences = generate(model, batch_size=8)
    assert len(sequences) == 20
    for sequence in sequences:
        assert list(sequence) == ["input_ids"]
        tokens = sequence["input_ids"]
        assert tokens.shape == (12,) and tokens.dtype == torch.int64 and tokens[0] == BOS
    assert len({tuple(sequence["input_ids"].tolist()) for sequence in sequences}) == 20


@pytest.mark.parametrize(("bos", "eos", "first"), [(BOS, EOS, BOS), (0, EOS, 0), (None, EOS, EOS), (None, [9, 2], 9)])
def test_the_first_token_is_bos_or_else_eos(bos, eos, first):
    model = tiny_model(tiny_config("peer", bos_token_id=bos, eos_token_id=eos))
    assert {sequence["input_ids"][0].item() for sequence in generate(model)} == {first}


def test_goes_on_after_the_end_of_a_text(model):
    fix_predictions(model, {EOS: 0.5, 20: 0.5})
    tokens = torch.stack([each["input_ids"][1:] for each in generate(model, 40)])
    assert set(tokens.unique().tolist()) == {EOS, 20}
    assert (tokens == EOS).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert 20 in tokens[tokens[:, 0] == EOS][:, 1:]  # and no padding


def test_samples_what_the_model_predicts_whatever_its_generation_configuration_says(model):
    """62 tokens of about one percent are more than the 50 that Transformers samples from by default."""
    rare = {token: 0.008 + 0.000064 * token for token in range(64) if token not in (0, 20)}
    fix_predictions(model, {**rare, 20: 1 - sum(rare.values())})
    own = GenerationConfig(
        do_sample=False, temperature=0.1, top_k=2, top_p=0.3, repetition_penalty=1.5, eos_token_id=20, max_length=5
    )
    model.generation_config = own
    tokens = torch.stack([each["input_ids"][1:] for each in generate(model, 400)])
    counts = tokens.flatten().bincount(minlength=64) / tokens.numel()
    assert counts[20].item() == pytest.approx(1 - sum(rare.values()), abs=0.03)
    assert counts[list(rare)].min() > 0.003 and counts[0] == 0
    assert model.generation_config is own


def test_draws_from_the_global_generator(model):
    torch.manual_seed(1)
    first, second = generate(model, 4), generate(model, 4)
    torch.manual_seed(1)
    again = generate(model, 4)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))


def test_leaves_the_model_as_it_was():
    model = tiny_model(tiny_config("peer", "dense", bos_token_id=BOS, attention_dropout=0.5)).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = model.generation_config
    torch.manual_seed(0)
    in_training = generate(model)
    assert [module.training for module in model.modules()] == modes and model.generation_config is own
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    model.eval()
    torch.manual_seed(0)  # it generated in evaluation: without dropout
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(in_training, generate(model), strict=True))


def test_refuses_a_model_whose_texts_begin_with_no_token():
    with pytest.raises(ValueError, match="bos_token_id"):
        generate(tiny_model(tiny_config("peer")))
