# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Text that a model generates, in place of the text that it was trained on."""

from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..analysis.evaluation import evaluation


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
        `ValueError`: if the model has no BOS and no EOS token.

    ```python
    >>> from modeling_peer import add_experts, fit_gates, generate_text

    >>> reference_text = generate_text(model, num_sequences=128, sequence_length=256)
    >>> add_experts(model, 64**2)
    >>> fit_gates(model, new_text, reference_text)
    ```
    """
    first = model.config.eos_token_id if model.config.bos_token_id is None else model.config.bos_token_id
    if first is None:
        raise ValueError("The configuration needs a `bos_token_id` or an `eos_token_id`, with which a text begins.")
    first = first[0] if isinstance(first, list) else first
    prompts = torch.full((num_sequences, 1), first, device=model.device).split(batch_size)
    sequences: list[torch.Tensor] = []
    # A generation configuration holds for all that a call of `generate` does not name, so it is replaced.
    # A `PeftModel` would leave it in its base model.
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with evaluation(model):
            for prompt in tqdm(prompts, desc="Generated text", disable=not progress_bar):
                sequences += model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=sequence_length - 1,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                ).cpu()
    finally:
        model.generation_config = own
    return [{"input_ids": sequence} for sequence in sequences]
