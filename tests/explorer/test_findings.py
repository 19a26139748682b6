# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What the explorer says of experts, against what is computed by hand."""

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest.mock import MagicMock

import pytest
import torch
from documentation import ROOT
from explorer import ExpertContexts
from explorer.app import MAX_CHARACTERS, make_app, visitors_page
from explorer.findings import _neighbors, explore
from explorer.page import explorer_page
from graft_models import merged_in_turn
from tiny_models import PROTECTED, random_tokens, tiny_config, tiny_model
from torch.nn import functional as F
from transformers import AutoTokenizer
from word_tokenizer import word_tokenizer

from modeling_peer import explain_tokens, masked_experts
from modeling_peer.analysis.expert_mask import masked_sets
from modeling_peer.analysis.token_explanation import ExpertReader, token_texts


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config("peer", "pkm"))


def texts(tokenizer, *lengths):
    return [tokenizer.decode(random_tokens(length, seed=length)) for length in lengths]


def test_contexts_are_those_of_largest_weight(model, tokenizer):
    corpus = texts(tokenizer, 20, 31, 9)
    contexts = ExpertContexts.measure(model, tokenizer, ["", *corpus], num_contexts=2, progress_bar=False)
    reader = ExpertReader(model)
    seen = several = 0
    for label in reader.sets:
        for expert in range(model.config.num_experts):
            everywhere = []
            for text in corpus:
                tokens = text.split()
                read, _ = reader.read(input_ids=tokenizer(text, return_tensors="pt")["input_ids"])
                retrieved = read[label].experts == expert
                several += (retrieved.sum(1) > 1).sum().item()
                for place in retrieved.any(1).nonzero()[:, 0].tolist():
                    before, after = tokens[max(place - 8, 0) : place], tokens[place + 1 : place + 9]
                    weight = read[label].weights[place][retrieved[place]].max().item()
                    everywhere.append((weight, (" ".join(before), tokens[place], " ".join(after))))
            expected = sorted(everywhere, key=lambda each: -each[0])[:2]
            found = contexts.of(label, expert)
            assert [each.weight for each in found] == [weight for weight, _ in expected]
            assert [(each.before, each.token, each.after) for each in found] == [place for _, place in expected]
            seen += len(found)
    assert seen > 50 and several > 5


def cells_in_shells(size):
    """The cells of a key grid in the order of their experts: each shell down its column, then back along its row."""
    for shell in range(size):
        yield from ((row, shell) for row in range(shell))
        yield from ((shell, column) for column in range(shell, -1, -1))


@pytest.mark.parametrize("fields", [{}, {"sub_keys_per_head": True}, {"query_norm": "rms"}], ids=str)
@pytest.mark.parametrize(("added", "size"), [(False, 6), (True, 5)])
def test_neighbors_have_the_most_similar_keys(fields, added, size):
    """Also those of experts that were added, whose indices begin behind the first ones."""
    model = tiny_model(tiny_config("peer", expert_additions=[{"layers": [0], **PROTECTED}], **fields))
    router = model.model.layers[0].mlp.added_routers[0] if added else model.model.layers[0].mlp.router
    first_expert = 36 * added
    keys = router.sub_keys if router.key_norm is None else router.key_norm(router.sub_keys)
    rows, columns = (keys[:, half].transpose(0, 1).flatten(1) for half in (0, 1))
    whole = torch.stack([torch.cat([rows[row], columns[column]]) for row, column in cells_in_shells(size)])
    cosines = F.cosine_similarity(whole[:, None], whole[None], dim=-1).fill_diagonal_(-2)
    for expert in (0, 17, size**2 - 1):
        best = cosines[expert].topk(5)
        indices, found = zip(*_neighbors(router, first_expert + expert), strict=True)
        assert list(indices) == (first_expert + best.indices).tolist()
        assert list(found) == pytest.approx(best.values.tolist(), abs=1e-4)


