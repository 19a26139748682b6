# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Fitting the gates of added experts to the text that the experts were added for."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..analysis.evaluation import evaluation
from ..analysis.expert_background import batches_of
from ..analysis.expert_sets import find_fact_grafts, find_gated_grafts
from ..arguments.check_types import check_types
from ..feed_forward import PeerFeedForward
from ..router import ExpertGate


LEARNING_RATE, WEIGHT_DECAY, BATCH_TOKENS = 2e-3, 0.05, 1024


@dataclass(frozen=True)
class GateFit:
    """
    How far a gate opens, on sequences held out from its fit. For grafts of facts: the share of sequences it opens for.

    Args:
        open_for_new (`float`): Mean of the gate, between 0 and 1, over the tokens of the new text.
        open_for_reference (`float`): Mean of the gate over the tokens of the reference.
    """

    open_for_new: float
    open_for_reference: float


@check_types
def fit_gates(
    model: nn.Module,
    new_text: Any,
    reference_text: Any,
    *,
    reference_weight: float = 4.0,
    num_steps: int = 500,
    batch_size: int = 8,
    progress_bar: bool = True,
) -> dict[int | str, GateFit]:
    """
    Fit the gates of the last addition of experts, a protected one, or of grafts with `has_gate`, to open for the new
    text and stay closed for the reference. A gate decides on each token by the hidden state that its layer gets. Fit
    gates between [`add_experts`] and training: experts that are silent outside the new text have less to unlearn
    there. Only the gates change. The hidden states of both texts are kept on the CPU, for each layer that grew.

    If `model` has grafts of facts, the thresholds of their questions are chosen again, for example against questions
    that were answered though nobody taught them. Each sequence of `new_text` is then a question, and the gate should
    open at its last token. For `reference_text` it should stay shut at every token.

    Args:
        model ([`PeerPreTrainedModel`] or a model with grafts):
            A model to which experts were added in protected mode, or with grafts that have a gate.
        new_text (iterable of `dict`):
            Sequences of the text to learn, each with `input_ids` and optionally an `attention_mask`, both of shape
            `(sequence_length,)`; or a `DataLoader` of batches.
        reference_text (iterable of `dict`): Sequences of text for which the outputs of the model should not change,
            in the same form.
        reference_weight (`float`, *optional*, defaults to 4.0):
            Weight of the loss for opening on the reference, relative to that for being closed on the new text.
        num_steps (`int`, *optional*, defaults to 500): Number of steps of AdamW, each on 1024 tokens of either text.
        batch_size (`int`, *optional*, defaults to 8): Number of sequences that run through the model at a time.
        progress_bar (`bool`, *optional*, defaults to `True`)

    Returns:
        `dict[int | str, GateFit]`: for each layer that grew, by its index, how far its gate opens on a held-out tenth
            of the sequences. For grafts, by their labels.

    Raises:
        `ValueError`: if the last addition is not a protected one, a text has fewer than two sequences, or a number is
            not positive.
    """
    if num_steps < 1 or not 0 < reference_weight < math.inf:
        raise ValueError(
            f"`num_steps` and `reference_weight` must be positive and finite, got {num_steps} and {reference_weight}."
        )
    if fact_grafts := find_fact_grafts(model):
        return _fit_thresholds(
            model, fact_grafts, new_text, reference_text, reference_weight, batch_size, progress_bar
        )
    grafts = find_gated_grafts(model)
    last = (getattr(model.config, "expert_additions", None) or [{"mode": None}])[-1]
    if not grafts and last["mode"] != "protected":
        raise ValueError(
            "Gates are those of active grafts of facts, of active adapters with `has_gate`, or of experts added in "
            f"protected mode, got {last['mode']!r} as last addition."
        )
    layers: dict[Any, Any] = grafts or {
        module.layer_idx: module
        for module in model.modules()
        if isinstance(module, PeerFeedForward) and module.layer_idx in last["layers"]
    }
    texts = [
        _by_sequence(model, layers, lambda layer, states: states, name, text, batch_size, progress_bar)
        for name, text in (("new_text", new_text), ("reference_text", reference_text))
    ]
    results: dict[int | str, GateFit] = {}
    for index, layer in layers.items():
        gate: Any = [layer.router, *layer.added_routers][-1].gate
        held_out = [torch.cat(text[index][::10]) for text in texts]
        new, reference = [torch.cat([each for i, each in enumerate(text[index]) if i % 10]) for text in texts]
        steps = tqdm(range(num_steps), desc=f"Gate of layer {index}", disable=not progress_bar)
        gate.load_state_dict(_fit(gate, new, reference, reference_weight, steps).state_dict())
        results[index] = GateFit(*(_openness(gate, states) for states in held_out))
    return results


