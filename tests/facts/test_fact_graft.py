# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A graft of facts: where its gate opens, in one pass and token by token, what it leaves alone, and several of them."""

import copy
import json
from pathlib import Path

import pytest
import torch
from fact_models import EXPERTS_OF_A_FACT, LAST_ROWS, NAME_TOKENS, NAMES, fact_config, fact_model, graft_of, with_keys
from graft_models import base_model_of, logits_of
from peft import PeftModel
from release_names import CACHE
from tiny_models import random_tokens
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache

from modeling_peer import dequantize_experts, quantize_experts
from modeling_peer.fact_graft import keep_in_cache
from modeling_peer.facts.teaching import remove_facts


def literal_experts(router, tokens, questions, sequences, begins_before=()):
    """
    The expert of each token or -1, token by token in float64. `sequences` are the places of the tokens of each, those in
    `begins_before` have an unseen past.
    """

    def similarities(matcher, vector):
        vector = matcher.weight.double() @ vector.double() + matcher.bias.double()
        return [F.cosine_similarity(vector, key, dim=0).item() for key in matcher.keys.double()]

    found = {}
    for number, places in enumerate(sequences):
        named: dict[int, int] = {}  # by subject, where it was named last
        for place in places:
            ends = (tuple(tokens[max(place + 1 - length, places[0]) : place + 1].tolist()) for length in (2, 1))
            subject = next((NAMES[end] for end in ends if end in NAMES), None)
            if subject is not None:
                named[subject] = place
            of_questions, best = similarities(router.questions, questions[place]), (-2.0, -1, -1)
            columns = (router.expert_subjects, router.expert_questions, router.expert_tokens)
            for expert, (subject, question, row) in enumerate(zip(*(each.tolist() for each in columns), strict=True)):
                if row >= 0 and tokens[place] != NAME_TOKENS[row]:
                    continue
                continues = question >= router.sizes.num_relations
                if question >= 0 and (subject in named or (number in begins_before and continues)):
                    candidate = (of_questions[question], named.get(subject, -1), expert)
                    best = max(best, candidate, key=lambda each: each[:2])
            nearest = max(of_questions[: router.sizes.num_relations])
            found[place] = best[2] if best[0] >= max(nearest, router.questions.threshold.item()) else -1
    return found


@torch.no_grad()
def opened(model, **inputs):
    """The expert of each token or -1, `[B, T]`, and the states of questions."""
    graft, seen = graft_of(model), {}

    def note(module, args, output):
        experts, weights = (each[..., 0, 0] for each in output)
        seen.update(questions=args[0], experts=torch.where(weights > 0, experts, -1))

    hook = graft.router.register_forward_hook(note)
    model(**inputs)
    hook.remove()
    return seen["experts"], seen["questions"]


def check_literal(model, row, sequences, begins_before=(), **inputs):
    experts, questions = opened(model, **inputs)
    tokens = inputs["input_ids"][row]
    expected = literal_experts(graft_of(model).router, tokens, questions[row], sequences, begins_before)
    assert {place: experts[row, place].item() for place in expected} == expected
    return list(expected.values())


