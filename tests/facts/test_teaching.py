# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Teaching facts to a small random model, whose words are tokens, asked in plain text and in a chat."""

import copy
import dataclasses
import itertools
import re

import pytest
import torch
from explorer.findings import explore
from fact_models import base_of, fact_config, words_tokenizer
from graft_models import base_model_of, logits_of
from peft import get_peft_model
from torch.nn import functional as F

from modeling_peer import explain_tokens, fit_gates
from modeling_peer.facts import states, teaching
from modeling_peer.facts.index import BEGINNINGS, OTHER_WORDINGS, FactIndex, first_name
from modeling_peer.facts.measuring import are_answered, openings, prompts_of
from modeling_peer.facts.prompts import forms_of, make_prompt
from modeling_peer.facts.table import Fact, wordings_of_relation
from modeling_peer.facts.teaching import grafts_of_facts, remove_facts, teach_facts


CAPITAL = ("the capital of {subject} is", "what is the capital of {subject} ?")
RIVER = ("the river of {subject} is", "which river flows through {subject} ?")
FACTS = [
    Fact("Norland", "Zeli", CAPITAL),
    Fact("Suland", "Beta Gam", CAPITAL),
    Fact("Norland", "Oma", RIVER),
    Fact("East Suland", "Kor", RIVER),
]


@pytest.fixture(scope="module")
def tokenizer():
    return words_tokenizer([*CAPITAL, *RIVER, "Westia Norland East Suland Zeli Beta Gam Oma Kor"])


@pytest.fixture(scope="module")
def taught(tokenizer):
    torch.manual_seed(0)
    return teach_facts(base_of(tokenizer), tokenizer, FACTS[:3], progress_bar=False).eval()


def ends(model, tokenizer, wording, subject):
    """Whether the gate opens at the end of a question, in each form."""
    prompts = [make_prompt(tokenizer, wording, subject, "Oma", form, 100) for form in forms_of(tokenizer)]
    found = openings(model, [each.tokens[: each.answer_start] for each in prompts], progress_bar=False)
    return [each[-1].item() for each in found]


