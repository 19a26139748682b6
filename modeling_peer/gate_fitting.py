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
"""Teaching the gates of added experts for which text they were added."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .expert_background import pad_examples
from .expert_gate import ExpertGate
from .feed_forward_peer import PeerFeedForward


LEARNING_RATE, WEIGHT_DECAY, BATCH_TOKENS = 2e-3, 0.05, 1024


@dataclass(frozen=True)
class GateFit:
    """
    How a gate came out, on sequences held out from its fit.

    Args:
        open_for_new (`float`): Mean of the gate over the tokens of the new text.
        open_for_reference (`float`): Mean over the tokens of the reference.
    """

    open_for_new: float
    open_for_reference: float


def fit_gates(
    model: PreTrainedModel,
    new_text: Iterable[dict[str, Any]],
    reference_text: Iterable[dict[str, Any]],
    *,
    reference_weight: float = 4.0,
    num_steps: int = 500,
    batch_size: int = 8,
    progress_bar: bool = True,
) -> dict[int, GateFit]:
    """
    Teaches the gates of the last protected addition to open for the new text and to stay closed for the reference, token by
    token, from the hidden states that the layers see. Best between [`add_experts`] and training: experts that are silent
    where they were not asked have less to forget there. Nothing but the gates changes.

    Args:
        model ([`PreTrainedModel`]): To which experts were added in protected mode.
        new_text (iterable of `dict`): Sequences, `input_ids` and perhaps an `attention_mask`, of what is to be learned.
        reference_text (iterable of `dict`): Sequences of what the model should go on doing as it did.
        reference_weight (`float`, *optional*, defaults to 4.0):
            How much worse it is to open for the reference than to be closed for the new text.
        num_steps (`int`, *optional*, defaults to 500): Of AdamW, each on 1024 tokens of both texts.
        batch_size (`int`, *optional*, defaults to 8): Sequences that run through the model at a time.
        progress_bar (`bool`, *optional*, defaults to `True`)

    Returns:
        `dict[int, GateFit]`: for each layer that grew, how far the gate opens on a tenth of the sequences, held out.

    Raises:
        `ValueError`: if the last addition was not a protected one, or a text has less than two sequences.
    """
    additions = model.config.expert_additions or [{"mode": None}]
    if additions[-1]["mode"] != "protected":
        raise ValueError(
            "`fit_gates` is for experts added in protected mode, and the last addition to this model is "
            f"{'not there' if additions[-1]['mode'] is None else additions[-1]}."
        )
    layers = {
        module.layer_idx: module
        for module in model.modules()
        if isinstance(module, PeerFeedForward) and module.layer_idx in additions[-1]["layers"]
    }
    texts = [_hidden_states(model, layers, text, batch_size, progress_bar) for text in (new_text, reference_text)]
    results = {}
    for index, layer in layers.items():
        gate = layer.added_routers[-1].gate
        new, reference = (text[index] for text in texts)
        results[index] = _fit(gate, new, reference, reference_weight, num_steps)
    return results


@torch.no_grad()
def _hidden_states(model, layers, text, batch_size, progress_bar):
    """What each layer sees of each sequence: `[sequence_length, hidden_size]`, on the CPU."""
    seen: dict[int, list[torch.Tensor]] = {index: [] for index in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, index=index: seen[index].append(args[0].cpu()))
        for index, layer in layers.items()
    ]
    sequences: dict[int, list[torch.Tensor]] = {index: [] for index in layers}
    training = model.training
    loader = text if isinstance(text, DataLoader) else DataLoader(text, batch_size, collate_fn=pad_examples)
    try:
        model.eval()
        for batch in tqdm(loader, disable=not progress_bar, desc="Hidden states"):
            model.base_model(**{name: value.to(model.device) for name, value in batch.items() if name != "labels"})
            for index, states in seen.items():
                present = batch.get("attention_mask", torch.ones(states[-1].shape[:2])).bool()
                sequences[index] += [each[mask] for each, mask in zip(states.pop(), present, strict=True)]
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    number = len(next(iter(sequences.values())))
    if number < 2:
        raise ValueError(f"Both texts must have at least two sequences, one to fit and one to hold out, got {number}.")
    return sequences


def _fit(gate, new, reference, reference_weight, num_steps):
    new_held_out, new = _split(new)
    reference_held_out, reference = _split(reference)
    device, dtype = gate.down_proj.weight.device, gate.down_proj.weight.dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fitted = ExpertGate(gate.up_proj.in_features).to(
            device
        )  # in float32, with the first weights of any linear layer
    optimizer = torch.optim.AdamW(fitted.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for _ in range(num_steps):
            losses = [
                weight * F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))
                for states, label, weight in ((new, 1.0, 1.0), (reference, 0.0, reference_weight))
                for logits in [fitted(_sample(states, generator).to(device))]
            ]
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
    with torch.no_grad():
        for parameter, value in zip(gate.parameters(), fitted.parameters(), strict=True):
            parameter.copy_(value.to(dtype))
        openness = [
            torch.sigmoid(gate(states.to(device, dtype)).float()).mean().item()
            for states in (new_held_out, reference_held_out)
        ]
    return GateFit(*openness)


def _split(sequences):
    """Tokens of every tenth sequence, and of the others."""
    return torch.cat(sequences[::10]), torch.cat([each for i, each in enumerate(sequences) if i % 10])


def _sample(states, generator):
    return states[torch.randint(len(states), (BATCH_TOKENS,), generator=generator)].float()


__all__ = ["GateFit", "fit_gates"]
