# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The contexts of a corpus in which experts are used most."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_peer.analysis.token_explanation import ExpertReader, RetrievedExperts


WINDOW = 8  # tokens on either side of the one that used an expert


class Context(NamedTuple):
    """
    A place in a corpus at which an expert was used: the token that used it, the text on either side, and the expert's
    router weight, the largest of all heads.
    """

    before: str
    token: str
    after: str
    weight: float


class _Best:
    """The largest weights so far of each expert of a layer, and the indices of their texts and tokens, or -1."""

    def __init__(self, num_experts: int, number: int):
        self.weights = torch.zeros(num_experts, number)
        self.texts = torch.full((num_experts, number), -1, dtype=torch.int32)
        self.tokens = torch.full((num_experts, number), -1, dtype=torch.int32)

    def update(self, text: int, retrieved: RetrievedExperts) -> None:
        number = self.weights.shape[1]
        num_tokens, num_active = retrieved.experts.shape
        given, place = retrieved.weights.sort(dim=1, descending=True, stable=True)
        chosen, again = retrieved.experts.gather(1, place).sort(dim=1, stable=True)
        given = given.gather(1, again)
        given[:, 1:][chosen[:, 1:] == chosen[:, :-1]] = 0.0  # keep the largest if several heads retrieve an expert
        given, chosen = given.flatten(), chosen.flatten()
        order = given.argsort(descending=True, stable=True)
        order = order[chosen[order].argsort(stable=True)]
        experts, counts = chosen[order].unique_consecutive(return_counts=True)
        starts = counts.cumsum(0) - counts
        # One row of candidates for each expert: its largest weights of this text.
        places = starts[:, None] + torch.arange(number)
        is_own = torch.arange(number) < counts[:, None]
        entries = order[places.clamp(max=len(order) - 1)]
        weights = torch.where(is_own, given[entries], 0.0)
        tokens = torch.arange(num_tokens, dtype=torch.int32).repeat_interleave(num_active)[entries]
        weights, kept = torch.cat([self.weights[experts], weights], dim=1).topk(number, dim=1)
        for own, new in ((self.texts, torch.full_like(tokens, text)), (self.tokens, tokens)):
            own[experts] = torch.cat([own[experts], new], dim=1).gather(1, kept)
        self.weights[experts] = weights


@dataclass
class ExpertContexts:
    """
    The contexts of a corpus in which each expert has its largest router weights. [`ExpertContexts.measure`] finds
    them.
    """

    tokenizer: PreTrainedTokenizerBase
    texts: list[torch.Tensor]
    _best: dict[str, _Best]

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        texts: Iterable[str],
        *,
        num_contexts: int = 3,
        max_length: int = 512,
        progress_bar: bool = True,
    ) -> "ExpertContexts":
        """
        Read a corpus, text by text. It takes `12 · num_contexts` bytes per expert and layer, and the tokens.

        Args:
            model (`nn.Module`): A causal language model with PEER or PKM layers, or with grafts.
            tokenizer ([`PreTrainedTokenizerBase`])
            texts (iterable of `str`): The corpus. Texts without tokens are skipped.
            num_contexts (`int`, *optional*, defaults to 3): How many contexts to keep for each expert.
            max_length (`int`, *optional*, defaults to 512):
                Maximum number of tokens of a text that are read, at most the number of the model's positions.
            progress_bar (`bool`, *optional*, defaults to `True`)

        Raises:
            `ValueError`: if the model has no experts, or for arguments out of range.
        """
        if isinstance(texts, str):
            raise ValueError(f"`texts` must be several texts, got {texts!r:.99}.")
        if min(num_contexts, max_length) < 1:
            raise ValueError(f"`num_contexts` and `max_length` must be positive, got {num_contexts} and {max_length}.")
        reader = ExpertReader(model)
        max_length = min(max_length, reader.num_positions or max_length)
        found = cls(
            tokenizer, [], {label: _Best(each.num_experts, num_contexts) for label, each in reader.sets.items()}
        )
        device = next(model.parameters()).device
        for text in tqdm(texts, desc="Reading contexts", disable=not progress_bar):
            tokens = tokenizer(text, return_tensors="pt")["input_ids"].long()[:, :max_length]
            if not tokens.numel():
                continue
            read, _ = reader.read(input_ids=tokens.to(device))
            for label, retrieved in read.items():
                found._best[label].update(len(found.texts), retrieved)
            found.texts.append(tokens[0])
        return found

    def of(self, label: str, expert: int) -> list[Context]:
        """The contexts of an expert in a layer, such as `"layer_1"`, the largest weight first."""
        best, contexts = self._best[label], []
        for weight, text, place in zip(best.weights[expert], best.texts[expert], best.tokens[expert], strict=True):
            if weight > 0:
                tokens = self.texts[text].tolist()
                parts = tokens[max(place - WINDOW, 0) : place], [tokens[place]], tokens[place + 1 :][:WINDOW]
                before, token, after = (str(self.tokenizer.decode(part)) for part in parts)
                contexts.append(Context(before, token, after, weight.item()))
        return contexts
