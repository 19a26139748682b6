# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Text that a model generates, in place of the text that it was trained on."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..analysis.evaluation import evaluation
from ..arguments.check_types import check_types


@check_types
def generate_text(
    model: Any,
    num_sequences: int,
    sequence_length: int,
    *,
    batch_size: int = 32,
    progress_bar: bool = True,
) -> list[dict[str, torch.Tensor]]:
    """
    Let a model generate text as it predicts it, for example as the `reference_text` of [`fit_gates`] where the text
    that it was trained on is not at hand.

    Each sequence begins with the BOS token of the configuration, or else with its EOS token. All further tokens are
    sampled at temperature 1 from the whole vocabulary with torch's global generator, whatever the `generation_config`
    of the model says. An EOS token does not end a sequence: what follows it is a further text, as in training.

    Args:
        model ([`PreTrainedModel`]): A language model.
        num_sequences (`int`): Number of sequences.
        sequence_length (`int`): Number of tokens of each sequence, the first one included; at least 2.
        batch_size (`int`, *optional*, defaults to 32): Number of sequences that are generated at a time.
        progress_bar (`bool`, *optional*, defaults to `True`)

    Returns:
        `list[dict]`: for each sequence its `input_ids`, a `torch.LongTensor` of shape `(sequence_length,)` on the CPU.

    Raises:
        `ValueError`: if the model has no BOS and no EOS token, or for numbers that are too small.

    ```python
    >>> from modeling_peer import add_experts, fit_gates, generate_text

    >>> reference_text = generate_text(model, num_sequences=128, sequence_length=256)
    >>> add_experts(model, 64**2)
    >>> fit_gates(model, new_text, reference_text)
    ```
    """
    if min(num_sequences, batch_size, sequence_length - 1) < 1:
        raise ValueError(
            "`num_sequences` and `batch_size` must be at least 1 and `sequence_length` at least 2, got "
            f"{num_sequences}, {batch_size} and {sequence_length}."
        )
    first = model.config.eos_token_id if model.config.bos_token_id is None else model.config.bos_token_id
    if first is None:
        raise ValueError("The configuration needs a `bos_token_id` or an `eos_token_id`, with which a text begins.")
    first = first[0] if isinstance(first, list) else first
    written = write_on(
        model,
        [[first]] * num_sequences,
        sequence_length - 1,
        batch_size=batch_size,
        progress_bar=progress_bar,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    return [{"input_ids": torch.tensor([first, *tokens])} for tokens in written]


def write_on(
    model: Any,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    batch_size: int = 32,
    progress_bar: bool = True,
    **sampling: Any,
) -> list[list[int]]:
    """
    Continue each prompt by `num_tokens` tokens, even where a text ends before. Decoding is greedy unless `sampling`,
    arguments of `generate`, says otherwise.
    """
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Replaced, because it applies to every argument that the call of `generate` does not name.
    own, model.generation_config = model.generation_config, GenerationConfig(pad_token_id=0)
    try:
        with evaluation(model):
            for start in tqdm(range(0, len(order), batch_size), desc="Written", disable=not progress_bar):
                some = order[start : start + batch_size]
                ids, mask = padded([prompts[place] for place in some], padding_side="left")
                tokens = model.generate(
                    ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    max_new_tokens=num_tokens,
                    **({"do_sample": False} | sampling),
                )
                for place, written in zip(some, tokens[:, ids.shape[1] :].tolist(), strict=True):
                    found[place] = written
    finally:
        model.generation_config = own
    return found


def padded(sequences: Sequence[Sequence[int]], padding_side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of tokens as one batch, padded on one side, and its attention mask."""
    rows = [torch.tensor(tokens) for tokens in sequences]
    pad = partial(pad_sequence, batch_first=True, padding_side=padding_side)
    return pad(rows), pad([torch.ones_like(row) for row in rows])