def test_experts_know_whether_they_were_added(tokenizer):
    additions = [{"layers": [0, 1], "mode": "open", "num_experts": 13}, {"layers": [1], **PROTECTED}]
    model = tiny_model(tiny_config("peer", "peer", expert_additions=additions))
    experts = explore(model, tokenizer, *texts(tokenizer, 30))["experts"]
    for of_layer in experts.values():
        assert {own["added"] for own in of_layer.values()} == {False, True}
        assert all(own["added"] == (int(expert) >= 36) for expert, own in of_layer.items())


def test_predictions_are_those_of_the_model_with_and_without_an_expert(model, tokenizer):
    (text,) = texts(tokenizer, 12)
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    found = explore(model, tokenizer, text, num_switched_off=3)
    json.dumps(found, allow_nan=False)
    assert found["tokens"] == text.split()

    def assert_predicted(said):
        with torch.no_grad():
            logits = model(tokens).logits[0]
        expected = F.cross_entropy(logits[:-1], tokens[0, 1:], reduction="none")
        assert said["losses"] == pytest.approx(expected.tolist(), abs=1e-3)
        for own, shares in zip(said["predictions"], logits.softmax(-1), strict=True):
            best = shares.topk(4)
            assert [word for word, _ in own] == [f"w{index}" for index in best.indices.tolist()]
            assert [share for _, share in own] == pytest.approx(best.values.tolist(), abs=1e-3)

    assert_predicted(found)
    for layer, label in enumerate(found["experts"]):
        switched = {expert: own for expert, own in found["experts"][label].items() if "without" in own}
        assert 1 <= len(switched) <= 3
        for expert, own in switched.items():
            with masked_experts(model, int(expert), layers=layer):
                assert_predicted(own["without"])


def test_tokens_that_are_no_text_have_the_name_that_the_tokenizer_gives_them():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "checkpoints" / "peer-nano")
    tokens = torch.tensor(tokenizer("é").input_ids + tokenizer("\x00\n x").input_ids)
    assert token_texts(tokenizer, tokens) == ["Ã", "©", "Ā", "\n", " x"]


def test_all_named_experts_are_described(model, tokenizer):
    (text,) = texts(tokenizer, 30)
    found = explore(model, tokenizer, text)
    for label, tokens in found["layers"].items():
        named = {str(expert) for uses in tokens for expert, *_ in uses}
        assert named == set(found["experts"][label])
        for own in found["experts"][label].values():
            assert len(own["raises"]) == len(own["lowers"]) == 6 and own["raises"] != own["lowers"]
            assert own["contexts"] == []


@pytest.mark.parametrize("sizes", [(64, 36), (64, 64)], ids=str)
def test_experts_of_one_graft_alone_are_off(sizes, tokenizer):
    model = merged_in_turn(*sizes)
    reader = ExpertReader(model)
    (text,) = texts(tokenizer, 12)
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    found = explore(model, tokenizer, text)
    for graft in (0, 1):
        label = f"layer_1_graft_{graft}"
        (router,) = reader.routers(label)
        expert, own = next((int(each), own) for each, own in found["experts"][label].items() if "without" in own)
        with torch.no_grad(), masked_sets([reader.sets[label]], torch.tensor([expert])):
            expected = model(tokens).logits
            indices, _ = router(torch.randn(1, 200, 24))
            assert not (indices == expert).any()
        losses = F.cross_entropy(expected[0, :-1], tokens[0, 1:], reduction="none")
        assert own["without"]["losses"] == pytest.approx(losses.tolist(), abs=1e-4)


def test_a_text_of_a_visitor_is_limited(model, tokenizer, monkeypatch):
    with pytest.raises(ValueError, match="4000"):
        visitors_page(model, tokenizer, "w" * (MAX_CHARACTERS + 1))
    assert visitors_page(model, tokenizer, "w1 w2").startswith("<iframe")
    monkeypatch.setattr("explorer.app.MAX_TOKENS", 3)
    with pytest.raises(ValueError, match="3 tokens"):
        visitors_page(model, tokenizer, "w1 w2 w3 w4")


