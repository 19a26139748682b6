# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What a trained model knows about people, and how well it predicts text."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from common.machine import machine
from modeling_peer.analysis.evaluation import evaluation
from studies.common.people import NUM_TRAINED, VALUES, Person, draw_people
from studies.common.single_run import digests, read_texts, token_losses
from studies.common.study_folder import read_json
from studies.common.training_plan import CORPUS
from studies.people.arms import Run, train
from studies.people.texts import GROUPS, biography, groups_of_people


# Wordings of questions about a person: in no biography, only in those of others, and in those of the person.
WORDINGS = NEVER_TRAINED, TOLD_OF_OTHERS, TOLD = "never trained", "told of others", "told"
ASKED = 300  # people of each group, and as many others
OTHERS = "others"  # people without biographies, a group in the results
# A question begins a sequence, or follows another document: real text, or a biography of another person, as most
# biographies in training do. Each person's question follows another document, of which it sees the last tokens.
PLACES = BEGINS, IN_TEXT, AFTER_BIOGRAPHY = "", ", in a text", ", after a biography"
BEFORE = 40  # tokens of the other document


def make(run: Run, folder: Path) -> dict[str, Any]:
    """
    Train a model and measure it: losses of held-out texts, and what it recalls of each group of people in each place
    and wording. Wordings of their own biographies are asked only where the question begins a sequence.
    """
    output = train(run, folder)
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    texts = read_texts(folder / "held_out", "cpu")
    people = {str(told): group[:ASKED] for told, group in groups_of_people().items()}
    before = documents_before(tokenizer, texts[CORPUS])
    recalled = {
        group: {
            wording + place: recall(model, tokenizer, asked, wording, before[place])
            for place in PLACES
            for wording in (WORDINGS if place == BEGINS else WORDINGS[:2])
        }
        for group, asked in {**people, OTHERS: draw_people(ASKED, seed=1)}.items()
    }
    return {
        "training": read_json(output / "all_results.json"),
        "parameters": model.num_parameters(),
        "losses": losses(model, texts),
        "recall": recalled,
        "texts": digests(texts),
        "machine": machine(),
    }


def documents_before(tokenizer: PreTrainedTokenizerBase, text: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    For each place of a question, the tokens before it for each of `ASKED` people, `[ASKED, BEFORE]`: of a text, or of
    the biographies of people who are not asked.
    """
    generator, passages = np.random.default_rng(1), text.flatten().unfold(0, BEFORE, BEFORE)
    told = groups_of_people()[min(GROUPS)][-ASKED:]
    biographies = [tokenizer(biography(each, generator), add_special_tokens=False)["input_ids"] for each in told]
    return {
        BEGINS: torch.zeros(ASKED, 0, dtype=torch.int64),
        IN_TEXT: passages[:: len(passages) // ASKED][:ASKED],
        AFTER_BIOGRAPHY: torch.tensor([tokens[-BEFORE:] for tokens in biographies]),
    }


def recall(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    people: list[Person],
    wording: str,
    before: torch.Tensor,
    batch_size: int = 64,
) -> dict[str, dict[str, Any]]:
    """
    Ask a model for each attribute of people in one wording. A question follows the tokens `before`, of shape
    `(num_people or more, num_tokens)`, and an end-of-text token. Returns for each attribute the share that greedy
    decoding gets right (`recalled`), the people that it gets `right` (a digit for each), and the `bits` per person that
    it knows: the entropy of the attribute minus the mean over people of `-log2 p(answer | question)`, not clipped.
    """
    before = nn.functional.pad(before[: len(people)], (0, 1), value=tokenizer.eos_token_id)
    right: dict[str, list[bool]] = {attribute: [] for attribute in VALUES}
    surprise = dict.fromkeys(VALUES, 0.0)
    with evaluation(model):
        for start in range(0, len(people), batch_size):
            some = slice(start, start + batch_size)
            # All questions about a person follow the same tokens, which run once.
            cache = model(before[some], use_cache=True).past_key_values
            for attribute in VALUES:
                pairs = [ask(tokenizer, person, attribute, wording) for person in people[some]]
                width = max(len(tokens) for tokens, _ in pairs)
                # The padding after an answer does not matter, as nothing is asked there.
                padded = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in pairs])
                logits = model(padded, past_key_values=copy.deepcopy(cache)).logits
                for own, (tokens, begin) in zip(logits.log_softmax(-1), pairs, strict=True):
                    own, answer = own[begin - 1 : len(tokens) - 1], torch.tensor(tokens[begin:])
                    right[attribute].append(torch.equal(own.argmax(-1), answer))
                    surprise[attribute] -= own.gather(-1, answer[:, None]).sum().item() / math.log(2)
    return {
        "recalled": {attribute: sum(each) / len(people) for attribute, each in right.items()},
        "bits": {
            attribute: math.log2(math.prod(map(len, values))) - surprise[attribute] / len(people)
            for attribute, values in VALUES.items()
        },
        "right": {attribute: "".join(str(int(one)) for one in each) for attribute, each in right.items()},
    }


def ask(tokenizer, person, attribute, wording):
    """The tokens of a question with its answer, and where the answer begins."""
    place = {NEVER_TRAINED: -1, TOLD_OF_OTHERS: person.untold, TOLD: (person.untold + 1) % NUM_TRAINED}[wording]
    question = " ".join(person.question(attribute, place))
    answer = f"{question} {' '.join(person.attributes[attribute])}"
    asked, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, answer))
    return whole, len(asked)


def losses(model: nn.Module, texts: dict[str, torch.Tensor], batch_size: int = 8) -> dict[str, dict[str, Any]]:
    """
    The loss of each text in nats per token: over all of a sequence, over its second half, and the latter by sequence.
    """
    found = {}
    with evaluation(model):
        for name, text in texts.items():
            of_tokens = token_losses(model, text, batch_size)
            half = text.shape[1] // 2
            second = of_tokens[:, half - 1 :].mean(1)
            found[name] = {"all": of_tokens.mean().item(), "second half": second.mean().item()}
            found[name]["second half of each"] = [round(each, 4) for each in second.tolist()]
    return found
