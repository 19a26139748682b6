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
"""Attention masks and padding masks: what the one tells of the other, and shapes that are refused."""

from typing import TypeGuard

import torch
from transformers.cache_utils import Cache


def _has_a_column_a_token(attention_mask: torch.Tensor | dict | None) -> TypeGuard[torch.Tensor]:
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2


def padding_mask_of(attention_mask: torch.Tensor | dict | None, sequence_length: int) -> torch.Tensor | None:
    """
    The padding mask of the present tokens, taken from an attention mask of past and present tokens.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch_size, past and present length)`, *optional*):
            Masks of other forms (four-dimensional, dictionaries, block masks) do not tell what is padding.
        sequence_length (`int`): Number of present tokens.

    Returns:
        `torch.Tensor` of shape `(batch_size, sequence_length)`, or `None` if the attention mask does not tell.

    Raises:
        `ValueError`: if the mask has fewer columns than there are present tokens.
    """
    if not _has_a_column_a_token(attention_mask):
        return None
    if attention_mask.shape[1] < sequence_length:
        raise ValueError(
            f"`attention_mask` must cover past and present tokens, at least {sequence_length} of them, got one of "
            f"shape {tuple(attention_mask.shape)}."
        )
    return attention_mask[:, -sequence_length:]


def check_masks(
    attention_mask: torch.Tensor | dict | None,
    padding_mask: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
    cache: Cache | None,
    learns: bool,
) -> None:
    """
    Refuse masks of another shape than the tokens: attention reads the first columns of an attention mask that is too
    long, query norms its last ones.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch_size, past and present length)`, *optional*):
            Masks of other forms are left to the attention.
        padding_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*)
        inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`)
        cache (`Cache`, *optional*): The past tokens.
        learns (`bool`):
            Whether query norms read the padding mask. If not, an attention mask that comes with a cache may have
            further columns: a static cache has room for later tokens, and a stage of pipeline parallelism without the
            first layer takes its cache for empty.

    Raises:
        `ValueError`: naming the mask, its shape and the expected one.
    """
    batch_size, sequence_length = inputs_embeds.shape[:2]
    if padding_mask is not None and padding_mask.shape != (batch_size, sequence_length):
        raise ValueError(
            f"`padding_mask` must have the shape (batch size, sequence length) = {(batch_size, sequence_length)}, got "
            f"{tuple(padding_mask.shape)}."
        )
    if _has_a_column_a_token(attention_mask):
        past_length = cache.get_seq_length() if cache is not None else None
        check_attention_mask(attention_mask, batch_size, sequence_length, past_length, learns)


def check_attention_mask(
    attention_mask: torch.Tensor | dict | None,
    batch_size: int,
    sequence_length: int,
    past_length: int | torch.Tensor | None,
    learns: bool,
) -> None:
    """
    Refuse an attention mask of another shape than the tokens, see [`check_masks`].

    Args:
        attention_mask (`torch.Tensor` of shape `(batch_size, past and present length)`, *optional*):
            Masks of other forms are left to the attention.
        batch_size (`int`)
        sequence_length (`int`): Number of present tokens.
        past_length (`int` or `torch.Tensor`, *optional*): Number of past tokens in a cache; `None` without a cache.
        learns (`bool`): See [`check_masks`].

    Raises:
        `ValueError`: naming the mask, its shape and the expected one.
    """
    if not _has_a_column_a_token(attention_mask):
        return
    has_cache = past_length is not None
    if isinstance(past_length, torch.Tensor):  # of a static cache, on its device: reading it would wait for the device
        past_length, learns = 0, False
    length = (past_length or 0) + sequence_length
    rows, columns = attention_mask.shape
    if rows != batch_size or columns < length or (columns > length and (learns or not has_cache)):
        raise ValueError(
            f"`attention_mask` must have the shape (batch size, past and present length) = {(batch_size, length)}, "
            f"got {(rows, columns)}."
        )