def test_experts_that_a_page_switches_off_are_on_for_other_visitors(model, tokenizer):
    pages = {text: visitors_page(model, tokenizer, text) for text in ("w1 w2", "w3 w4")}
    with ThreadPoolExecutor(4) as pool:
        asked = [*pages] * 4
        assert [*pool.map(partial(visitors_page, model, tokenizer), asked)] == [pages[text] for text in asked]


def test_small_coefficients_keep_their_sign(tokenizer):
    model = tiny_model(tiny_config("peer", "pkm"))
    model.model.layers[0].mlp.expert_pool.up_proj.weight.data *= 1e-6
    uses = [use for own in explore(model, tokenizer, *texts(tokenizer, 12))["layers"]["layer_0"] for use in own]
    assert {coefficient > 0 for _, _, coefficient in uses} == {True, False}
    assert all(0 < abs(coefficient) < 1e-4 for _, _, coefficient in uses)


def test_an_expert_with_a_key_of_zeros_has_neighbors(tokenizer):
    model = tiny_model(tiny_config("peer", query_norm=None))
    model.model.layers[0].mlp.router.sub_keys.data[:, :, 0] = 0
    json.dumps(explore(model, tokenizer, "w1 w2 w3"), allow_nan=False)
    assert len(_neighbors(model.model.layers[0].mlp.router, 0)) == 5


def test_a_text_has_at_most_the_positions_of_the_model(tokenizer):
    model = tiny_model(tiny_config("peer", max_position_embeddings=16))
    fits, longer = texts(tokenizer, 16, 17)
    explore(model, tokenizer, fits)
    for read in (explore, explain_tokens):
        with pytest.raises(ValueError, match=r"at most 16 tokens.*got 17"):
            read(model, tokenizer, longer)
    contexts = ExpertContexts.measure(model, tokenizer, [longer], progress_bar=False)
    assert len(contexts.texts[0]) == 16


@pytest.mark.parametrize("wrong", ["def f(x)", []])
def test_a_page_needs_a_list_of_texts(model, tokenizer, wrong):
    with pytest.raises(ValueError, match="`texts` must be"):
        explorer_page(model, tokenizer, wrong)


def test_numbers_that_count_nothing_are_refused(model, tokenizer):
    for call in (
        partial(explore, model, tokenizer, "w1", num_switched_off=-1),
        partial(explain_tokens, model, tokenizer, "w1", num_experts=-1),
        partial(explain_tokens, model, tokenizer, "w1", num_words=0),
        partial(ExpertContexts.measure, model, tokenizer, ["w1"], num_contexts=-1),
        partial(ExpertContexts.measure, model, tokenizer, ["w1"], max_length=-1),
    ):
        with pytest.raises(ValueError, match=rf"`{next(iter(call.keywords))}`"):
            call()


def test_a_model_that_predicts_nan_is_refused(tokenizer):
    model = tiny_model(tiny_config("peer"))
    model.lm_head.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="finite logits"):
        explore(model, tokenizer, "w1 w2")


def test_each_layer_has_as_many_experts_to_switch_off_as_asked_for(tokenizer):
    """Also where some that the text uses much are not among the largest of any token, which are those described."""
    model = tiny_model(tiny_config("peer", "peer", num_experts=64, num_experts_per_head=8))
    found = explore(model, tokenizer, *texts(tokenizer, 6), num_switched_off=12)
    for of_layer in found["experts"].values():
        assert sum("without" in own for own in of_layer.values()) == 12


def test_the_app_opens_with_the_page_of_its_text(model, tokenizer, monkeypatch):
    gradio = MagicMock()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    make_app(model, tokenizer, text="w1 w2")
    gradio.HTML.assert_called_once_with(visitors_page(model, tokenizer, "w1 w2"))
