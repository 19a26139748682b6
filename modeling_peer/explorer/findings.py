# Copyright 2026 The PEER for Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What the page shows of a text and the experts that it uses, as plain data."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ..analysis.expert_mask import masked_sets
from ..analysis.token_explanation import ExpertReader, RetrievedExperts, token_ids
from ..key_grid import expert_cell
from ..product_key_router import ProductKeyRouter
from .contexts import ExpertContexts


EXPERTS_OF_A_TOKEN = 5
WORDS = 6
NEIGHBORS = 5
PREDICTIONS = 4
DIGITS = 4


def explore(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    contexts: ExpertContexts | None = None,
    num_switched_off: int = 8,
) -> dict[str, Any]:
    """
    Find the experts of a text, and what there is to say of each.

    Args:
        model (`nn.Module`): A causal language model with PEER or PKM layers, or with grafts.
        tokenizer ([`PreTrainedTokenizerBase`])
        text (`str`)
        contexts ([`ExpertContexts`], *optional*): Of a corpus.
        num_switched_off (`int`, *optional*, defaults to 8):
            For how many experts of each layer to find what the model predicts without them, one forward pass each:
            those of the largest router weight in the text.

    Returns:
        `dict[str, Any]`: what JSON can hold. `tokens`, and for each of them `predictions` of the next one and its
        `losses` in nats; `layers`, for each layer the experts of each token; and `experts`, for each layer what is
        known of each of them.
    """
    reader = ExpertReader(model)
    input_ids = token_ids(tokenizer, text)
    inputs = {"input_ids": input_ids.to(next(model.parameters()).device)}
    read, logits = reader.read(**inputs)
    words = _Words(tokenizer)
    found = {"tokens": words(input_ids[0]), **_predicted(logits, input_ids[0], words), "layers": {}, "experts": {}}
    for label, retrieved in read.items():
        uses = [retrieved.largest(token, EXPERTS_OF_A_TOKEN) for token in range(input_ids.shape[1])]
        found["layers"][label] = [[_rounded(*use) for use in own] for own in uses]
        experts = sorted({expert for own in uses for expert, *_ in own})
        about = _about(reader, label, experts, words, contexts)
        for expert in _most_used(retrieved, num_switched_off):
            without = _without(reader, label, expert, inputs)
            if expert in about and without is not None:
                about[expert]["without"] = _predicted(without, input_ids[0], words)
        found["experts"][label] = {str(expert): own for expert, own in about.items()}
    return found


class _Words:
    """Tokens as text, each decoded once."""

    def __init__(self, tokenizer):
        self.tokenizer, self.known = tokenizer, {}

    def __call__(self, tokens: torch.Tensor) -> list[str]:
        for token in tokens.tolist():
            if token not in self.known:
                word = self.tokenizer.decode([token])
                # A part of a character or a control character, which only the tokenizer has a name for.
                if "\ufffd" in word or not all(each.isprintable() or each.isspace() for each in word):
                    word = self.tokenizer.convert_ids_to_tokens(token)
                self.known[token] = word
        return [self.known[token] for token in tokens.tolist()]


def _rounded(expert, *numbers):
    return [expert, *(round(number, DIGITS) for number in numbers)]


def _predicted(logits, tokens, words):
    logits = logits.cpu()
    losses = F.cross_entropy(logits[:-1], tokens[1:], reduction="none").tolist()
    shares, best = logits.softmax(-1).topk(min(PREDICTIONS, logits.shape[1]))
    return {
        "losses": [round(loss, DIGITS) for loss in losses],
        "predictions": [
            [[word, round(share, DIGITS)] for word, share in zip(words(own), of_own.tolist(), strict=True)]
            for own, of_own in zip(best, shares, strict=True)
        ],
    }


def _most_used(retrieved: RetrievedExperts, number: int) -> list[int]:
    experts, places = retrieved.experts.unique(return_inverse=True)
    sums = torch.zeros(len(experts)).index_add_(0, places.flatten(), retrieved.weights.flatten())
    return experts[sums.argsort(descending=True, stable=True)[:number]].tolist()


def _about(reader, label, experts, words, contexts):
    raised, lowered = reader.writes(label, torch.tensor(experts, dtype=torch.int64), WORDS)
    return {
        expert: {
            "raises": words(raised[place]),
            "lowers": words(lowered[place]),
            "neighbors": _neighbors(_router_of(reader, label, expert), expert),
            "added": addition_of(_router_of(reader, label, expert), reader.expert_set(label).layers[0], expert),
            "contexts": [list(each) for each in contexts.of(label, expert)] if contexts else [],
        }
        for place, expert in enumerate(experts)
    }


def _router_of(reader, label, expert):
    return next(each for each in reader.routers(label) if expert in each.generation.experts)


@torch.no_grad()
def _neighbors(router: ProductKeyRouter, expert: int) -> list[list[float]]:
    """The experts whose keys are most similar to that of one: indices and cosines, over the keys of all heads."""
    keys = router.sub_keys.float()
    keys = keys if router.key_norm is None else router.key_norm(keys)
    own = expert - router.generation.first_expert
    cells = expert_cell(torch.arange(router.generation.num_experts, device=keys.device))
    products = [torch.einsum("hnd,hd->n", keys[:, half], keys[:, half, cells[half][own]]) for half in (0, 1)]
    squares = [keys[:, half].square().sum((0, 2)) for half in (0, 1)]
    dots, norms = (first[cells[0]] + second[cells[1]] for first, second in (products, squares))
    cosines = dots / (norms * norms[own]).sqrt()
    cosines[own] = -2.0
    best = cosines.topk(min(NEIGHBORS, len(cosines) - 1))
    return [
        _rounded(int(index) + router.generation.first_expert, cosine.item())
        for cosine, index in zip(*best, strict=True)
    ]


def addition_of(router: ProductKeyRouter, layer: int, expert: int) -> str | None:
    """With which call of `add_experts` an expert came, `None` if it was there from the start."""
    first = router.config.num_experts
    additions = [
        (number, addition)
        for number, addition in enumerate(router.config.expert_additions or (), start=1)
        if layer in addition["layers"]
    ]
    # Indices run through the open additions, which enlarge the first generation, and then through the protected ones.
    for number, addition in sorted(additions, key=lambda each: each[1]["mode"] == "protected"):
        if first <= expert < first + addition["num_experts"]:
            return f"addition {number} ({addition['mode']})"
        first += addition["num_experts"]
    return None


def _without(reader, label, expert, inputs):
    """The logits with an expert switched off; `None` if a head would be left with less than its k experts."""
    router = _router_of(reader, label, expert)
    mask = router.expert_mask
    num_experts = router.generation.num_experts if mask is None else mask.num_experts
    if 1 < num_experts <= router.num_experts_per_head:
        return None
    with masked_sets([reader.expert_set(label)], torch.tensor([expert])):
        return reader.read(**inputs)[1]
