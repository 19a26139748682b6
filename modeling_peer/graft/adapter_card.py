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
"""The card that is saved with an adapter: which package it needs, and how to load it."""

from pathlib import Path
from typing import Any

from ..checkpoint_card import how_to_install, package_link
from .peft_releases import CARD_PLACEHOLDER, PEFT_TYPE_NAME


# The auto class of a base model, by the task type of an adapter.
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}

_USAGE = """This adapter is a PEER graft, a method of PEFT that the package {package} adds. {how_to_install}

Import `modeling_peer` before PEFT loads the adapter, which otherwise fails with `KeyError: '{peft_type}'`:

```python
import modeling_peer
from peft import PeftModel
from transformers import {auto_class}

base_model = {auto_class}.from_pretrained("{base_model}")
model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```"""

_CARD = """---
library_name: peft
---

# PEER graft

{usage}
"""


def write_adapter_card(save_directory: str | Path, base_model: str | None, task_type: str | None) -> None:
    """
    Say in the card of an adapter how to load it: in the place that PEFT's card leaves for it, or in a card of its own
    where there is none. Any other README.md stays as it is.

    Args:
        save_directory (`str` or `Path`): The adapter's folder.
        base_model (`str`, *optional*): Name or path of the base model.
        task_type (`str`, *optional*): Task type of the adapter.
    """
    card = Path(save_directory, "README.md")
    usage = describe_adapter(base_model, task_type)
    if not card.exists():
        card.parent.mkdir(parents=True, exist_ok=True)
        card.write_text(_CARD.format(usage=usage), encoding="utf-8")
        return
    text = card.read_text(encoding="utf-8")
    if text.count(CARD_PLACEHOLDER) == 1:
        card.write_text(text.replace(CARD_PLACEHOLDER, usage), encoding="utf-8")


def describe_adapter(base_model: str | None, task_type: str | None) -> str:
    """A part of a card in Markdown: how a graft is loaded. The arguments are those of [`write_adapter_card`]."""
    return _USAGE.format(
        package=package_link(),
        how_to_install=how_to_install("graft"),
        peft_type=PEFT_TYPE_NAME,
        auto_class=_AUTO_CLASSES.get(task_type or "", "AutoModel"),
        base_model=base_model or "path/to/the/base/model",
    )


def write_pushed_card(model: Any, folder: str) -> None:
    """
    Make the card that `push_to_hub` of PEFT is about to upload that of an adapter, if a graft is among its adapters:
    as PEFT makes it, with what [`write_adapter_card`] says. A card that the repository has already says what it said.

    Args:
        model (`PeftModel`): The model that is pushed.
        folder (`str`): The folder with the files to upload.
    """
    config = next((each for each in model.peft_config.values() if each.peft_type == PEFT_TYPE_NAME), None)
    if config is not None:
        model.create_or_update_model_card(folder)
        write_adapter_card(folder, config.base_model_name_or_path, config.task_type)
