# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Gates of added experts: they open for the new text, stay closed for the reference, and nothing else changes. A reference
that the model generates is sampled from all tokens at temperature 1, of one length, without a trace in the model.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_config, tiny_model
from torch.testing import assert_close
from torch.utils.data import DataLoader
from trainer_worker import copy_of_state
from transformers import GenerationConfig

from modeling_peer import (
    ExpertBackground,
    PeerForCausalLM,
    add_experts,
    fit_gates,
    freeze_experts,
    generate_text,
    measure_usage,
)
from modeling_peer.continual import gate_fitting
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


def gates_of(model):
    return {name: tensor for name, tensor in copy_of_state(model).items() if ".gate." in name}


def share_of_new(model, first_token):
    """Of the router weights of a text that training did not see, how much goes to added experts, layer by layer."""
    tokens = torch.stack([each["input_ids"] for each in text(first_token, seed=1)])
    meters = measure_usage(model, input_ids=tokens).values()
    return [(meter.scores[36:].sum() / meter.scores.sum()).item() for meter in meters]


def test_opens_for_the_new_text_and_closes_for_the_reference(model, tmp_path):
    assert share_of_new(model, 40) == pytest.approx([0.5, 0.5])
    results = fit(model)
    assert sorted(results) == [0, 2]
    for result in results.values():
        assert result.open_for_new > result.open_for_reference + 0.3
    assert min(share_of_new(model, 1)) > 0.25 > 0.2 > max(share_of_new(model, 40))
    model.save_pretrained(tmp_path)
    assert share_of_new(PeerForCausalLM.from_pretrained(tmp_path), 40) == share_of_new(model, 40)


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
        gates.append(gates_of(model))
    assert_close(*gates, rtol=0, atol=0)
    assert results[0] != results[1]


def test_changes_the_gates_of_the_last_addition_alone(model):
    add_experts(model, 16, layers=2)
    state = copy_of_state(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sorted(fit(model.train())) == [2]
    assert model.training
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}
    gate = {name for name in state if "layers.2.mlp.added_routers.1.gate." in name}
    assert changed == gate and len(gate) == 4


def test_is_the_same_every_time_and_takes_any_iterable(model):
    fit(model, num_steps=20)
    once = copy_of_state(model)
    torch.randn(3)
    for new in (NEW, (each for each in NEW), DataLoader(NEW, batch_size=8)):
        fit(model, new=new, num_steps=20)
        assert_close(copy_of_state(model), once, rtol=0, atol=0)


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
    results, gates, again = fit(model, new=padded), gates_of(model), fit(model)
    for index, result in results.items():
        assert result.open_for_new == pytest.approx(again[index].open_for_new, abs=1e-3)
    assert_close(gates_of(model), gates, rtol=1e-5, atol=1e-2)


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


