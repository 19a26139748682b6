# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What experts do in a text: held against what the layers compute, and against the vocabulary by hand."""

import re
from dataclasses import replace

import pytest
import torch
from graft_models import grafted, grafts_of, merged_in_turn, trained
from tiny_models import random_tokens, tiny_config, tiny_model
from word_tokenizer import word_tokenizer

from modeling_peer import explain_tokens, masked_experts, quantize_experts
from modeling_peer.analysis.token_explanation import ExpertReader


ADDED = [
    {"layers": [0], "num_experts": 16, "mode": "protected", "num_retrieval_heads": 1, "num_experts_per_head": 2},
]
CONFIGURATIONS = {
    "peer": tiny_config("peer", "dense", "peer"),
    "gated": tiny_config("peer", gated_experts=True),
    "pkm": tiny_config("dense", "pkm"),
    "shared pool": tiny_config("peer", "dense", "peer", share_experts_across_layers=True),
    "added": tiny_config("peer", "dense", expert_additions=ADDED),
    "one per head": tiny_config("peer", num_experts_per_head=1),
    "quantized": tiny_config("peer", "pkm"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def model_of(name):
    model = tiny_model(CONFIGURATIONS[name]).double()
    torch.nn.init.normal_(model.model.norm.weight)
    return quantize_experts(model) if name == "quantized" else model


def assert_sums(reader, label, retrieved, output, **tolerances):
    """Coefficients times down-projections, added up for each token, are an output of a layer or graft."""
    vectors = reader.down_projections(label, retrieved.experts.flatten()).view(*retrieved.experts.shape, -1)
    sums = (retrieved.coefficients[..., None].to(output.dtype) * vectors).sum(1)
    assert sums.any()
    torch.testing.assert_close(sums, output, **tolerances)


def assert_words(reader, label, use, head, norm):
    """The words of an expert are those that the model would say if its down-projection were the last hidden state."""
    vector = reader.down_projections(label, torch.tensor([use.expert]))[0]
    lens = head(norm(vector)) * (1 if use.coefficient >= 0 else -1)
    assert use.words == tuple(f"w{number}" for number in lens.topk(len(use.words)).indices.tolist())


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_coefficients_times_down_projections_are_what_layers_return(name):
    model = model_of(name)
    outputs = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(
            lambda module, args, output, label=f"layer_{number}": outputs.update({label: output[0]})
        )
    reader = ExpertReader(model)
    read, logits = reader.read(input_ids=random_tokens(1, 7))
    assert list(read) == list(reader.sets)
    assert set(read) == {f"layer_{i}" for i, kind in enumerate(model.config.feed_forward_types) if kind != "dense"}
    with torch.no_grad():
        assert torch.equal(logits, model(random_tokens(1, 7)).logits[0].float())
    for label, retrieved in read.items():
        assert retrieved.experts.shape[0] == 7
        assert_sums(reader, label, retrieved, outputs[label], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_tokens_are_explained_by_their_experts_and_these_by_the_vocabulary(name, tokenizer):
    model = model_of(name)
    tokens = random_tokens(1, 6)
    text = tokenizer.decode(tokens[0])
    explained = explain_tokens(model, tokenizer, text, num_experts=4, num_words=3)
    assert [each.token for each in explained] == text.split()
    output = model(tokens, output_router_indices=True, output_router_weights=True)
    reader = ExpertReader(model)
    weighted = [place for place, kind in enumerate(model.config.feed_forward_types) if kind in ("peer", "pkm")]
    for place, layer in enumerate(weighted):
        # The outputs are of first generations.
        experts, weights = (each[place][0].flatten(1) for each in (output.router_indices, output.router_weights))
        for token, explanation in enumerate(explained):
            uses = explanation.layers[f"layer_{layer}"]
            assert 1 <= len(uses) <= 4
            assert [use.weight for use in uses] == sorted((use.weight for use in uses), reverse=True)
            for use in uses:
                if use.expert < model.config.num_experts:
                    own = weights[token][experts[token] == use.expert].sum().item()
                    assert use.weight == pytest.approx(own, rel=1e-5)
                assert len(use.words) == 3
                assert_words(reader, f"layer_{layer}", use, model.lm_head, model.model.norm)
    assert any(use.coefficient < 0 for each in explained for uses in each.layers.values() for use in uses) == (
        name != "pkm"
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_of_grafts(family, tokenizer):
    """Also of one whose tables have a column for biases, and whose base model calls its last norm otherwise."""
    model = trained(grafted(family, placement="in_place", num_experts=100))
    base_model = model.get_base_model()
    norm = base_model.transformer.ln_f if family == "gpt2" else base_model.model.norm
    torch.nn.init.normal_(norm.weight)
    (graft,) = grafts_of(model)
    seen = []
    graft.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    reader = ExpertReader(model)
    (label,) = reader.sets
    assert label == "layer_1_default"
    read, _ = reader.read(input_ids=random_tokens(1, 5))
    bias = 0 if graft.output_bias is None else graft.output_bias
    assert_sums(reader, label, read[label], seen[0] - bias, rtol=1e-4, atol=1e-5)
    for explanation in explain_tokens(model, tokenizer, "w1 w2 w3", num_words=2):
        for use in explanation.layers[label]:
            assert len(use.words) == 2
            assert_words(reader, label, use, base_model.lm_head, norm)


def test_of_grafts_that_were_merged_one_after_the_other():
    model = merged_in_turn(64, 36)
    first, last = (layer.grafts[0] for layer in (model.model.layers[1].mlp, model.model.layers[1].mlp.feed_forward))
    outputs = {}
    for label, graft in (("layer_1_graft_0", first), ("layer_1_graft_1", last)):
        graft.register_forward_hook(lambda module, args, output, label=label: outputs.update({label: output[0]}))
    reader = ExpertReader(model)
    read, _ = reader.read(input_ids=random_tokens(1, 5))
    assert set(read) == set(reader.sets) == set(outputs)
    for label, retrieved in read.items():
        assert_sums(reader, label, retrieved, outputs[label], rtol=1e-4, atol=1e-5)


def test_experts_of_several_heads_are_named_once(tokenizer):
    model = tiny_model(tiny_config("peer", num_experts=9, num_retrieval_heads=4))
    for explanation in explain_tokens(model, tokenizer, "w1 w2 w3", num_experts=12):
        uses = explanation.layers["layer_0"]
        assert len({use.expert for use in uses}) == len(uses) <= 9
        assert sum(use.weight for use in uses) == pytest.approx(4, rel=1e-5)  # a softmax for each head


def test_what_is_masked_or_behind_a_shut_gate_is_not_there(tokenizer):
    model = model_of("added")

    def uses():
        explained = explain_tokens(model, tokenizer, "w1 w2 w3 w4 w5 w6", num_experts=99)
        return [use for explanation in explained for use in explanation.layers["layer_0"]]

    assert any(use.expert >= model.config.num_experts for use in uses())
    with masked_experts(model):
        assert all(use.expert < model.config.num_experts for use in uses())
    torch.nn.init.constant_(model.model.layers[0].mlp.added_routers[0].gate.down_proj.bias, -5.0)
    found = uses()
    assert found and all(use.weight and use.expert < model.config.num_experts for use in found)


def test_explanations_are_printed_to_be_read(tokenizer):
    (explanation,) = explain_tokens(model_of("peer"), tokenizer, "w1", num_experts=2, num_words=2)
    token, *lines = str(explanation).split("\n  ")
    assert token == "'w1'" and len(lines) == len(explanation.layers) > 1
    assert str(replace(explanation, told_by="a fact")) == f"{explanation}\n  told by a fact"
    for line, (label, uses) in zip(lines, explanation.layers.items(), strict=True):
        shown = re.findall(r"(\d+) \(([+-]\S+): '(\w+)' '(\w+)'\)", line)
        assert line.startswith(f"{label}: ") and len(line) < 90
        assert [(int(expert), words) for expert, _, *words in shown] == [(use.expert, [*use.words]) for use in uses]
        assert [float(each) for _, each, *_ in shown] == pytest.approx([use.coefficient for use in uses], rel=0.06)


@pytest.mark.parametrize("arguments", [{"text": ""}, {"layers": 1}], ids=str)
def test_layers_are_chosen_and_others_refused(arguments, tokenizer):
    (explanation,) = explain_tokens(model_of("peer"), tokenizer, "w1", layers=2)
    assert list(explanation.layers) == ["layer_2"]
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
        explain_tokens(model_of("peer"), tokenizer, **{"text": "w1", **arguments})
