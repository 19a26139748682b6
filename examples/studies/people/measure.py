# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What a trained model knows about people, and how well it predicts text."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from studies.people.texts import groups_of_people


# Wordings of questions about a person: in no biography, only in those of others, and in those of the person.
WORDINGS = NEVER_TRAINED, TOLD_OF_OTHERS, TOLD = "never trained", "told of others", "told"
ASKED = 300  # people of each group, and as many others
OTHERS = "others"  # people without biographies, a group in the results
IN_TEXT = ", in a text"  # asked after the tokens of another text, as most biographies appear in training


def make(run: Run, folder: Path) -> dict[str, Any]:
    """
    Train a model and measure it: losses of held-out texts, and what it recalls of each group of people in each
    wording, where the question begins a sequence and where it follows another text.
    """
    output = train(run, folder)
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    texts = read_texts(folder / "held_out", "cpu")
    people = {str(told): group[:ASKED] for told, group in groups_of_people().items()}
    places = {"": [], IN_TEXT: texts[CORPUS][0, :200].tolist()}
    recalled = {
        group: {
            wording + place: recall(model, tokenizer, asked, wording, before)
            for place, before in places.items()
            for wording in WORDINGS
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


def recall(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    people: list[Person],
    wording: str = NEVER_TRAINED,
    before: Sequence[int] = (),
    batch_size: int = 64,
) -> dict[str, dict[str, Any]]:
    """
    Ask a model for each attribute of people, in one wording and after the tokens `before` of another text. Returns for
    each attribute the share that greedy decoding gets right (`recalled`), the people that it gets `right` (a digit for
    each), and the `bits` per person that it knows: the entropy of the attribute minus the mean over people of
    `-log2 p(answer | question)`, not clipped.
    """
    shares, bits, right_of_each = {}, {}, {}
    with evaluation(model):
        for attribute, values in VALUES.items():
            right, surprise = [], 0.0
            pairs = [ask(tokenizer, person, attribute, wording, before) for person in people]
            for start in range(0, len(pairs), batch_size):
                batch = pairs[start : start + batch_size]
                width = max(len(tokens) for tokens, _ in batch)
                # The padding after an answer does not matter, as nothing is asked there.
                padded = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in batch])
                for own, (tokens, begin) in zip(model(padded).logits.log_softmax(-1), batch, strict=True):
                    own, answer = own[begin - 1 : len(tokens) - 1], torch.tensor(tokens[begin:])
                    right.append(torch.equal(own.argmax(-1), answer))
                    surprise -= own.gather(-1, answer[:, None]).sum().item() / math.log(2)
            shares[attribute] = sum(right) / len(people)
            right_of_each[attribute] = "".join(str(int(each)) for each in right)
            bits[attribute] = math.log2(math.prod(map(len, values))) - surprise / len(people)
    return {"recalled": shares, "bits": bits, "right": right_of_each}


def ask(tokenizer, person, attribute, wording=NEVER_TRAINED, before=()):
    """The tokens of a question with its answer, and where the answer begins."""
    place = {NEVER_TRAINED: -1, TOLD_OF_OTHERS: person.untold, TOLD: (person.untold + 1) % NUM_TRAINED}[wording]
    question = " ".join(person.question(attribute, place))
    answer = f"{question} {' '.join(person.attributes[attribute])}"
    asked, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, answer))
    return [*before, tokenizer.eos_token_id, *whole], len(before) + 1 + len(asked)


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
