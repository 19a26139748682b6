# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
A graft of facts: each token of an answer has an expert, and a gate opens it if two keys of the fact match.

The first key is the name of the subject, "France". Its tokens must stand in a row, at or before the present token.
They are recognized by the embeddings that enter the first layer. The second key is that of the question, "the capital
of". It must match the hidden state that enters the graft in a late layer. Within an answer, each next token has its
own second key, and the present token must also be the answer's previous one. For other subjects, and other questions
about the subject, the gate stays shut and the output is zero.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import DynamicLayer
from transformers.utils.generic import maybe_autocast

from .configuration_peer import PeerConfig
from .graft_layer import DecoderForward, PeerGraft, is_in_backward


@dataclass(frozen=True)
class FactSizes:
    """
    Sizes of a graft of facts, apart from its experts.

    Args:
        num_subjects (`int`): Number of subjects.
        num_names (`int`): Number of token sequences that name a subject: one for each of its tokenizations in texts.
        longest_name (`int`): Number of tokens of the longest name.
        num_tokens (`int`): Number of different tokens in names, and in answers without their last tokens.
        num_relations (`int`): Number of relations times forms of prompts (plain, chat). Each has a question key.
        num_continuations (`int`): Number of tokens after the first one of an answer. Each has its own question key.
        key_size (`int`): Elements of the key of a question.
    """

    num_subjects: int
    num_names: int
    longest_name: int
    num_tokens: int
    num_relations: int
    num_continuations: int
    key_size: int


# Fields of the configuration that have these values in every graft of facts.
FIELDS_OF_FACTS: dict[str, Any] = {
    "num_retrieval_heads": 1,
    "num_experts_per_head": 1,
    "query_size": 4,
    "query_norm": None,
    "expert_act": None,
    "gated_experts": False,
}


