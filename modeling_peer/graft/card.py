# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
The card of a saved adapter. PEFT has no entry points with which an installed package could register its methods. The
card therefore tells a reader to import the package.
"""

from pathlib import Path


# Placeholder for how to load an adapter, from the huggingface_hub template in `create_or_update_model_card` of PEFT.
# If the template changes, the card of an adapter keeps the new placeholder and does not name the package.
CARD_PLACEHOLDER = "Use the code below to get started with the model.\n\n[More Information Needed]"

# The auto class of a base model, by the task type of an adapter.
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}

_USE = """This adapter is a PEER graft, a method of PEFT that the package `modeling-peer` adds. It is on no
index of packages yet: install it in a copy of its source:

```bash
pip install ".[graft]"
```

Import `modeling_peer` before PEFT loads the adapter, which otherwise fails with `KeyError: 'PEER_GRAFT'`:

```python
import modeling_peer
from peft import PeftModel
from transformers import {auto_class}

base_model = {auto_class}.from_pretrained("{base_model}")
model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```"""

_CARD = """---
library_name: peft
{base_model}tags:
- peer
---

# PEER graft

"""


def write_adapter_card(folder: str | Path, base_model: str | None, task_type: str | None) -> None:
    """
    Write into the card of an adapter how to load it: at the placeholder of PEFT's card, or in a new card if there is
    none. Any other README.md stays as it is.
    """
    card = Path(folder, "README.md")
    usage = _USE.format(
        auto_class=_AUTO_CLASSES.get(task_type or "", "AutoModel"),
        base_model=base_model or "path/to/the/base/model",
    )
    if not card.exists():
        card.parent.mkdir(parents=True, exist_ok=True)
        named = "" if base_model is None else f"base_model: {base_model}\n"
        card.write_text(f"{_CARD.format(base_model=named)}{usage}\n", encoding="utf-8")
        return
    text = card.read_text(encoding="utf-8")
    if text.count(CARD_PLACEHOLDER) == 1:
        card.write_text(text.replace(CARD_PLACEHOLDER, usage), encoding="utf-8")
