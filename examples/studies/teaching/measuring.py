# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The runs of the study: teaching a model, and measuring what it recalls, what it lost, and what it invents."""

import copy
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from common.evaluation import held_out_loss
from common.text_data import DataTrainingArguments, tokenize_into_blocks
from modeling_peer.analysis.evaluation import evaluation
from modeling_peer.continual.generated_text import padded
from modeling_peer.facts.measuring import openings
from modeling_peer.facts.prompts import forms_of
from modeling_peer.facts.teaching import grafts_of_facts
from studies.common.base_model import save_base
from studies.common.corpora import load_corpus
from studies.common.study_folder import read_json
from studies.teaching.arms import taught
from studies.teaching.asking import (
    Retrieval,
    ask,
    ask_freely,
    open_experts,
    opens_behind,
    place_of,
    prompts_of,
    write_freely,
)
from studies.teaching.plan import RATES, TIMED, TRIAL_BLOCK, Run
from studies.teaching.questions import (
    Question,
    Split,
    all_countries,
    known_questions,
    negatives,
    recall_of,
    split,
    uses,
)


TEXTS, TEXT_BLOCKS, TEXT_LENGTH = ("brown", "python-docs", "perl-docs"), 8, 256
# Maximum number of taught facts that are asked, and of questions of each kind that are searched for invented answers.
MOST_ASKED, OF_A_KIND = 500, 100
TIMED_TOKENS, REPEATS = 32, 9
COMPARED = 16  # questions of each of two files whose logits are compared