def test_works_in_bfloat16(model):
    fit(model.to(torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert min(share_of_new(model, 1)) > 0.25 > 0.2 > max(share_of_new(model, 40))


def test_refuses_texts_of_one_sequence(model):
    state = copy_of_state(model)
    for option, name in (("new", "new_text"), ("reference", "reference_text")):
        with pytest.raises(ValueError, match=name):
            fit(model, **{option: NEW[:1]})
    assert_close(copy_of_state(model), state, rtol=0, atol=0)


@pytest.mark.parametrize("mode", [None, "open"])
def test_refuses_models_without_gates(mode):
    model = tiny_model(tiny_config("peer"))
    if mode is not None:
        add_experts(model, 13, mode=mode)
    with pytest.raises(ValueError, match="protected"):
        fit(model)


class SimilarQuestions(torch.nn.Module):
    """A model with a graft of facts to whose questions each token is as similar as its index says, in percent."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.router = torch.nn.Identity()
        self.router.questions = SimpleNamespace(threshold=torch.nn.Parameter(torch.zeros(())))
        self.router.retrieve_facts = lambda states: (None, states / 100)

    base_model = property(lambda self: self)

    def forward(self, input_ids, **kwargs):
        self.router(input_ids)


def test_a_threshold_of_questions_counts_every_token_of_the_reference(monkeypatch):
    model = SimilarQuestions()
    monkeypatch.setattr(
        gate_fitting, "find_fact_grafts", lambda model: {"facts": SimpleNamespace(router=model.router)}
    )
    new, reference = ([{"input_ids": torch.tensor(text)}] * 20 for text in ([10, 70, 90], [10, 80, 20]))
    result = fit(model, new, reference)["facts"]
    assert 0.8 < model.router.questions.threshold <= 0.9
    assert (result.open_for_new, result.open_for_reference) == (1, 0)


BOS, EOS = 3, 7


class TestGeneratedText:
    @pytest.fixture
    def model(self):
        return tiny_model(tiny_config("peer", "dense", bos_token_id=BOS, eos_token_id=EOS))

    def generate(self, model, number=20, **options):
        """All sequences as one tensor."""
        sequences = generate_text(model, number, 12, progress_bar=False, **options)
        assert len(sequences) == number and all(list(sequence) == ["input_ids"] for sequence in sequences)
        return torch.stack([sequence["input_ids"] for sequence in sequences])

    def fix_predictions(self, model, probabilities):
        """Lets a model predict the tokens with these probabilities after any text, and no others."""
        logits = torch.full((model.config.vocab_size,), -torch.inf)
        for token, probability in probabilities.items():
            logits[token] = torch.tensor(probability).log()
        model.lm_head.register_forward_hook(lambda module, args, output: logits.expand_as(output))

    def test_is_of_one_length_and_begins_as_a_text_does(self, model):
        tokens = self.generate(model, batch_size=8)
        assert tokens.shape == (20, 12) and tokens.dtype == torch.int64 and (tokens[:, 0] == BOS).all()
        assert len(tokens.unique(dim=0)) == 20

    @pytest.mark.parametrize(("bos", "eos", "first"), [(0, EOS, 0), (None, EOS, EOS), (None, [9, 2], 9)])
    def test_the_first_token_is_bos_or_else_eos(self, bos, eos, first):
        model = tiny_model(tiny_config("peer", bos_token_id=bos, eos_token_id=eos))
        assert (self.generate(model)[:, 0] == first).all()

    def test_goes_on_after_the_end_of_a_text(self, model):
        self.fix_predictions(model, {EOS: 0.5, 20: 0.5})
        tokens = self.generate(model, 40)[:, 1:]
        assert set(tokens.unique().tolist()) == {EOS, 20}
        assert (tokens == EOS).float().mean().item() == pytest.approx(0.5, abs=0.1)
        assert 20 in tokens[tokens[:, 0] == EOS][:, 1:]  # and no padding

    def test_is_what_the_model_predicts_whatever_its_generation_configuration_says(self, model):
        """62 tokens of about one percent are more than the 50 that Transformers samples from by default."""
        rare = {token: 0.008 + 0.000064 * token for token in range(64) if token not in (0, 20)}
        self.fix_predictions(model, {**rare, 20: 1 - sum(rare.values())})
        own = GenerationConfig(
            do_sample=False, temperature=0.1, top_k=2, top_p=0.3, repetition_penalty=1.5, eos_token_id=20, max_length=5
        )
        model.generation_config = own
        tokens = self.generate(model, 400)[:, 1:]
        counts = tokens.flatten().bincount(minlength=64) / tokens.numel()
        assert counts[20].item() == pytest.approx(1 - sum(rare.values()), abs=0.03)
        assert counts[list(rare)].min() > 0.003 and counts[0] == 0
        assert model.generation_config is own

    def test_draws_from_the_global_generator(self, model):
        torch.manual_seed(1)
        first, second = self.generate(model, 4), self.generate(model, 4)
        torch.manual_seed(1)
        assert torch.equal(self.generate(model, 4), first) and not torch.equal(second, first)

    def test_leaves_the_model_as_it_was(self):
        model = tiny_model(tiny_config("peer", "dense", bos_token_id=BOS, attention_dropout=0.5)).train()
        model.model.layers[1].eval()
        modes, state, own = (
            [module.training for module in model.modules()],
            copy_of_state(model),
            model.generation_config,
        )
        torch.manual_seed(0)
        in_training = self.generate(model)
        assert [module.training for module in model.modules()] == modes and model.generation_config is own
        assert_close(copy_of_state(model), state, rtol=0, atol=0)
        model.eval()
        torch.manual_seed(0)  # it generated in evaluation: without dropout
        assert torch.equal(self.generate(model), in_training)
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        self.generate(adapted)
        assert model.generation_config is own

    def test_is_refused_where_texts_begin_with_no_token(self):
        with pytest.raises(ValueError, match="bos_token_id"):
            self.generate(tiny_model(tiny_config("peer")))
