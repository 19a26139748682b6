# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
A graft of facts: each token of an answer has an expert, which a gate opens by two keys of the fact.

The first key is the name of the subject, "France": its tokens have to stand at or before the present one, one after
the other, as what enters the first layer tells. The second is that of the question, "the capital of": it has to match
the present token, after which the answer's next token is to come, by what enters the graft in a late layer. Within an
answer, the present token has to be that of the answer too. Questions about others, and other questions about the
subject, leave the gate shut, and the output is zero.
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
    What a graft of facts holds beside its experts.

    Args:
        num_subjects (`int`): Number of subjects.
        num_names (`int`): Number of their names as tokens: one for each way in which a subject stands in texts.
        longest_name (`int`): The most tokens that a name has.
        num_tokens (`int`): Number of different tokens in names, and in answers but for their last ones.
        num_relations (`int`): Number of relations: facts of one are asked in the same wordings.
        num_continuations (`int`): Number of answers' tokens after the first: each is found by a key of its own.
        key_size (`int`): Elements of the key of a question.
    """

    num_subjects: int
    num_names: int
    longest_name: int
    num_tokens: int
    num_relations: int
    num_continuations: int
    key_size: int


# What a graft of facts has in common with others, and cannot choose.
FIELDS_OF_FACTS: dict[str, Any] = {
    "num_retrieval_heads": 1,
    "num_experts_per_head": 1,
    "query_size": 4,
    "query_norm": None,
    "expert_act": None,
    "gated_experts": False,
}


class KeyMatcher(nn.Module):
    """The cosine similarity of hidden states, projected, with keys of length one, and the threshold of a match."""

    def __init__(self, hidden_size: int, num_keys: int, key_size: int):
        super().__init__()
        # No `nn.Linear`: engines put layers of their own in the place of these.
        self.weight = nn.Parameter(torch.empty(key_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(key_size))
        self.keys = nn.Parameter(torch.empty(num_keys, key_size))
        self.threshold = nn.Parameter(torch.empty(()))

    def forward(self, hidden_states: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """
        `(..., hidden_size) -> (..., num_keys)`, of all `keys` or of these, in float32 as thresholds are close to
        similarities.
        """
        keys = self.keys if keys is None else keys
        with maybe_autocast(hidden_states.device.type, enabled=False):
            projected = F.linear(hidden_states.float(), self.weight.float(), self.bias.float())
            return F.normalize(projected, dim=-1) @ keys.float().T


class NameFinder(nn.Module):
    """
    Finds the names of subjects in texts, by the states that enter the first layer, which are embeddings of tokens.

    Args:
        hidden_size (`int`)
        sizes ([`FactSizes`])
    """

    # The cosine of two embeddings of the same token, one of them rounded to bfloat16, is at least this.
    SAME_TOKEN = 0.99
    # By which the tokens of a name become one number.
    MULTIPLIER = 6364136223846793005

    names: torch.Tensor
    subjects: torch.Tensor

    def __init__(self, hidden_size: int, sizes: FactSizes):
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(sizes.num_tokens, hidden_size))
        # The tokens of each name as rows of `tokens`, with -1 before those of shorter ones, and whose name it is.
        self.register_buffer("names", torch.full((sizes.num_names, sizes.longest_name), -1))
        self.register_buffer("subjects", torch.full((sizes.num_names,), -1))

    def tokens_of(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The row of each token in `tokens`, -1 for others, `(B, T, hidden_size) -> (B, T)`."""
        with maybe_autocast(embeddings.device.type, enabled=False):
            known = F.normalize(self.tokens.float(), dim=-1)
            cosines, rows = (F.normalize(embeddings.float(), dim=-1).to(known.device) @ known.T).max(-1)
        return torch.where(cosines >= self.SAME_TOKEN, rows, -1)

    def forward(self, tokens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """
        The subject whose name ends at each token, `(B, T)`, -1 for none; of several that of the longest name. `starts`
        is where the sequence of each token begins: a name is in one of them.
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
        """Forget the names of some subjects, and the tokens that no other name has, but for `kept_rows`."""
        self.names[torch.isin(self.subjects, subjects)] = -1
        rows = torch.arange(len(self.tokens), device=self.names.device)
        self.tokens[~torch.isin(rows, torch.cat([self.names.flatten(), kept_rows]))] = 0.0


class FactRouter(nn.Module):
    """
    Retrieves the expert of the fact's token that is to come, with a weight of one, or none, with a weight of zero.

    Of several subjects that were named and have a fact of the relation, the last one is meant. Where only a part of a
    sequence is seen, as an engine without a cache of Transformers shows it, the subject of an answer that has begun is
    taken to have come before.
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
        # The subject and the question of each expert, and the token of the answer at which it opens, as a row of
        # `subjects.tokens`. Those without a fact have none, -1, and the first ones of answers open at any token.
        for name in ("expert_subjects", "expert_questions", "expert_tokens"):
            self.register_buffer(name, torch.full((config.num_experts,), -1))
        self.decoder_forward: DecoderForward | None = None
        # Activation checkpointing runs the layer again when the states of other layers are gone.
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
        The expert of each token and the similarity of its question, both `(B, T)`, -2.0 where no fact can be meant: no
        subject was named, or the question is nearer to another relation.
        """
        named, starts, present = self._named_subjects(hidden_states)
        has_hidden_past = self._has_hidden_past(starts)
        shape, num_relations = hidden_states.shape[:2], self.sizes.num_relations
        # Of most texts there is none.
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
        # Each key once, as the same product elsewhere in a matrix may be rounded otherwise.
        relations = torch.arange(num_relations, device=questions.device)
        needed, places = torch.cat([relations, questions]).unique(return_inverse=True)
        similarities = self.questions(hidden_states, self.questions.keys[needed])
        # A question of another relation is nearest to that, of which the subject may have no fact.
        nearest = similarities[..., :num_relations].amax(-1)
        similarities = similarities[..., places[num_relations:]].masked_fill(~is_possible, -2.0)
        best = similarities.amax(-1, keepdim=True)
        chosen = torch.where(similarities == best, mentions, -2).argmax(-1)
        best = best[..., 0]
        return candidates[chosen], best.masked_fill(best < nearest, -2.0)

    def _named_subjects(self, hidden_states):
        """
        The subject that each token names, -1 for none, of those before in the cache too, `(B, past + T)`; where the
        sequence of each token begins; and the tokens as rows of `subjects.tokens`, both `(B, T)`.
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
        """The last place up to each token of its sequence that names each subject, -1 for none, `(B, T, subjects)`."""
        places = torch.arange(named.shape[1], device=named.device)[:, None]
        mentions = torch.where(named[..., None] == subjects, places, -1).cummax(1)[0][:, -starts.shape[1] :]
        return torch.where(mentions >= starts[..., None], mentions, -1)

    def _starts(self, tokens):
        """Where the sequence of each token begins, `(B, T)`: several of them may lie in one row."""
        positions = self.decoder_forward.position_ids
        if not isinstance(positions, torch.Tensor) or positions.shape != tokens.shape:
            return torch.zeros_like(tokens)
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        jumps = F.pad(positions[:, 1:] != positions[:, :-1] + 1, (1, 0))
        return (places * jumps.to(places.device)).cummax(1)[0]

    def _has_hidden_past(self, starts):
        """Whether tokens of the sequence came before what is seen of it, `(B, T)`."""
        decoder = self.decoder_forward
        positions = decoder.position_ids
        if decoder.cache is not None or not isinstance(positions, torch.Tensor) or positions.shape != starts.shape:
            return torch.zeros_like(starts, dtype=torch.bool)
        return positions.to(starts.device).gather(1, starts) > 0


class FactGraft(PeerGraft):
    """
    A graft whose experts are those of facts, see the module's docstring.

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
        """The experts of the fact with a number in `facts`."""
        first = sum(fact["num_experts"] for fact in self.facts[:number])
        return range(first, first + self.facts[number]["num_experts"])

    def fact_of(self, expert: int) -> dict[str, Any]:
        """The fact of an expert."""
        ends = itertools.accumulate(fact["num_experts"] for fact in self.facts)
        return self.facts[next(number for number, end in enumerate(ends) if expert < end)]

    @torch.no_grad()
    def remove(self, number: int) -> None:
        """
        Remove the fact with a number in `facts`: its experts, the keys of its answer, and that of its subject if no
        other fact has it. All others stay as they are.
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
) -> PeerGraft:
    """A graft without weights: a [`FactGraft`] if there are sizes of facts, otherwise a [`PeerGraft`]."""
    return PeerGraft(config, has_biases) if fact_sizes is None else FactGraft(config, FactSizes(**fact_sizes), facts)


class NameTokens(DynamicLayer):
    """The tokens of names in the sequences, kept in a model's cache beside the keys of its layers."""

    owner: int | None = None


def past_of(cache: Any, owner: int) -> torch.Tensor | None:
    """The tokens of names that came earlier, `(B, past)`, `None` if a cache has none."""
    layer = _layer_of(cache, owner)
    return None if layer is None or not layer.is_initialized else layer.keys[:, 0, :, 0]


def keep_in_cache(cache: Any, owner: int, tokens: torch.Tensor) -> None:
    """
    Add the tokens of names in a forward pass, `(B, T)`, to a cache.

    Raises:
        `ValueError`: for a cache of fixed size, of pages or of offloaded layers, which cannot hold them.
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
