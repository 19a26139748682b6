# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The page for texts that a visitor types, with experts that the visitor switches off. It needs Gradio."""

import contextlib
import threading
from html import escape
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..analysis.expert_mask import masked_sets
from ..analysis.token_explanation import ExpertReader
from .contexts import ExpertContexts
from .page import explorer_page


FRAME = '<iframe srcdoc="{}" title="Experts" style="width: 100%; height: 62rem; border: 0"></iframe>'

# Of a text that a visitor types; of visitors who wait.
MAX_CHARACTERS, MAX_TOKENS, MAX_WAITING = 4000, 512, 16

_LOCK = threading.Lock()  # experts are switched off in the one model that all requests share


def make_app(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    contexts: ExpertContexts | None = None,
    title: str = "Experts",
    text: str = "",
) -> Any:
    """
    Make an app in which visitors type a text, see its experts, and switch some off. Further arguments are those of
    [`save_explorer_page`].

    Args:
        text (`str`, *optional*): A text to begin with, whose page is there when the app opens.

    Returns:
        `gradio.Blocks`: start it by `launch()`.

    Raises:
        `ImportError`: without Gradio, which is in the extra `explorer`.
    """
    import gradio

    def show(own_text, switched_off):
        try:
            return visitors_page(model, tokenizer, own_text, switched_off, contexts, title)
        except (ValueError, IndexError) as error:
            raise gradio.Error(str(error), print_exception=False) from error

    with gradio.Blocks(title=title) as app:
        own_text = gradio.Textbox(text, label="Text", lines=3, max_length=MAX_CHARACTERS)
        switched_off = gradio.Textbox(label="Experts to switch off", placeholder="1: 17, 301; 3: 5")
        button = gradio.Button("Show the experts", variant="primary")
        page = gradio.HTML(visitors_page(model, tokenizer, text, "", contexts, title) if text else None)
        button.click(show, [own_text, switched_off], page)
    return app.queue(max_size=MAX_WAITING)


def visitors_page(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    switched_off: str,
    contexts: ExpertContexts | None = None,
    title: str = "Experts",
) -> str:
    """The page of a visitor's text in a frame, see [`experts_off`]. Raises `ValueError` for a text that is long."""
    if max(len(text), len(switched_off)) > MAX_CHARACTERS:
        raise ValueError(f"A text must be of at most {MAX_CHARACTERS} characters.")
    if len(tokenizer(text)["input_ids"]) > MAX_TOKENS:
        raise ValueError(f"A text must be of at most {MAX_TOKENS} tokens.")
    with _LOCK, experts_off(model, switched_off):
        return FRAME.format(escape(explorer_page(model, tokenizer, [text], title, contexts=contexts)))


def experts_off(model: nn.Module, description: str) -> contextlib.AbstractContextManager:
    """
    Switch experts off within the context.

    Args:
        model (`nn.Module`)
        description (`str`):
            Layers with their experts, such as `"1: 17, 301; 3: 5"`. Of several grafts at a layer one is named as the
            page names it: `"1 graft 0: 17"`. Nothing is switched off if empty.

    Raises:
        `ValueError`: for another form, and, as `IndexError`, those of [`masked_experts`].
    """
    reader = ExpertReader(model)
    with contextlib.ExitStack() as stack:
        for part in filter(str.strip, description.split(";")):
            layer, _, numbers = part.partition(":")
            experts = numbers.split(",")
            if not all(each.strip().isdecimal() and len(each) < 16 for each in experts):
                raise ValueError(f"Experts to switch off are written as '1: 17, 301; 3: 5', got {part!r:.99}.")
            sets = [reader.sets[_label_of(reader, layer)]]
            stack.enter_context(masked_sets(sets, torch.tensor([*map(int, experts)])))
        return stack.pop_all()


def _label_of(reader, layer):
    """The label of a layer as a visitor names it, by its number if that leaves no doubt, or as `"1 graft 0"`."""
    labels = {label.removeprefix("layer_").replace("_", " "): label for label in reader.sets}
    layer = " ".join(layer.replace("_", " ").split())
    own = [layer] if layer in labels else [name for name in labels if name.split()[0] == layer]
    if len(own) != 1:
        raise ValueError(f"The layer of experts to switch off must be one of {', '.join(labels)}, got {layer!r}.")
    return labels[own[0]]