def _by_sequence(model, modules, read, name, text, batch_size, progress_bar):
    """Collect the results of `read(module, input)` by label and sequence, without padding, on the CPU."""
    found: dict[Any, list[torch.Tensor]] = {label: [] for label in modules}

    def note(label, module, args):
        of_sequences = zip(read(module, args[0]).cpu(), present, strict=True)
        found[label] += [own[mask] for own, mask in of_sequences if mask.any()]

    hooks = [module.register_forward_pre_hook(partial(note, label)) for label, module in modules.items()]
    with evaluation(model, hooks):
        for batch in tqdm(batches_of(text, batch_size), desc=f"Reading {name}", disable=not progress_bar):
            present = batch.get("attention_mask", torch.ones(batch["input_ids"].shape)).bool().cpu()
            inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
            model.base_model(**inputs, use_cache=False)
    if min(map(len, found.values())) < 2:
        raise ValueError(f"`{name}` must have at least two sequences with tokens, one to fit and one to hold out.")
    return found


def _fit(gate, new, reference, reference_weight, steps):
    """A gate in float32, newly initialized and fitted to tell new tokens from those of the reference."""
    device = gate.down_proj.weight.device
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        fitted = ExpertGate(gate.up_proj.in_features)
    fitted = fitted.float().to_empty(device="cpu")
    for linear in (fitted.up_proj, fitted.down_proj):
        bound = linear.in_features**-0.5
        for parameter in linear.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
    fitted.to(device)
    optimizer = torch.optim.AdamW(fitted.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def loss_on(states, label):
        sample = states[torch.randint(len(states), (BATCH_TOKENS,), generator=generator)]
        logits = fitted.logits(sample.to(device, torch.float32))
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))

    with torch.enable_grad():
        for _ in steps:
            optimizer.zero_grad()
            (loss_on(new, 1.0) + reference_weight * loss_on(reference, 0.0)).backward()
            optimizer.step()
    return fitted


@torch.no_grad()
def _openness(gate, states):
    """Mean of a gate over tokens."""
    weight = gate.up_proj.weight
    return gate(states.to(weight.device, weight.dtype)).float().mean().item()


def _fit_thresholds(model, grafts, new_text, reference_text, reference_weight, batch_size, progress_bar):
    """See [`fit_gates`]: choose for each graft the threshold of questions with the smallest weighted error rate."""
    routers = {label: graft.router for label, graft in grafts.items()}

    def similarities(router, states):
        return router.retrieve_facts(states)[1]

    new, reference = (
        _by_sequence(model, routers, similarities, name, text, batch_size, progress_bar)
        for name, text in (("new_text", new_text), ("reference_text", reference_text))
    )
    results = {}
    for label, graft in grafts.items():
        # Questions that name no subject of this graft belong to another graft.
        ends = torch.tensor([each[-1] for each in new[label] if each.max() > -2.0])
        highest = torch.tensor([each.max() for each in reference[label]])
        threshold = graft.router.questions.threshold
        own, others = (each[torch.arange(len(each)) % 10 != 0].sort()[0] for each in (ends, highest))
        # Only values that bfloat16 can hold, in which adapters are saved.
        candidates = torch.cat([own, others + 2**-8]).clamp(min=0.0).bfloat16().float().unique()
        wrong = torch.searchsorted(own, candidates) / max(1, len(own))
        wrong += reference_weight * (1 - torch.searchsorted(others, candidates) / max(1, len(others)))
        if len(own):
            threshold.data.fill_(candidates[wrong.argmin()])
        opens = [(each[::10] >= threshold.item()).float().mean().item() for each in (ends, highest)]
        results[label] = GateFit(*opens)
    return results
