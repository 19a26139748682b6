# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The data that the page shows about a text and the experts that it uses."""

import contextlib
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from modeling_peer.analysis.expert_mask import masked_sets
from modeling_peer.analysis.token_explanation import ExpertReader, token_texts, told_by
from modeling_peer.experts import expert_cell
from modeling_peer.router import ProductKeyRouter

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
    Find the experts of a text, and what the page shows of each. Arguments are those of [`save_explorer_page`].

    Returns:
        `dict[str, Any]`: values that JSON can hold. `tokens`; for each of them `predictions` of the next one and its
        source `told_by`, see [`TokenExplanation`]; `losses` in nats of all tokens but the first; `layers`, for each
        layer the experts of each token; and `experts`, for each layer the findings about each expert.
    """
    if num_switched_off < 0:
        raise ValueError(f"`num_switched_off` must not be negative, got {num_switched_off}.")
    reader = ExpertReader(model)
    input_ids = reader.token_ids(tokenizer, text)
    read, logits = reader.read(input_ids=input_ids)
    if not logits.isfinite().all():
        raise ValueError("`model` must predict finite logits, got NaN or infinite ones: are its weights finite?")
    words = partial(token_texts, tokenizer)
    found = {"tokens": words(input_ids[0]), **_predicted(logits, input_ids[0], words), "layers": {}, "experts": {}}
    found["told_by"] = told_by(model, input_ids=input_ids)
    for label, retrieved in read.items():
        uses = [retrieved.largest(token, EXPERTS_OF_A_TOKEN) for token in range(input_ids.shape[1])]
        found["layers"][label] = [[_rounded(*use) for use in own] for own in uses]
        experts = sorted({expert for own in uses for expert, *_ in own})
        about = _about(reader, label, experts, words, contexts)
        most_used = [expert for expert, *_ in retrieved.largest(slice(None)) if expert in about]
        for expert in most_used[:num_switched_off]:
            # Suppressed: the error if a head would be left with fewer than its k experts.
            with contextlib.suppress(ValueError), masked_sets([reader.sets[label]], torch.tensor([expert])):
                about[expert]["without"] = _predicted(reader.read(input_ids=input_ids)[1], input_ids[0], words)
        found["experts"][label] = {str(expert): own for expert, own in about.items()}
    return found


def _rounded(expert, *numbers):
    # Significant digits: a small coefficient keeps its sign.
    return [expert, *(float(f"{number:.{DIGITS}g}") for number in numbers)]


def _predicted(logits, tokens, words):
    logits, tokens = logits.cpu(), tokens.cpu()
    losses = F.cross_entropy(logits[:-1], tokens[1:], reduction="none").tolist()
    shares, best = logits.softmax(-1).topk(min(PREDICTIONS, logits.shape[1]))
    return {
        "losses": [round(loss, DIGITS) for loss in losses],
        "predictions": [
            [[word, round(share, DIGITS)] for word, share in zip(words(own), of_own.tolist(), strict=True)]
            for own, of_own in zip(best, shares, strict=True)
        ],
    }


def _about(reader, label, experts, words, contexts):
    raised, lowered = reader.writes(label, torch.tensor(experts, dtype=torch.int64), WORDS)
    about = {}
    for place, expert in enumerate(experts):
        router = next(each for each in reversed(reader.routers(label)) if expert >= each.generation.first_expert)
        about[expert] = {
            "raises": words(raised[place]),
            "lowers": words(lowered[place]),
            "neighbors": _neighbors(router, expert),
            "added": expert >= router.config.num_experts,
            "contexts": [list(each) for each in contexts.of(label, expert)] if contexts else [],
        }
    return about


@torch.no_grad()
def _neighbors(router: ProductKeyRouter, expert: int) -> list[list[float]]:
    """The experts whose keys are most similar to that of `expert`: indices and cosines, over the keys of all heads."""
    keys = router.sub_keys.float()
    keys = keys if router.key_norm is None else router.key_norm(keys)
    own = expert - router.generation.first_expert
    cells = expert_cell(torch.arange(router.generation.num_experts, device=keys.device))
    products = [torch.einsum("hnd,hd->n", keys[:, half], keys[:, half, cells[half][own]]) for half in (0, 1)]
    squares = [keys[:, half].square().sum((0, 2)) for half in (0, 1)]
    dots, norms = (first[cells[0]] + second[cells[1]] for first, second in (products, squares))
    cosines = (dots / (norms * norms[own]).sqrt()).nan_to_num()  # of keys of zeros
    cosines[own] = -2.0
    best = cosines.topk(min(NEIGHBORS, len(cosines) - 1))
    return [
        _rounded(int(index) + router.generation.first_expert, cosine.item())
        for cosine, index in zip(*best, strict=True)
    ]
