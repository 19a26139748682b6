# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The held-out loss of a model without a `Trainer`, so that it can be compared to the bit."""

import torch
from torch import nn
from tqdm.auto import tqdm

from modeling_peer.analysis.evaluation import evaluation


def held_out_loss(
    model: nn.Module, tokens: torch.Tensor, batch_size: int = 16, *, desc: str = "Loss", progress_bar: bool = True
) -> float:
    """
    Measures the loss of a language model in evaluation mode, in nats per token.

    Args:
        model (`nn.Module`): A causal language model.
        tokens (`torch.Tensor` of shape `(num_sequences, sequence_length)`): Held-out sequences.
        batch_size (`int`, *optional*, defaults to 16): Number of sequences that run through the model at a time.
        desc (`str`, *optional*, defaults to `"Loss"`): Label of the progress bar.
        progress_bar (`bool`, *optional*, defaults to `True`)
    """
    device = next(model.parameters()).device
    with evaluation(model):
        batches = tqdm(tokens.to(device).split(batch_size), desc=desc, disable=not progress_bar)
        return sum(model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in batches) / len(tokens)