class Study:
    """What all runs share: the base model, its tokenizer, texts, and the facts that it knows and does not know."""

    def __init__(self, folder: Path):
        save_base(None, folder)
        self.folder = folder
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder / "base")
        self.forms = forms_of(self.tokenizer)
        self.countries = all_countries()

    def load_model(self, dtype: torch.dtype = torch.bfloat16) -> Any:
        """The base model, whose weights are rounded to bfloat16 whatever the precision."""
        model = AutoModelForCausalLM.from_pretrained(self.folder / "base", dtype=torch.bfloat16).eval()
        return in_precision(model, dtype)

    def texts(self) -> torch.Tensor:
        """Blocks of held-out texts."""
        found = []
        for name in TEXTS:
            blocks = tokenize_into_blocks(
                load_corpus(name)["validation"], self.tokenizer, TEXT_LENGTH, DataTrainingArguments()
            )
            found += blocks.shuffle(seed=0)["input_ids"][:TEXT_BLOCKS]
        return torch.tensor(found)

    def known(self) -> list[Question]:
        """The questions that the base model answers, by the result of its run."""
        flags = read_json(self.folder / "runs" / f"{Run('base').name}.json")["right"]["countries"]
        asked = known_questions(self.countries)
        return [question for question, flag in zip(asked, flags, strict=True) if flag == "1"]

    def facts(self, run: Run) -> Split:
        """The facts that a run teaches, and others that it does not teach."""
        known = {question.item for question in self.known()}
        return split([item for item in self.countries if item not in known], run.number, run.block)

    def questions(self, run: Run, facts: Split) -> dict[str, list[Question]]:
        """The questions that every model is asked, by kind."""
        asked = facts.taught[:: -(-len(facts.taught) // MOST_ASKED)]
        known = self.known()
        subjects = {item.subject for item in facts.taught}
        capitals = {each.item.subject: each.item.answer for each in known if each.item.relation == "capital"}
        kinds: dict[str, list[Question]] = {}
        for each in known:
            kind = "others" if each.item.subject not in subjects else "taught subjects"
            kinds.setdefault(f"known, {kind}", []).append(each)
        return {
            "recall": recall_of(asked, self.forms),
            "recall, other names": recall_of(asked, self.forms, otherwise=True),
            **kinds,
            **uses(facts, capitals, self.forms),
        }


def in_precision(model: Any, dtype: torch.dtype) -> Any:
    """Convert the parameters of a model to a precision. Buffers, such as rotary frequencies, are not converted."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def is_known(kind: str) -> bool:
    """Whether questions of a kind are those that the model answers before anything is taught."""
    return kind.startswith("known")


def as_text(flags: list[bool]) -> str:
    """Flags as a string of zeros and ones, as they are saved."""
    return "".join("01"[flag] for flag in flags)


def make(run: Run, folder: Path) -> dict[str, Any]:
    """
    Make a run. Returns flags by kind of question: whether the answer is `right`, the gate is `open`, the fact of the
    gate has the right answer (`looked_up`), the search has `found` the fact, and a taught answer is `invented` where
    another is asked for. Also returns the loss on `text`, in nats per token.
    """
    study = Study(folder)
    if run.arm == "base":
        model = study.load_model(torch.float32)
        right = {"countries": as_text(ask(model, study.tokenizer, known_questions(study.countries)))}
        return {"right": right, "text": held_out_loss(model, study.texts(), desc="Text")}
    if run.arm == "two":
        return make_two(run, study)
    if run.arm == "seconds":
        # They do not depend on the learning rate.
        ways = [replace(run, arm=arm, learning_rate=RATES[arm][0] if arm in RATES else 0.0) for arm in TIMED]
        return {"seconds": {each.arm: teach(each, study)[1]["seconds"] for each in ways}}
    facts = study.facts(run)
    model, costs = (study.load_model(), {}) if run.arm in ("bm25", "nothing") else teach(run, study)
    questions, others = study.questions(run, facts), negatives(facts, study.forms)
    if run.block == TRIAL_BLOCK:
        questions = {kind: some for kind, some in questions.items() if kind == "recall" or is_known(kind)}
    if run.arm == "bm25":
        retrieval = Retrieval(facts.taught)
        costs["found"] = {
            kind: as_text([retrieval.nearest(each) == each.item for each in some])
            for kind, some in questions.items()
            if kind.startswith("recall")
        }
        questions, others = (
            {kind: list(map(retrieval.with_fact, some)) for kind, some in each.items()} for each in (questions, others)
        )
    # Comparisons with the base model run in float32. In bfloat16, twice as fast, they would depend on rounding.
    model = in_precision(in_precision(model.eval(), torch.bfloat16), torch.float32)
    # After a prompt with facts, a model answers in a sentence.
    ask_known = ask_freely if run.arm == "bm25" else ask
    right = {kind: as_text(ask_known(model, study.tokenizer, questions[kind])) for kind in filter(is_known, questions)}
    text = held_out_loss(model, study.texts(), desc="Text")
    model = in_precision(model, torch.bfloat16)
    for kind, some in questions.items():
        if not is_known(kind):
            right[kind] = as_text(ask_freely(model, study.tokenizer, some))
    if run.arm == "facts":
        costs |= gate_of(model, study, questions | others)
    if run.block != TRIAL_BLOCK:
        costs["invented"] = {
            kind: as_text(invents(model, study, facts, some[:OF_A_KIND])) for kind, some in others.items()
        }
    return {**costs, "text": text, "right": right}


def teach(run: Run, study: Study) -> tuple[nn.Module, dict[str, Any]]:
    """Teach the base model the facts of a run. Returns it with its costs."""
    # Grafts of facts are made with weights in bfloat16; trainings have weights in float32.
    model = study.load_model(torch.float32 if run.arm in RATES else torch.bfloat16)
    return taught(run, study.facts(run).taught, model, study.tokenizer, study.folder)


def gate_of(model: Any, study: Study, questions: dict[str, list[Question]]) -> dict[str, Any]:
    """Where the gate opens, at the ends of questions and in texts, and whether a lookup would answer correctly."""
    (graft,) = grafts_of_facts(model)
    found: dict[str, Any] = {"open": {}, "looked_up": {}}
    for kind, some in questions.items():
        experts = open_experts(model, study.tokenizer, some)
        found["open"][kind] = as_text([expert >= 0 for expert in experts])
        if kind.startswith("recall"):
            answers = [graft.fact_of(expert)["answer"] if expert >= 0 else None for expert in experts]
            right = [answer == each.item.answer for answer, each in zip(answers, some, strict=True)]
            found["looked_up"][kind] = as_text(right)
    found["open_behind"] = mean(opens_behind(model, study.tokenizer, questions["recall"]))
    tokens = torch.cat(openings(model, study.texts().tolist(), progress_bar=False))
    return {**found, "open_in_text": tokens.float().mean().item()}


def invents(model: nn.Module, study: Study, facts: Split, questions: list[Question]) -> list[bool]:
    """Whether a model answers each question with a wrong one of the taught answers of its relation or subject."""
    answers: dict[str, set[str]] = {}
    for item in facts.taught:
        for what in (item.relation, item.subject):
            answers.setdefault(what, set()).add(item.answer)
    found = []
    for each, text in zip(questions, write_freely(model, study.tokenizer, questions), strict=True):
        own = answers.get(each.item.relation, set()) | answers.get(each.item.subject, set())
        found.append(any(place_of(answer, text) < len(text) for answer in own - {each.item.answer}))
    return found


@torch.no_grad()
def make_two(run: Run, study: Study) -> dict[str, Any]:
    """Load two adapters that were taught separately: measure their recall, the rest after unloading, and latencies."""
    blocks = [Run("facts", run.number, block) for block in (run.block, run.block + 1)]
    base = study.load_model()
    recall = [study.questions(each, study.facts(each))["recall"] for each in blocks]
    ids, mask = padded([prompt.tokens for some in recall for prompt in prompts_of(study.tokenizer, some[:COMPARED])])
    inputs = {"input_ids": ids, "attention_mask": mask}
    before = base(**inputs).logits
    folders = [study.folder / "adapters" / each.name for each in blocks]
    for each, folder in zip(blocks, folders, strict=True):
        if not folder.exists():
            teach(each, study)
    model: Any = PeftModel.from_pretrained(copy.deepcopy(base), folders[0], adapter_name="first").eval()
    alone = model(**inputs).logits
    result: dict[str, Any] = {"seconds_a_token": latencies(base, model, study, recall[0])}
    model.load_adapter(folders[1], adapter_name="second")
    model.base_model.set_adapter(["first", "second"])
    result["right"] = {
        f"recall, file {number}": as_text(ask_freely(model, study.tokenizer, some))
        for number, some in enumerate(recall, 1)
    }
    model.delete_adapter("second")
    model.base_model.set_adapter("first")
    # What the second file did not change, the first one has changed.
    result["first_is_as_before"] = torch.equal(model(**inputs).logits, alone) and not torch.equal(alone, before)
    result["base_is_as_before"] = torch.equal(model.unload()(**inputs).logits, before)
    return result


def latencies(base: Any, model: Any, study: Study, recall: list[Question]) -> dict[str, dict[str, float]]:
    """
    Seconds per token of `generate` for the `base` model and the `taught` one, by what they write on: the minimum of
    several measurements, with the time for what is written on. Neither LM head counts as frozen, see `evaluation`.
    """
    plain = [each for each in recall if each.form == "plain"]
    asked = plain[next(i for i, expert in enumerate(open_experts(model, study.tokenizer, plain)) if expert >= 0)]
    texts = {
        "of a text": "Once upon a time there was",
        "after a subject's name": f"We have just talked about {asked.item.subject}, and then",
        "of an answer and what comes then": asked.wording.replace("{subject}", asked.item.subject),
    }
    found = {name: {"base": float("inf"), "taught": float("inf")} for name in texts}
    with evaluation(base), evaluation(model):
        for _ in range(REPEATS):
            for name, text in texts.items():
                inputs = study.tokenizer(text, return_tensors="pt")
                for which, each in (("base", base), ("taught", model)):
                    start = time.perf_counter()
                    each.generate(**inputs, max_new_tokens=TIMED_TOKENS, min_new_tokens=TIMED_TOKENS, do_sample=False)
                    seconds = (time.perf_counter() - start) / TIMED_TOKENS
                    found[name][which] = min(found[name][which], seconds)
    return found
