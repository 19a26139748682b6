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
"""Text that a model generates, in place of the text that it was trained on."""

from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from ..analysis.arguments import check_integer
from ..analysis.evaluation import evaluation


def generate_text(
    model: PreTrainedModel,
    num_sequences: int,
    sequence_length: int,
    *,
    batch_size: int = 32,
    progress_bar: bool = True,
) -> list[dict[str, torch.Tensor]]:
    """
    Let a model generate text as it predicts it, for example as the `reference_text` of [`fit_gates`] where the text
    that it was trained on is not at hand.

    Each sequence begins with the BOS token of the configuration, or with its EOS token if it has no BOS token. All
    further tokens are sampled at temperature 1 from the whole vocabulary with torch's global generator, whatever the
    `generation_config` of the model says. An EOS token does not end a sequence: what follows it is a further text, as
    in the blocks that language models are trained on. The model stays as it was.

    Args:
        model ([`PreTrainedModel`]): A language model.
        num_sequences (`int`): Number of sequences.
        sequence_length (`int`): Number of tokens of each sequence, the first one included; at least 2.
        batch_size (`int`, *optional*, defaults to 32): Number of sequences that are generated at a time.
        progress_bar (`bool`, *optional*, defaults to `True`)

    Returns:
        `list[dict]`: for each sequence its `input_ids`, a `torch.LongTensor` of shape `(sequence_length,)` on the CPU.

    Raises:
        `ValueError`: if the model does not generate or its configuration has no BOS and no EOS token, or for numbers
            that are no integers or out of range.

    ```python
    >>> from modeling_peer import add_experts, fit_gates, generate_text

    >>> reference_text = generate_text(model, num_sequences=128, sequence_length=256)
    >>> add_experts(model, 64**2)
    >>> fit_gates(model, new_text, reference_text)
    ```
    """
    if not (isinstance(model, PreTrainedModel) and isinstance(model, GenerationMixin)):
        raise ValueError(
            "`model` must be a model of Transformers that generates text, such as a `PeerForCausalLM`, got a "
            f"{type(model).__name__}."
        )
    for name, value, minimum in (
        ("num_sequences", num_sequences, 1),
        ("sequence_length", sequence_length, 2),
        ("batch_size", batch_size, 1),
    ):
        check_integer(name, value, minimum)
    prompts = torch.full((num_sequences, 1), _first_token(model.config), device=model.device).split(batch_size)
    sequences: list[torch.Tensor] = []
    # A generation configuration holds for all that a call of `generate` does not name, so it is replaced.
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


def _first_token(config: Any) -> int:
    """The token with which a text begins: BOS, or else EOS, the first if there are several."""
    first = config.eos_token_id if config.bos_token_id is None else config.bos_token_id
    if first is None:
        raise ValueError(
            "The configuration of the model must have a `bos_token_id` or an `eos_token_id`, with which a text "
            "begins, got None for both."
        )
    return first[0] if isinstance(first, list) else first


__all__ = ["generate_text"]
