# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Gates of added experts: they open for the new text, stay closed for the reference, and nothing else changes."""

import math

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch.utils.data import DataLoader

from modeling_peer import (
    ExpertBackground,
    PeerForCausalLM,
    add_experts,
    fit_gates,
    freeze_experts,
    measure_usage,
)
from modeling_peer.router import ExpertGate


def text(first_token, number=200, seed=0, length=12):
    """Sequences of twenty neighboring tokens, told apart by no other."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(first_token, first_token + 20, (number, length), generator=generator)
    return [{"input_ids": sequence} for sequence in tokens]


NEW, REFERENCE = text(1), text(40)


@pytest.fixture
def model():
    model = tiny_model(tiny_config("peer", "dense", "peer"))
    add_experts(model, 25)
    return model


def fit(model, new=NEW, reference=REFERENCE, **options):
    return fit_gates(model, new, reference, progress_bar=False, **{"num_steps": 200, **options})


def share_of_new(model, first_token):
    """Of the router weights of a text that training did not see, how much goes to added experts, layer by layer."""
    tokens = torch.stack([each["input_ids"] for each in text(first_token, seed=1)])
    meters = measure_usage(model, input_ids=tokens).values()
    return [(meter.scores[36:].sum() / meter.scores.sum()).item() for meter in meters]


def test_opens_for_the_new_text_and_closes_for_the_reference(model):
    assert share_of_new(model, 40) == pytest.approx([0.5, 0.5])
    results = fit(model)
    assert sorted(results) == [0, 2]
    for result in results.values():
        assert result.open_for_new > result.open_for_reference + 0.3
    assert min(share_of_new(model, 1)) > 0.25 > 0.2 > max(share_of_new(model, 40))


def test_what_it_reports_is_of_the_sequences_it_did_not_fit(model):
    """Every tenth: they are of the other kind here, and the gate answers for what they are."""
    new = [each if i % 10 else REFERENCE[i] for i, each in enumerate(NEW)]
    for result in fit(model, new=new).values():
        assert result.open_for_new < 0.2


def test_what_is_held_out_has_no_part_in_the_fit(model):
    """Every tenth sequence of either text, whatever it is: the gates are the same, to the bit."""
    gates, results = [], []
    for other in (0, 1):
        texts = [
            [text(22, seed=other)[i] if i % 10 == 0 else each[i] for i in range(200)] for each in (NEW, REFERENCE)
        ]
        results.append(fit(model, *texts, num_steps=20))
        gates.append({name: tensor.clone() for name, tensor in model.state_dict().items() if ".gate." in name})
    assert all(torch.equal(tensor, gates[1][name]) for name, tensor in gates[0].items())
    assert results[0] != results[1]


def test_changes_the_gates_of_the_last_addition_alone(model):
    add_experts(model, 16, layers=2)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sorted(fit(model.train())) == [2]
    assert model.training
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}
    gate = {name for name in state if "layers.2.mlp.added_routers.1.gate." in name}
    assert changed == gate and len(gate) == 4


def test_is_the_same_every_time(model):
    fit(model, num_steps=20)
    once = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.randn(3)
    fit(model, num_steps=20)
    assert all(torch.equal(tensor, once[name]) for name, tensor in model.state_dict().items())


def test_closes_the_more_the_reference_weighs():
    """Two texts that share half of their tokens."""
    openness = []
    for weight in (0.1, 10.0):
        model = tiny_model(tiny_config("peer"))
        add_experts(model, 25)
        openness.append(fit(model, reference=text(11), reference_weight=weight)[0])
    assert openness[1].open_for_reference < openness[0].open_for_reference - 0.1
    assert openness[1].open_for_new < openness[0].open_for_new


def test_leaves_padding_out(model):
    padded = [
        {
            "input_ids": torch.cat([each["input_ids"], torch.zeros(7, dtype=torch.int64)]),
            "attention_mask": (torch.arange(19) < 12).long(),
        }
        for each in NEW
    ]
    results = fit(model, new=padded)
    gates = [tensor.clone() for name, tensor in model.state_dict().items() if ".gate." in name]
    again = fit(model)
    for index, result in results.items():
        assert result.open_for_new == pytest.approx(again[index].open_for_new, abs=1e-3)
    for before, (_, after) in zip(
        gates, [(n, t) for n, t in model.state_dict().items() if ".gate." in n], strict=True
    ):
        assert torch.allclose(before, after, atol=1e-2)


def test_takes_any_iterable(model):
    fit(model, num_steps=20)
    gates = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for new in ((each for each in NEW), DataLoader(NEW, batch_size=8)):
        fit(model, new=new, num_steps=20)
        assert all(torch.equal(tensor, gates[name]) for name, tensor in model.state_dict().items())


def test_a_gate_is_shut_where_it_would_be_less_than_one_percent_open():
    gate = ExpertGate(24)
    torch.nn.init.zeros_(gate.down_proj.weight)
    for openness, expected in ((0.011, 0.011), (0.009, 0)):
        torch.nn.init.constant_(gate.down_proj.bias, math.log(openness / (1 - openness)))
        assert gate(torch.randn(24)).item() == pytest.approx(expected, abs=1e-6)


def test_experts_behind_a_shut_gate_are_not_used(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.down_proj.bias"):
                parameter.fill_(-5.0)
    background = ExpertBackground.measure(model, NEW, progress_bar=False)
    for counts in background.document_counts.values():
        assert counts[:36].any() and not counts[36:].any()
    assert set(freeze_experts(model, range(36, 61), used_in=background).num_frozen.values()) == {0}


def test_is_saved_with_the_model(model, tmp_path):
    fit(model)
    model.save_pretrained(tmp_path)
    loaded = PeerForCausalLM.from_pretrained(tmp_path)
    assert share_of_new(loaded, 40) == share_of_new(model, 40)


def test_works_in_bfloat16(model):
    fit(model.to(torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert min(share_of_new(model, 1)) > 0.25 > 0.2 > max(share_of_new(model, 40))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"new": NEW[:1]}, "new_text"),
        ({"reference": NEW[:1]}, "reference_text"),
    ],
)
def test_refuses_arguments(options, name, model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=name):
        fit(model, **options)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("mode", [None, "open"])
def test_refuses_models_without_gates(mode):
    model = tiny_model(tiny_config("peer"))
    if mode is not None:
        add_experts(model, 13, mode=mode)
    with pytest.raises(ValueError, match="protected"):
        fit(model)