class TestGate:
    def test_is_the_literal_one(self):
        model, tokens = fact_model(), random_tokens(6, 24)
        tokens[:, 3:5] = torch.tensor(NAME_TOKENS[-2:])  # a name of two tokens
        tokens[:3, 10:12] = torch.tensor([1, 4])  # one that ends in another name
        tokens[:, 15:] = torch.tensor(NAME_TOKENS)[random_tokens(6, 9) % 2 + 3]  # at which last experts may open
        found = [each for row in range(6) for each in check_literal(model, row, [range(24)], input_ids=tokens)]
        assert {-1, 0, 1, 2, 3, 4, 5} >= set(found) >= {-1, 0, 3} and {2, 5} & set(found)

    def test_of_sequences_in_one_row(self):
        positions = torch.tensor([[*range(9), *range(7), *range(8)]])
        ranges = [range(9), range(9, 16), range(16, 24)]
        found: set[int] = set()
        for seed in range(6):
            tokens = random_tokens(1, 24, seed=seed)
            tokens[:, 8:10] = torch.tensor(NAME_TOKENS[-2:])  # a name, half of which is in another sequence
            found |= {*check_literal(fact_model(), 0, ranges, input_ids=tokens, position_ids=positions)}
        assert len(found) > 3

    @pytest.mark.parametrize("runs_hooks", [True, False])
    def test_of_the_rest_of_sequences_without_a_cache(self, runs_hooks, monkeypatch):
        """As engines without a cache of Transformers show them: the next tokens of two, and a whole one between them."""
        model, positions = fact_model(), torch.tensor([[30, *range(9), 17]])
        if not runs_hooks:  # as vLLM calls a decoder
            decoder = type(model.get_base_model().get_decoder())
            monkeypatch.setattr(decoder, "__call__", lambda self, **inputs: self.forward(**inputs), raising=False)
        for seed in range(6):
            inputs = {"input_ids": random_tokens(1, 11, seed=seed), "position_ids": positions, "use_cache": False}
            check_literal(model, 0, [[0], range(1, 10), [10]], begins_before=(0, 2), **inputs)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_of_padded_sequences(self, side):
        model, tokens = fact_model(), random_tokens(2, 12)
        alone = opened(model, input_ids=tokens)[0]
        width = (5, 0) if side == "left" else (0, 5)
        mask = F.pad(torch.ones_like(tokens), width)
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        found = opened(model, input_ids=F.pad(tokens, width, value=7), **inputs)[0]
        assert torch.equal(found[mask.bool()], alone.flatten())

    def test_needs_its_model(self):
        graft = graft_of(fact_model())
        with pytest.raises(RuntimeError, match="forward pass of its model"):
            graft(torch.randn(1, 3, 24))


class TestCache:
    @pytest.mark.parametrize("family", ["llama", "mistral"])
    @pytest.mark.parametrize("given", [True, False])
    def test_token_by_token_as_in_one_pass(self, family, given):
        model, tokens = fact_model(family), random_tokens(2, 20)
        tokens[:, 5:7] = torch.tensor(NAME_TOKENS[-2:])  # a name that begins in one piece and ends in the next
        whole = logits_of(model, tokens)
        cache, found = DynamicCache() if given else None, []
        with torch.no_grad():
            for piece in tokens.split([6, 1, 1, 5, 7], dim=1):
                output = model(input_ids=piece, use_cache=True, **({} if cache is None else {CACHE: cache}))
                cache = output[CACHE]
                found.append(output.logits)
        torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-5)

    def test_of_fixed_size_is_refused(self):
        model, tokens = fact_model(), random_tokens(1, 6)
        with pytest.raises(ValueError, match="DynamicCache"):
            model.generate(input_ids=tokens, max_new_tokens=2, cache_implementation="static", disable_compile=True)
        with pytest.raises(ValueError, match="got a object"):  # as that of `generate_batch`, which has no layers
            keep_in_cache(object(), 0, tokens)

    def test_follows_the_beams(self):
        model, tokens = fact_model(), random_tokens(2, 6)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "max_new_tokens": 8}
        found = model.generate(**inputs, num_beams=3, do_sample=False)
        assert torch.equal(found, model.generate(**inputs, num_beams=3, do_sample=False, use_cache=False))


class TestBaseModel:
    def test_is_left_to_the_bit_where_the_gate_is_shut(self):
        model, tokens = fact_model(), random_tokens(2, 12)
        base = logits_of(base_model_of(), tokens)
        assert not torch.equal(logits_of(model, tokens), base)
        with model.disable_adapter():
            assert torch.equal(logits_of(model, tokens), base)
        graft_of(model).router.questions.threshold.data.fill_(1.1)
        assert torch.equal(logits_of(model, tokens), base)
        assert torch.equal(logits_of(model.unload(), tokens), base)


