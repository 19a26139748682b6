# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The page itself: one file of HTML that needs nothing else, for a model card or a browser without a network."""

import json
import os
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from .contexts import ExpertContexts
from .findings import explore


TEMPLATE = Path(__file__).with_name("page.html")


def explorer_page(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], title: str = "Experts", **options: Any
) -> str:
    """Make the page of one or several texts, of which the reader chooses one. Options are those of [`explore`]."""
    if isinstance(texts, str) or not (texts := [*texts]):
        raise ValueError(f"`texts` must be one or several texts in a list, got {texts!r:.99}.")
    found = [{"text": text, **explore(model, tokenizer, text, **options)} for text in texts]
    # "</script" in the data would end the script element, and "<!--" with "<script" would hide its end.
    data = json.dumps(found, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{title}}", escape(title)).replace("{{data}}", data)


def save_explorer_page(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    file: str | os.PathLike,
    *,
    contexts: ExpertContexts | None = None,
    title: str = "Experts",
    num_switched_off: int = 8,
) -> None:
    """
    Save a page that shows the experts of every token of a text, layer by layer. For each expert it shows the tokens
    that it writes, the contexts that use it most, and its neighbors among the keys. It also shows whether it was
    added, and what the model predicts without it.

    Args:
        model (`nn.Module`): A causal language model with PEER or PKM layers, or with grafts.
        tokenizer ([`PreTrainedTokenizerBase`])
        texts (iterable of `str`): Texts, of which the reader of the page chooses one.
        file (`str` or `os.PathLike`): Where to save the page, an HTML file.
        contexts ([`ExpertContexts`], *optional*): Contexts of a corpus, see [`ExpertContexts.measure`].
        title (`str`, *optional*): Heading of the page.
        num_switched_off (`int`, *optional*, defaults to 8):
            Number of experts of each layer that the page can switch off: those with the largest router weights in the
            text. Each takes one forward pass.

    Raises:
        `ValueError`:
            if the model has no experts or predicts NaN or infinity, if there are no texts, or if one has no tokens or
            more than the model has positions.
    """
    page = explorer_page(model, tokenizer, texts, title, contexts=contexts, num_switched_off=num_switched_off)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(page, encoding="utf-8")
