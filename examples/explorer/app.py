# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""An app with the page for texts that visitors type. It needs Gradio."""

import threading
from html import escape
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from .contexts import ExpertContexts
from .page import explorer_page


FRAME = '<iframe srcdoc="{}" title="Experts" style="width: 100%; height: 62rem; border: 0"></iframe>'

# Limits of a visitor's text, and of the number of waiting visitors.
MAX_CHARACTERS, MAX_TOKENS, MAX_WAITING = 4000, 512, 16

_LOCK = threading.Lock()  # experts are switched off, one at a time, in the one model that all requests share


def make_app(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    contexts: ExpertContexts | None = None,
    title: str = "Experts",
    text: str = "",
) -> Any:
    """
    Make an app in which visitors type a text and see its experts. [`save_explorer_page`] describes the other
    arguments.

    Args:
        text (`str`, *optional*): A text whose page is shown when the app opens.

    Returns:
        `gradio.Blocks`: the app; `launch()` starts it.

    Raises:
        `ImportError`: without Gradio, which is in the extra `explorer`.
    """
    import gradio

    def show(own_text):
        try:
            return visitors_page(model, tokenizer, own_text, contexts, title)
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    with gradio.Blocks(title=title) as app:
        own_text = gradio.Textbox(text, label="Text", lines=3, max_length=MAX_CHARACTERS)
        button = gradio.Button("Show the experts", variant="primary")
        page = gradio.HTML(visitors_page(model, tokenizer, text, contexts, title) if text else None)
        button.click(show, own_text, page)
    return app.queue(max_size=MAX_WAITING)


def visitors_page(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    contexts: ExpertContexts | None = None,
    title: str = "Experts",
) -> str:
    """Return the page of a visitor's text in a frame. Raises `ValueError` for a text that is too long."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"A text must be of at most {MAX_CHARACTERS} characters.")
    if len(tokenizer(text)["input_ids"]) > MAX_TOKENS:
        raise ValueError(f"A text must be of at most {MAX_TOKENS} tokens.")
    with _LOCK:
        return FRAME.format(escape(explorer_page(model, tokenizer, [text], title, contexts=contexts)))