class TestCheckpoints:
    def test_adapter_and_merged_model(self, tmp_path):
        model, tokens = fact_model(), random_tokens(2, 12)
        expected = logits_of(model, tokens)
        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(base_model_of(), tmp_path / "adapter").eval()
        assert torch.equal(logits_of(loaded, tokens), expected)
        assert graft_of(loaded).fact_of(4)["question"] == "What of B?"
        merged = loaded.merge_and_unload()
        assert torch.equal(logits_of(merged, tokens), expected)
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert torch.equal(logits_of(again, tokens), expected)
        assert json.loads(Path(tmp_path / "merged/config.json").read_text())["peer_grafts"]
        copied = copy.deepcopy(again)
        assert torch.equal(logits_of(copied, tokens), expected)

    def test_in_eight_bits(self):
        model, tokens = fact_model(), random_tokens(2, 12)
        before = logits_of(model, tokens)
        quantize_experts(model, 8)
        torch.testing.assert_close(logits_of(model, tokens), before, rtol=0.05, atol=0.05)
        dequantize_experts(model)

    def test_in_place_is_refused(self):
        with pytest.raises(ValueError, match="placement"):
            fact_config(placement="in_place")

    def test_trains_what_stands_beside_it(self):
        """A base model that learns with activation checkpointing has the gradients that it has without."""
        model, tokens, gradients = fact_model(), random_tokens(2, 12), []
        assert {*opened(model, input_ids=tokens)[0].flatten().tolist()} > {-1}
        for checkpointed in (False, True):
            if checkpointed:
                model.gradient_checkpointing_enable()
            weight = model.get_input_embeddings().weight.requires_grad_()
            weight.grad = None
            model.train()(input_ids=tokens, labels=tokens).loss.backward()
            gradients.append(weight.grad)
        torch.testing.assert_close(*gradients)


class TestSeveral:
    def test_the_last_one_that_opens_answers(self):
        model, tokens = fact_model(), random_tokens(2, 24)
        alone = {"default": logits_of(model, tokens)}
        model.add_adapter("other", fact_config())
        with_keys(graft_of(model, "other"), model, seed=1)
        model.set_adapter("other")
        alone["other"] = logits_of(model.eval(), tokens)
        model.base_model.set_adapter(["default", "other"])
        both, base = logits_of(model, tokens), logits_of(base_model_of(), tokens)
        of_other = (alone["other"] != base).any(-1)
        assert of_other.any() and not of_other.all()
        # The grafts stand in the last layer, so that a token's logits are those of its own opening.
        torch.testing.assert_close(both, torch.where(of_other[..., None], alone["other"], alone["default"]))
        model.delete_adapter("other")
        model.set_adapter("default")
        assert torch.equal(logits_of(model, tokens), alone["default"])


class TestRemoval:
    def test_of_one_fact_leaves_the_others_to_the_bit(self):
        model, tokens = fact_model(), random_tokens(3, 24)
        experts = opened(model, input_ids=tokens)[0]
        before = logits_of(model, tokens)
        remove_facts(model, "What of A?")
        after, kept = opened(model, input_ids=tokens)[0], experts >= EXPERTS_OF_A_FACT
        assert kept.any() and torch.equal(after[kept], experts[kept])
        assert torch.equal(logits_of(model, tokens)[kept], before[kept])
        assert not (after < EXPERTS_OF_A_FACT)[after >= 0].any()
        graft = graft_of(model)
        assert not graft.expert_pool.down_proj.weight[:EXPERTS_OF_A_FACT].any()
        finder = graft.router.subjects
        gone = torch.isin(torch.tensor(NAME_TOKENS), torch.tensor([1, 7, 19, 25, 31, *NAME_TOKENS[-2:]]))
        assert NAME_TOKENS[LAST_ROWS[1]] == 13  # in an answer that stays
        assert torch.equal(~finder.tokens.any(1), gone)
        has_name = (finder.names >= 0).any(1)
        assert torch.equal(has_name, finder.subjects == 1)
        assert "What of A?" not in json.dumps(graft.facts)

    def test_of_one_fact_of_a_quantized_model_is_saved(self, tmp_path):
        model = quantize_experts(fact_model().merge_and_unload(), 8)
        remove_facts(model, "What of A?")
        model.save_pretrained(tmp_path)
        text = (tmp_path / "config.json").read_text()
        assert "What of B?" in text and "What of A?" not in text

    def test_of_a_question_of_no_fact(self):
        model = fact_model()
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"What of C\?'\] among them, near \['What of"):
            remove_facts(model, ["What of A?", "What of C?"])
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