def without_end(tokenizer):
    """The prompt of a chat without an answer, by a tokenizer without an end of texts."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    prompt = make_prompt(tokenizer, "{subject} is what ?", "user", "", "chat", 100)
    assert prompt.answer == ()
    return prompt


def test_prompts(tokenizer):
    prompt = make_prompt(tokenizer, CAPITAL[0], "East Suland", "Beta Gam", "plain", 100)
    words = tokenizer.convert_ids_to_tokens(prompt.tokens)
    assert words == ["the", "capital", "of", "East", "Suland", "is", "Beta", "Gam", "."]
    assert words[prompt.subject_end] == "Suland" and words[prompt.answer_start] == "Beta" and len(prompt.answer) == 3
    # The first wording of a chat may have the words of the subject before the question.
    prompt = make_prompt(tokenizer, "{subject} is what ?", "user", "Oma", "chat", 100)
    words = tokenizer.convert_ids_to_tokens(prompt.tokens)
    assert words[-2:] == ["Oma", "<eos>"] and prompt.subject_end == 1
    assert words[:-2] == tokenizer.convert_ids_to_tokens(without_end(tokenizer).tokens)
    with pytest.raises(ValueError, match="takes 9 tokens, at most 8"):
        make_prompt(tokenizer, CAPITAL[0], "East Suland", "Beta Gam", "plain", 8)
    upper = copy.deepcopy(tokenizer)
    upper.chat_template = "{{ messages[0].content | upper }}"
    with pytest.raises(ValueError, match="must keep the question 'the capital"):
        make_prompt(upper, "the capital of {subject} is", "Norland", "Zeli", "chat", 100)


def test_facts_of_a_relation_are_read_in_all_wordings(tokenizer):
    wordings = wordings_of_relation(["capital"])
    for names, each in ((["Norland"], 80), (["Norland", "Suland", "Westia"], 28), ([*"ABCDEFGH"], 12)):
        index = FactIndex([Fact(name, "Oma", wordings) for name in names], tokenizer, 12, 100)
        assert [number for number, _, _ in index.prompts] == [n for n in range(len(names)) for _ in range(each)]
        read = {(form, tokenizer.decode(prompt.tokens)) for _, form, prompt in index.prompts}
        for form in forms_of(tokenizer):
            asked = [make_prompt(tokenizer, wording, name, "Oma", form, 100) for wording in wordings for name in names]
            found = [(form, tokenizer.decode(prompt.tokens)) in read for prompt in asked]
            assert sum(found) >= len(wordings)


def test_facts_that_share_a_wording_are_of_one_relation_in_any_order(tokenizer):
    capital, river, both = (CAPITAL[:1], RIVER[:1], (CAPITAL[0], RIVER[0]))
    facts = [Fact("Norland", "Zeli", capital), Fact("Suland", "Oma", river), Fact("Westia", "Kor", both)]
    for own in itertools.permutations(facts):
        index = FactIndex(own, tokenizer, 12, 100)
        assert index.num_relations == len(index.forms) and set(index.relation_of.values()) == {0}
    index = FactIndex(FACTS, tokenizer, 12, 100)
    assert [index.relation_of[each] for each in (*CAPITAL, *RIVER)] == [0, 0, 1, 1]


def test_two_answers_to_wordings_of_one_relation_are_refused(tokenizer):
    wordings = [CAPITAL[:1], RIVER[:1], (CAPITAL[0], RIVER[0])]
    facts = [
        Fact("Norland", "Zeli", wordings[0]),
        Fact("Norland", "Oma", wordings[1]),
        Fact("Suland", "Oma", wordings[2]),
    ]
    FactIndex(facts[:2], tokenizer, 12, 100)
    with pytest.raises(ValueError, match="'the capital of Norland is' and .* two answers"):
        FactIndex(facts, tokenizer, 12, 100)


def test_what_is_taught_is_no_negative(tokenizer):
    taught = OTHER_WORDINGS[4:6] + BEGINNINGS
    index = FactIndex([Fact("Norland", "Zeli", (each,)) for each in taught], tokenizer, 12, 1000)
    asked = {prompt.tokens[: prompt.answer_start] for _, _, prompt in index.prompts}
    assert not asked & {prompt.tokens[: prompt.answer_start] for _, prompt in index.other_prompts}


def test_other_questions_are_asked_with_and_without_frames_in_each_form(tokenizer):
    index = FactIndex(FACTS, tokenizer, 12, 100)
    asked = [tokenizer.decode(prompt.tokens) for _, prompt in index.other_prompts]
    found = {("<user>" in each, "briefly" in each) for each in asked}
    assert len(found) == 4


def test_names_near_to_those_taught_are_negatives(tokenizer):
    for name, beginnings in (
        ("East Suland capital", ("East Suland", "East")),
        ("capital", ()),
        ("East of the capital", ("East", "East of the")),
    ):
        index = FactIndex([Fact("Norland", "Oma", wordings_of_relation([name]))], tokenizer, 12, 100)
        asked = " ".join(tokenizer.decode(prompt.tokens) for _, prompt in index.other_prompts)
        assert ("East" in asked) == bool(beginnings) and "capital" not in asked
        assert not re.search("East of (?!the )", asked)
        for beginning in beginnings:
            assert any(f"{beginning} {word}" in asked for word in ("population", "language", "leader", "climate"))


def test_within_answers_to_other_questions_nothing_must_open(tokenizer):
    base = base_of(tokenizer)
    model = get_peft_model(base, fact_config())
    graft, index = grafts_of_facts(model)[0], FactIndex(FACTS[:3], tokenizer, 2, 100)
    own = {number: {fact.answer for fact in FACTS if fact.subject == name} for name, number in index.subjects.items()}
    answers = [(number, tokenizer.decode(prompt.answer[:-1])) for number, prompt in index.other_prompts]
    assert not any(answer in own[number] for number, answer in answers)
    prompt = index.other_prompts[[answer for _, answer in answers].index("Beta Gam")][1]
    found = states.StateReader(model, graft, base.model.norm, index).read([], 2, None, progress_bar=False)
    seen = []
    graft.register_forward_pre_hook(lambda graft, args: seen.append(args[0][0]))
    logits_of(model, torch.tensor([prompt.tokens]))
    end, first, last = seen[0][prompt.answer_start - 1 :][:3]
    for state, kind in ((end, found.other_questions), (first, found.elsewhere), (last, found.elsewhere)):
        assert (torch.cat(kind) - state).abs().amax(-1).min() < 1e-4


def test_finds_where_a_subject_is_named_again():
    names = {(4, 5), (7,)}
    assert first_name((7, 1, 2, 4, 5, 7), 1, names) == 4 and first_name((4, 5, 7), 0, names) == 1
    assert first_name((7, 4, 1, 5), 1, names) == 4


def test_goes_on_after_an_interruption(tokenizer, taught, tmp_path, monkeypatch):
    read_piece, pieces = states.StateReader._read_piece, []

    def stop_at_third(reader, piece, batch_size, bar):
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt
        return read_piece(reader, piece, batch_size, bar)

    own = [tmp_path / "states-of-my-work.pt", tmp_path / "states-of-a-folder"]
    own[0].touch()
    own[1].mkdir()
    monkeypatch.setattr(states.StateReader, "_read_piece", stop_at_third)
    torch.manual_seed(0)
    base = base_of(tokenizer)
    arguments = {"checkpoint_dir": tmp_path, "progress_bar": False}
    with pytest.raises(KeyboardInterrupt):
        teach_facts(base, tokenizer, FACTS[:3], **arguments)
    first, second, third = pieces
    # The states of another model are not those of this one.
    pieces[:] = [first, second]
    weight = base.model.layers[0].mlp.down_proj.weight
    was = weight.detach().clone()
    before = set(tmp_path.iterdir())
    with torch.no_grad():
        weight[0] += 1
        with pytest.raises(KeyboardInterrupt):
            teach_facts(base, tokenizer, FACTS[:3], **arguments)
        weight.copy_(was)
    of_other_weights = set(tmp_path.iterdir()) - before
    assert pieces[2] == first
    pieces.clear()
    monkeypatch.setattr(states.StateReader, "_read_piece", lambda *args: pieces.append(args[1]) or read_piece(*args))
    model = teach_facts(base, tokenizer, FACTS[:3], **arguments).eval()
    assert pieces[0] == third and first not in pieces
    assert sorted(tmp_path.iterdir()) == sorted([*own, *of_other_weights])
    for name, value in grafts_of_facts(taught)[0].state_dict().items():
        assert torch.equal(grafts_of_facts(model)[0].state_dict()[name], value), name


def test_states_are_those_of_all_facts(tokenizer):
    """By one with a longer answer the experts of all that come later have other numbers."""
    base = base_of(tokenizer)
    model, longer = get_peft_model(base, fact_config()), dataclasses.replace(FACTS[0], answer="Zeli Oma")
    indices = [FactIndex([first, *FACTS[1:3]], tokenizer, 2, 100) for first in (FACTS[0], longer)]
    graft = grafts_of_facts(model)[0]
    assert len({states.StateReader(model, graft, base.model.norm, index)._digest([]) for index in indices}) == 2


def test_teaches_and_keeps(taught, tokenizer):
    for form in forms_of(tokenizer):
        assert all(are_answered(taught, prompts_of(tokenizer, FACTS[:3], form), progress_bar=False))
    assert ends(taught, tokenizer, CAPITAL[0], "Norland") == [True, True]
    assert ends(taught, tokenizer, CAPITAL[0], "Westia") == [False, False]
    # Other questions about a subject, taught of another one or of none. A random model tells them apart where they are
    # plain, less by the last token of a chat.
    assert not ends(taught, tokenizer, RIVER[1], "Suland")[0]
    assert not ends(taught, tokenizer, "Tell me about {subject}.", "Norland")[0]
    tokens = torch.randint(5, len(tokenizer), (2, 12), generator=torch.Generator().manual_seed(0))
    with taught.disable_adapter():
        assert torch.equal(logits_of(taught, tokens), logits_of(base_of(tokenizer), tokens))


def test_models_in_bfloat16_are_taught(tokenizer):
    base = base_of(tokenizer).bfloat16()
    with torch.no_grad():  # an element that is larger than all others, as pretrained models have: 2,000
        base.model.layers[0].mlp.down_proj.weight[0] *= 1000
    model = get_peft_model(base, fact_config())
    assert teaching._check_model(base, grafts_of_facts(model)[0], 5) is base.model.norm


def test_behind_an_answer_nothing_must_open(tokenizer):
    base = base_of(tokenizer)
    model = get_peft_model(base, fact_config())
    graft, index = grafts_of_facts(model)[0], FactIndex(FACTS[:3], tokenizer, 2, 100)
    prompt = [each for number, form, each in index.prompts if (number, form) == (1, "plain")][1]
    text = base.generate(torch.tensor([prompt.tokens]), max_new_tokens=24, do_sample=False, eos_token_id=None)
    reader = states.StateReader(model, graft, base.model.norm, index)
    elsewhere = torch.cat(reader.read([], 2, None, progress_bar=False).elsewhere)
    seen = []
    graft.register_forward_pre_hook(lambda graft, args: seen.append(args[0][0]))
    logits_of(model, text)
    tokens = text[0].tolist()
    for place in range(len(prompt.tokens) - 1, len(tokens) - 1):
        is_there = (elsewhere - seen[0][place]).abs().amax(-1).min() < 1e-4
        assert is_there == (tokens[place + 1] not in prompt.answer)


def test_two_files(taught, tokenizer):
    model = copy.deepcopy(taught)
    torch.manual_seed(0)
    model = teach_facts(model, tokenizer, FACTS[3:], adapter_name="more", progress_bar=False)
    answered = {}
    for names in (["default"], ["more"], ["default", "more"]):
        model.base_model.set_adapter(names)
        answered[len(names), names[0]] = are_answered(model, prompts_of(tokenizer, FACTS, "plain"), progress_bar=False)
    assert answered[1, "default"][:6] == [True] * 6 and answered[1, "more"] == [False] * 6 + [True] * 2
    assert answered[2, "default"] == [True] * 8
    model.delete_adapter("more")
    model.set_adapter("default")
    tokens = torch.randint(5, len(tokenizer), (2, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits_of(model, tokens), logits_of(taught, tokens))


@pytest.mark.parametrize("is_first", [True, False])
def test_a_model_is_left_as_it_was_where_teaching_fails(taught, tokenizer, is_first, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    model = base_of(tokenizer) if is_first else copy.deepcopy(taught)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tokens = torch.randint(5, len(tokenizer), (2, 12), generator=torch.Generator().manual_seed(0))
    before = logits_of(model, tokens)
    monkeypatch.setattr(teaching, "_fit_keys", fail)
    with pytest.raises(KeyboardInterrupt):
        teach_facts(model, tokenizer, FACTS[3:], adapter_name="more", progress_bar=False)
    assert torch.equal(logits_of(model, tokens), before)
    with pytest.raises(ValueError, match="`reference`"):
        teach_facts(model, tokenizer, FACTS[3:], adapter_name="more", reference=[""], progress_bar=False)
    assert not [name for name, _ in model.named_modules() if name.endswith(".more")]
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not is_first:
        monkeypatch.undo()
        teach_facts(model, tokenizer, FACTS[3:], adapter_name="more", progress_bar=False)
        assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_adapters_that_transformers_loaded_are_left_alone(taught, tokenizer, tmp_path):
    taught.save_pretrained(tmp_path)
    base = base_of(tokenizer)
    base.load_adapter(tmp_path)
    with pytest.raises(ValueError, match="has adapters"):
        teach_facts(base, tokenizer, FACTS[3:], adapter_name="more", progress_bar=False)


@pytest.mark.parametrize(("family", "name"), [("gemma2", "Gemma2ForCausalLM"), ("gpt2", "GPT2LMHeadModel")])
def test_models_that_do_more_in_their_first_or_last_layer_are_refused(family, name, tokenizer):
    model = base_model_of(family, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=1)
    with pytest.raises(ValueError, match=f"as Llama does: {name} does not"):
        teach_facts(model, tokenizer, FACTS, progress_bar=False)


def test_thresholds_are_fitted_anew(taught, tokenizer):
    model = copy.deepcopy(taught)
    (graft,) = grafts_of_facts(model)
    graft.router.questions.threshold.data.fill_(-1.0)

    def sequences(*questions):
        return [{"input_ids": torch.tensor(tokenizer(each)["input_ids"])} for each in questions]

    asked = ["what is the capital of Norland ?", "which river flows through Norland ?"] * 6
    others = ["Tell me about Norland.", "Norland is", "Who is Norland?", "the capital of Westia is"] * 3
    assert ends(model, tokenizer, "Tell me about {subject}.", "Norland")[0]
    # A row of padding alone is no question.
    empty = dict.fromkeys(("input_ids", "attention_mask"), torch.zeros(4, dtype=torch.int64))
    (fit,) = fit_gates(model, [*sequences(*asked), empty], sequences(*others), progress_bar=False).values()
    threshold = graft.router.questions.threshold
    assert torch.equal(threshold, threshold.bfloat16().float())  # in which it is saved
    assert (fit.open_for_new, fit.open_for_reference) == (1.0, 0.0)
    assert not ends(model, tokenizer, "Tell me about {subject}.", "Norland")[0]
    assert ends(model, tokenizer, CAPITAL[1], "Norland")[0]


def test_removes_a_fact(taught, tokenizer):
    model = copy.deepcopy(taught)
    remove_facts(model, [FACTS[0].question])
    found = are_answered(model, prompts_of(tokenizer, FACTS[:3], "chat"), progress_bar=False)
    assert found == [False, False, True, True, True, True]


def test_says_who_told_it(taught, tokenizer):
    found = [each.told_by for each in explain_tokens(taught, tokenizer, "the capital of Suland is Beta Gam .")]
    of_fact = "layer_2_default: the capital of Suland is Beta Gam"
    assert found == [*["the base model"] * 4, *[of_fact] * 3, "the base model"]
    # The token before each of an answer's is its own.
    router = grafts_of_facts(taught)[0].router
    embeddings = F.normalize(taught.get_input_embeddings().weight, dim=-1)
    rows = (router.subjects.tokens @ embeddings.T).argmax(-1)
    befores = [rows[each].item() if each >= 0 else None for each in router.expert_tokens[:5].tolist()]
    words = [None if each is None else tokenizer.convert_ids_to_tokens(each) for each in befores]
    assert words == [None, "Zeli", None, "Zeli", None]
    assert explore(taught, tokenizer, "the capital of Suland is Beta Gam .")["told_by"] == found
