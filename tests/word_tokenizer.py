# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A tokenizer of words for tests: those of tiny models, w0 to w63."""

from tiny_models import VOCAB_SIZE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer(last: str = f"w{VOCAB_SIZE - 1}") -> PreTrainedTokenizerFast:
    """A tokenizer whose token `n` is the word `w{n}`, and the last one another word if it is given."""
    words = {f"w{number}": number for number in range(VOCAB_SIZE - 1)} | {last: VOCAB_SIZE - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")
