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
"""The page for texts that a visitor types, with experts that the visitor switches off. It needs Gradio."""

import contextlib
import re
from collections.abc import Iterator
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


def make_app(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    contexts: ExpertContexts | None = None,
    title: str = "Experts",
    text: str = "",
) -> Any:
    """
    Make an app in which visitors type a text, see its experts, and switch some off.

    Args:
        model (`nn.Module`): A causal language model with PEER or PKM layers, or with grafts.
        tokenizer ([`PreTrainedTokenizerBase`])
        contexts ([`ExpertContexts`], *optional*): Of a corpus, see [`ExpertContexts.measure`].
        title (`str`, *optional*): Heading.
        text (`str`, *optional*): What is in the field for the text at first.

    Returns:
        `gradio.Blocks`: start it by `launch()`.

    Raises:
        `ImportError`: without Gradio.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError(
            'The app needs Gradio: install the extra `explorer`, `pip install ".[explorer]"` in a clone.'
        ) from error

    def show(own_text, switched_off):
        try:
            with experts_off(model, switched_off):
                page = explorer_page(model, tokenizer, [own_text], contexts, title)
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from error
        return FRAME.format(escape(page))

    with gradio.Blocks(title=title) as app:
        own_text = gradio.Textbox(text, label="Text", lines=3)
        switched_off = gradio.Textbox(label="Experts to switch off", placeholder="1: 17, 301; 3: 5")
        button = gradio.Button("Show the experts", variant="primary")
        button.click(show, [own_text, switched_off], gradio.HTML())
    return app


@contextlib.contextmanager
def experts_off(model: nn.Module, description: str) -> Iterator[None]:
    """
    Switch experts off within the context.

    Args:
        model (`nn.Module`)
        description (`str`):
            Layers with their experts, such as `"1: 17, 301; 3: 5"`. Of several grafts at a layer one is named as the
            page names it: `"1 graft 0: 17"`. Nothing is switched off if empty.

    Raises:
        `ValueError`: for another form, and as [`masked_sets`].
    """
    reader = ExpertReader(model)
    with contextlib.ExitStack() as stack:
        for part in filter(str.strip, description.split(";")):
            found = re.fullmatch(r"\s*(\S.*?)\s*:\s*(\d+(?:\s*,\s*\d+)*)\s*", part)
            if found is None:
                raise ValueError(
                    f'Experts to switch off must be like "1: 17, 301; 3: 5" (layer: experts), got {part!r}.'
                )
            experts = reader.expert_set(_label_of(reader, found[1]))
            stack.enter_context(masked_sets([experts], torch.tensor([*map(int, found[2].split(","))])))
        yield


def _label_of(reader, layer):
    """The label of a layer as a visitor names it, by its number if that leaves no doubt, or as `"1 graft 0"`."""
    labels = {label.removeprefix("layer_").replace("_", " "): label for label in reader.labels}
    layer = layer.replace("_", " ")
    own = [layer] if layer in labels else [name for name in labels if name.split()[0] == layer]
    if len(own) != 1:
        raise ValueError(f"The layer of experts to switch off must be one of {', '.join(labels)}, got {layer!r}.")
    return labels[own[0]]