class KeyMatcher(nn.Module):
    """Cosine similarities of projected hidden states with keys of unit length, and the threshold of a match."""

    def __init__(self, hidden_size: int, num_keys: int, key_size: int):
        super().__init__()
        # Not an `nn.Linear`, which serving engines replace with their own layers.
        self.weight = nn.Parameter(torch.empty(key_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(key_size))
        self.keys = nn.Parameter(torch.empty(num_keys, key_size))
        self.threshold = nn.Parameter(torch.empty(()))

    def forward(self, hidden_states: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """
        Compute similarities with the given keys, or with all if `None`: `(..., hidden_size) -> (..., num_keys)`. They
        are in float32, as thresholds are close to similarities.
        """
        keys = self.keys if keys is None else keys
        with maybe_autocast(hidden_states.device.type, enabled=False):
            projected = F.linear(hidden_states.float(), self.weight.float(), self.bias.float())
            return F.normalize(projected, dim=-1) @ keys.float().T


class NameFinder(nn.Module):
    """
    Finds the names of subjects in texts, by the token embeddings that enter the first layer.

    Args:
        hidden_size (`int`)
        sizes ([`FactSizes`])
    """

    # Lower bound of the cosine of two embeddings of the same token, one of them rounded to bfloat16.
    SAME_TOKEN = 0.99
    # Base of the polynomial hash of the tokens of a name.
    MULTIPLIER = 6364136223846793005

    names: torch.Tensor
    subjects: torch.Tensor

    def __init__(self, hidden_size: int, sizes: FactSizes):
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(sizes.num_tokens, hidden_size))
        # The tokens of each name as rows of `tokens`, padded with -1 on the left, and the subject of each name.
        self.register_buffer("names", torch.full((sizes.num_names, sizes.longest_name), -1))
        self.register_buffer("subjects", torch.full((sizes.num_names,), -1))

    def tokens_of(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The row of each token in `tokens`, -1 for others, `(B, T, hidden_size) -> (B, T)`."""
        with maybe_autocast(embeddings.device.type, enabled=False):
            known = self.tokens.float()
            # Not divided by row, which would take longer than the product.
            lengths = torch.linalg.vector_norm(known, dim=-1).clamp_min(1e-12)
            products = F.normalize(embeddings.float(), dim=-1).to(known.device) @ known.T
            cosines, rows = (products / lengths).max(-1)
        return torch.where(cosines >= self.SAME_TOKEN, rows, -1)

    def forward(self, tokens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """
        The subject whose name ends at each token, `(B, T)`, -1 for none. The longest of several names counts. `starts`
        is the place where the sequence of each token begins, as a name must lie within one sequence.
        """
        named = torch.full_like(tokens, -1)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        lengths = (self.names >= 0).sum(-1)
        for length in range(1, min(self.names.shape[1], tokens.shape[1]) + 1):
            names, subjects = self.names[lengths == length, -length:], self.subjects[lengths == length]
            if not len(names):
                continue
            windows = tokens.unfold(1, length, 1)
            powers = torch.tensor([self.MULTIPLIER**place % 2**63 for place in range(length)], device=tokens.device)
            numbers, order = (names * powers).sum(-1).sort()
            found = order[torch.searchsorted(numbers, (windows * powers).sum(-1)).clamp(max=len(order) - 1)]
            is_name = (names[found] == windows).all(-1) & (places[: 1 - length or None] >= starts[:, length - 1 :])
            named[:, length - 1 :] = torch.where(is_name, subjects[found], named[:, length - 1 :])
        return named

    @torch.no_grad()
    def remove(self, subjects: torch.Tensor, kept_rows: torch.Tensor) -> None:
        """Remove the names of `subjects`, and the tokens that no other name has, except those in `kept_rows`."""
        self.names[torch.isin(self.subjects, subjects)] = -1
        rows = torch.arange(len(self.tokens), device=self.names.device)
        self.tokens[~torch.isin(rows, torch.cat([self.names.flatten(), kept_rows]))] = 0.0


class FactRouter(nn.Module):
    """
    Retrieves the expert of the answer's next token with a weight of one. If no fact is asked for, the weight is zero.

    If several named subjects have a fact of the relation, the last one counts. An engine without a cache of
    Transformers shows the router only a part of a sequence. There, the subject of an answer that has already begun is
    assumed to have come before this part.
    """

    expert_subjects: torch.Tensor
    expert_questions: torch.Tensor
    expert_tokens: torch.Tensor

    query_norm = None

    def __init__(self, config: PeerConfig, sizes: FactSizes):
        super().__init__()
        self.sizes = sizes
        self.subjects = NameFinder(config.hidden_size, sizes)
        num_questions = sizes.num_relations + sizes.num_continuations
        self.questions = KeyMatcher(config.hidden_size, num_questions, sizes.key_size)
        # The subject and the question key of each expert, and the answer's previous token as a row of
        # `subjects.tokens`. It is -1 for the first token of an answer, and all three are -1 without a fact.
        for name in ("expert_subjects", "expert_questions", "expert_tokens"):
            self.register_buffer(name, torch.full((config.num_experts,), -1))
        self.decoder_forward: DecoderForward | None = None
        # For activation checkpointing, which runs the layer again when the embeddings are no longer known.
        self._last_output: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`ProductKeyRouter.forward`]: one head, and one expert."""
        if is_in_backward() and self._last_output is not None:
            return self._last_output
        experts, similarities = self.retrieve_facts(hidden_states)
        is_open = similarities >= self.questions.threshold
        output = experts[..., None, None], is_open[..., None, None].to(hidden_states.dtype)
        self._last_output = output if self.decoder_forward.learns else None
        return output

    @torch.no_grad()
    def retrieve_facts(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The expert of each token and the similarity of its question, both `(B, T)`. The similarity is -2.0 where no
        subject was named, the answer has another previous token, or the question is nearer to another relation.
        """
        named, starts, present = self._named_subjects(hidden_states)
        has_hidden_past = self._has_hidden_past(starts)
        shape, num_relations = hidden_states.shape[:2], self.sizes.num_relations
        # Most texts have no candidates.
        is_candidate = torch.isin(self.expert_subjects, named) & (self.expert_questions >= 0)
        if has_hidden_past.any():
            is_candidate |= self.expert_questions >= num_relations
        candidates = is_candidate.nonzero()[:, 0]
        if not len(candidates):
            return named.new_zeros(shape), hidden_states.new_full(shape, -2.0, dtype=torch.float32)
        subjects, questions = self.expert_subjects[candidates], self.expert_questions[candidates]
        tokens = self.expert_tokens[candidates]
        mentions = self._last_mentions(named, starts, subjects)
        is_possible = (mentions >= 0) | (has_hidden_past[..., None] & (questions >= num_relations))
        is_possible &= (tokens < 0) | (tokens == present[..., None])
        # Compare with each key once: the rounding of a product may depend on its place in a matrix.
        relations = torch.arange(num_relations, device=questions.device)
        needed, places = torch.cat([relations, questions]).unique(return_inverse=True)
        similarities = self.questions(hidden_states, self.questions.keys[needed])
        # A question of another relation is nearest to that relation's key, even if the subject has no such fact.
        nearest = similarities[..., :num_relations].amax(-1)
        similarities = similarities[..., places[num_relations:]].masked_fill(~is_possible, -2.0)
        best = similarities.amax(-1, keepdim=True)
        chosen = torch.where(similarities == best, mentions, -2).argmax(-1)
        best = best[..., 0]
        return candidates[chosen], best.masked_fill(best < nearest, -2.0)

    def _named_subjects(self, hidden_states):
        """
        Three tensors: the subject that each token names, cached tokens included, `(B, past + T)`, -1 for none; the
        place where the sequence of each token begins; and the tokens as rows of `subjects.tokens`, both `(B, T)`.
        """
        decoder = self.decoder_forward
        if decoder is None or decoder.embeddings is None:
            raise RuntimeError("A graft of facts needs the forward pass of its model.")
        tokens = self.subjects.tokens_of(decoder.embeddings).to(hidden_states.device)
        mask = decoder.attention_mask
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            tokens = tokens.masked_fill(~mask[:, -tokens.shape[1] :].to(tokens.device, torch.bool), -1)
        decoder.to_keep.append(lambda cache, own=tokens: keep_in_cache(cache, id(self), own))
        starts, present = self._starts(tokens), tokens
        if (past := past_of(decoder.cache, id(self))) is not None:
            starts = torch.where(starts == 0, 0, starts + past.shape[1])
            tokens = torch.cat([past.to(tokens.device), tokens], dim=1)
        return self.subjects(tokens, F.pad(starts, (tokens.shape[1] - starts.shape[1], 0))), starts, present

    @staticmethod
    def _last_mentions(named, starts, subjects):
        """The last mention of each subject up to each token in its sequence, `(B, T, subjects)`, -1 for none."""
        places = torch.arange(named.shape[1], device=named.device)[:, None]
        mentions = torch.where(named[..., None] == subjects, places, -1).cummax(1)[0][:, -starts.shape[1] :]
        return torch.where(mentions >= starts[..., None], mentions, -1)

    def _starts(self, tokens):
        """The place where the sequence of each token begins, `(B, T)`. A row may hold several sequences."""
        positions = self.decoder_forward.position_ids
        if not isinstance(positions, torch.Tensor) or positions.shape != tokens.shape:
            return torch.zeros_like(tokens)
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        jumps = F.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0))
        return (places * jumps.to(places.device)).cummax(1)[0]

    def _has_hidden_past(self, starts):
        """Whether each token's sequence has earlier tokens that are neither in the input nor in a cache, `(B, T)`."""
        decoder = self.decoder_forward
        positions = decoder.position_ids
        if decoder.cache is not None or not isinstance(positions, torch.Tensor) or positions.shape != starts.shape:
            return torch.zeros_like(starts, dtype=torch.bool)
        return positions.to(starts.device).gather(1, starts) > 0


class FactGraft(PeerGraft):
    """
    A graft whose experts hold the answers of facts, see the module's docstring.

    Args:
        config (`PeerConfig`): With one head, one expert for each head and no activation.
        sizes (`FactSizes`)
        facts (`list[dict]`): See `facts` of [`PeerGraftConfig`].
    """

    answers_alone = True
    router: FactRouter  # type: ignore[assignment]

    def __init__(self, config: PeerConfig, sizes: FactSizes, facts: list[dict[str, Any]]):
        super().__init__(config)
        self.facts = facts
        self.router = FactRouter(config, sizes)

    def experts_of(self, number: int) -> range:
        """The expert indices of the fact `facts[number]`."""
        first = sum(fact["num_experts"] for fact in self.facts[:number])
        return range(first, first + self.facts[number]["num_experts"])

    def fact_of(self, expert: int) -> dict[str, Any]:
        """The fact of an expert."""
        ends = itertools.accumulate(fact["num_experts"] for fact in self.facts)
        return self.facts[next(number for number, end in enumerate(ends) if expert < end)]

    @torch.no_grad()
    def remove(self, number: int) -> None:
        """
        Remove the fact `facts[number]`: its experts, the keys of its answer, and the names of its subject if no other
        fact has it. All other facts stay as they are.
        """
        experts, router = list(self.experts_of(number)), self.router
        subjects = router.expert_subjects[experts]
        questions = router.expert_questions[experts]
        router.expert_subjects[experts] = router.expert_questions[experts] = router.expert_tokens[experts] = -1
        router.questions.keys[questions[questions >= router.sizes.num_relations]] = 0.0
        router.subjects.remove(subjects[~torch.isin(subjects, router.expert_subjects)], router.expert_tokens)
        self.expert_pool.up_proj.weight[experts] = self.expert_pool.down_proj.weight[experts] = 0.0
        self.facts[number] |= dict.fromkeys(("subject", "question", "answer"), None)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize it without facts: no key matches."""
        for parameter in self.parameters():
            init.zeros_(parameter)
        init.constant_(self.router.questions.threshold, 2.0)  # what no cosine reaches

    def watch(self, decoder_forward: DecoderForward, layers: nn.ModuleList) -> None:
        super().watch(decoder_forward, layers)
        self.router.decoder_forward = decoder_forward
        decoder_forward.watch_embeddings(layers)


def make_graft(
    config: PeerConfig,
    has_biases: bool = False,
    fact_sizes: dict[str, int] | None = None,
    facts: list[dict[str, Any]] | None = None,
    has_gate: bool = False,
) -> PeerGraft:
    """Make an uninitialized graft: a [`FactGraft`] if `fact_sizes` is given, otherwise a [`PeerGraft`]."""
    if fact_sizes is not None:
        return FactGraft(config, FactSizes(**fact_sizes), facts)
    return PeerGraft(config, has_biases, has_gate)


class NameTokens(DynamicLayer):
    """The tokens of sequences as rows of `NameFinder.tokens`, in a model's cache beside the keys of its layers."""

    owner: int | None = None


def past_of(cache: Any, owner: int) -> torch.Tensor | None:
    """The tokens of earlier forward passes, `(B, past)`, or `None` if a cache has none."""
    layer = _layer_of(cache, owner)
    return None if layer is None or not layer.is_initialized else layer.keys[:, 0, :, 0]


def keep_in_cache(cache: Any, owner: int, tokens: torch.Tensor) -> None:
    """
    Add the tokens of a forward pass, as rows of `NameFinder.tokens` and of shape `(B, T)`, to a cache.

    Raises:
        `ValueError`: for a cache that cannot hold them: of fixed size, paged, or with offloaded layers.
    """
    layer = _layer_of(cache, owner)
    if layer is None:
        is_fixed = not hasattr(cache, "layers") or getattr(cache, "is_compileable", False)
        if is_fixed or getattr(cache, "offloading", False):
            raise ValueError(
                f"A graft of facts needs a `DynamicCache` that is not offloaded, got a {type(cache).__name__}."
            )
        layer = NameTokens()
        layer.owner = owner
        cache.layers.append(layer)
    layer.update(tokens[:, None, :, None], tokens[:, None, :, None][..., :0])


def _layer_of(cache, owner):
    layers = getattr(cache, "layers", None) or ()
    return next((layer for layer in layers if isinstance(layer, NameTokens) and layer.owner == owner), None)
