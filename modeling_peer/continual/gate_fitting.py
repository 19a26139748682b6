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
"""Fitting the gates of added experts to the text that the experts were added for."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..analysis.arguments import check_integer, shown
from ..analysis.evaluation import evaluation
from ..analysis.expert_background import batches_of
from ..feed_forward_peer import PeerFeedForward
from ..modeling_peer import PeerPreTrainedModel
from ..product_key_router import AddedRouter, ExpertGate
from .growth import check_is_peer_model, refuse_split_model


LEARNING_RATE, WEIGHT_DECAY, BATCH_TOKENS = 2e-3, 0.05, 1024


@dataclass(frozen=True)
class GateFit:
    """
    How far a gate opens, on sequences held out from its fit.

    Args:
        open_for_new (`float`): Mean of the gate, between 0 and 1, over the tokens of the new text.
        open_for_reference (`float`): Mean of the gate over the tokens of the reference.
    """

    open_for_new: float
    open_for_reference: float


def fit_gates(
    model: PeerPreTrainedModel,
    new_text: Iterable[dict[str, Any]],
    reference_text: Iterable[dict[str, Any]],
    *,
    reference_weight: float = 4.0,
    num_steps: int = 500,
    batch_size: int = 8,
    progress_bar: bool = True,
) -> dict[int, GateFit]:
    """
    Fit the gates of the last protected addition, so that they open for the new text and stay closed for the
    reference, token by token, from the hidden states that the layers get. Best between [`add_experts`] and training:
    experts that are silent outside the new text have less to unlearn there. Nothing but the gates changes. The hidden
    states of both texts are kept on the CPU, for each layer that grew.

    Args:
        model ([`PeerPreTrainedModel`]): A model to which experts were added in protected mode.
        new_text (iterable of `dict`):
            Sequences of what is to be learned, each with `input_ids` and perhaps an `attention_mask`, both of shape
            `(sequence_length,)`; or a `DataLoader` of batches.
        reference_text (iterable of `dict`): Sequences of what the model should go on doing as it did, in the same
            form.
        reference_weight (`float`, *optional*, defaults to 4.0):
            Weight in the loss of opening for the reference, relative to that of being closed for the new text.
        num_steps (`int`, *optional*, defaults to 500): Number of steps of AdamW, each on 1024 tokens of either text.
        batch_size (`int`, *optional*, defaults to 8): Number of sequences that run through the model at a time.
        progress_bar (`bool`, *optional*, defaults to `True`)

    Returns:
        `dict[int, GateFit]`: by index of each layer that grew, how far its gate opens on a tenth of the sequences,
            held out.

    Raises:
        `ValueError`: if the last addition is not a protected one, a text has other elements or less than two
            sequences, or for options of another type or out of range. The model is left as it was.
    """
    check_is_peer_model(model)
    refuse_split_model(model, "Gates are fitted")
    _check_options(model, reference_weight, num_steps, batch_size)
    checked = {"new_text": _checked_text("new_text", new_text)}
    checked["reference_text"] = _checked_text("reference_text", reference_text)
    layers = {
        module.layer_idx: module
        for module in model.modules()
        if isinstance(module, PeerFeedForward) and module.layer_idx in model.config.expert_additions[-1]["layers"]
    }
    texts = [_hidden_states(model, layers, *pair, batch_size, progress_bar) for pair in checked.items()]
    results = {}
    for index, layer in layers.items():
        (new_held_out, new), (reference_held_out, reference) = (_split(text[index]) for text in texts)
        gate = cast("AddedRouter", layer.added_routers[-1]).gate
        steps = tqdm(range(num_steps), desc=f"Gate of layer {index}", disable=not progress_bar)
        fitted = _fit(gate, new, reference, reference_weight, steps)
        with torch.no_grad():
            for parameter, value in zip(gate.parameters(), fitted.parameters(), strict=True):
                parameter.copy_(value)
        results[index] = GateFit(_openness(gate, new_held_out), _openness(gate, reference_held_out))
    return results


def _check_options(model, reference_weight, num_steps, batch_size):
    last = (model.config.expert_additions or [None])[-1]
    if last is None or last["mode"] != "protected":
        raise ValueError(
            "`fit_gates` is for experts added in protected mode, expected one as the last addition to this model, got "
            f"{last or 'no addition'}."
        )
    is_number = isinstance(reference_weight, (int, float)) and not isinstance(reference_weight, bool)
    if not is_number or not 0 < reference_weight < math.inf:
        raise ValueError(f"`reference_weight` must be a number greater than 0, got {reference_weight!r}.")
    for name, value in (("num_steps", num_steps), ("batch_size", batch_size)):
        check_integer(name, value)


def _checked_text(name, text):
    """A text as `batches_of` takes it. Raises `ValueError` if its elements are no sequences of tokens."""
    if isinstance(text, DataLoader):
        return text
    is_sized = hasattr(text, "__len__") and hasattr(text, "__getitem__")
    if isinstance(text, (str, bytes, Mapping)) or not (is_sized or isinstance(text, Iterable)):
        raise ValueError(
            f"`{name}` must be an iterable of sequences, each a dict with `input_ids`, got {shown(text)}."
        )
    text = text if is_sized else list(text)
    for index in range(len(text)):
        sequence = text[index]
        tokens = sequence.get("input_ids") if isinstance(sequence, Mapping) else None
        if tokens is None or not _is_sequence_of_tokens(tokens):
            raise ValueError(
                f"Elements of `{name}` must be dicts whose `input_ids` are token ids of shape (sequence_length,), got "
                f"{shown(sequence)} at index {index}."
            )
    return text


def _is_sequence_of_tokens(tokens):
    try:
        tokens = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError):
        return False
    return tokens.ndim == 1 and tokens.dtype in (torch.int32, torch.int64)


def _hidden_states(model, layers, name, text, batch_size, progress_bar):
    """By layer, its inputs of each sequence: `[sequence_length, hidden_size]`, on the CPU."""
    seen: dict[int, list[torch.Tensor]] = {index: [] for index in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, index=index: seen[index].append(args[0].cpu()))
        for index, layer in layers.items()
    ]
    sequences: dict[int, list[torch.Tensor]] = {index: [] for index in layers}
    try:
        with evaluation(model):
            for batch in tqdm(batches_of(text, batch_size), desc=f"Hidden states, {name}", disable=not progress_bar):
                model.base_model(**{key: value.to(model.device) for key, value in batch.items() if key != "labels"})
                present = batch.get("attention_mask", torch.ones(batch["input_ids"].shape)).bool().cpu()
                for index, states in seen.items():
                    sequences[index] += [each[mask] for each, mask in zip(states.pop(), present, strict=True)]
    finally:
        for hook in hooks:
            hook.remove()
    sequences = {index: [each for each in of_layer if len(each)] for index, of_layer in sequences.items()}
    num_sequences = len(next(iter(sequences.values())))
    if num_sequences < 2:
        raise ValueError(
            f"`{name}` must have at least two sequences, one to fit and one to hold out, got {num_sequences}."
        )
    return sequences


def _split(sequences):
    """Hidden states of every tenth sequence, and of the others."""
    return torch.cat(sequences[::10]), torch.cat([each for i, each in enumerate(sequences) if i % 10])


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


__all__ = ["GateFit", "fit_gates"]
