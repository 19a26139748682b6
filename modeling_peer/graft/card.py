# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
The card of a saved adapter. PEFT has no entry points with which an installed package could register its methods. The
card therefore tells a reader to import the package.
"""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


# The auto class of a base model, by the task type of an adapter.
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}

_NEW_CARD = "---\nlibrary_name: peft\n{base_model}tags:\n- peer\n---\n"

_USE = """# PEER graft

This adapter is a PEER graft, a method of PEFT that the package `modeling-peer` adds. It is on no
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


def write_adapter_card(folder: str | Path, base_model: str | None, task_type: str | None) -> None:
    """
    Say in the card of an adapter how to load it: in place of the template that PEFT leaves to be filled in, below any
    other text that does not say it, or in a new card.
    """
    file = Path(folder, "README.md")
    named = "" if base_model is None else f"base_model: {base_model}\n"
    card = ModelCard.load(file) if file.exists() else ModelCard(_NEW_CARD.format(base_model=named))
    if "import modeling_peer" in card.text:
        return
    auto_class = _AUTO_CLASSES.get(task_type or "", "AutoModel")
    usage = _USE.format(auto_class=auto_class, base_model=base_model or "path/to/the/base/model")
    # PEFT appends its release to the template.
    before, _, after = card.text.partition(ModelCard.from_template(ModelCardData()).text.strip())
    card.text = "".join(f"\n{part.strip()}\n" for part in (before, usage, after) if part.strip())
    card.save(file)
