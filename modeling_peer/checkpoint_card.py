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
"""
The cards that are saved with models: a README.md that says which package a checkpoint needs.

Without the package Transformers only knows that a checkpoint carries code of its own, and asks to trust it. Neither
Transformers nor PEFT has entry points by which an installed package could announce its models, so the card is where a
reader learns that importing the package is enough.
"""

from collections.abc import Mapping
from pathlib import Path


PACKAGE = "modeling-peer"

# What the card calls the two kinds of models that are saved.
PEER_MODEL = "PEER model"
GRAFTED_MODEL = "model with PEER grafts"

_MARK = "<!-- Written when the model was saved, as there was no README.md. Saving never replaces a README.md. -->"

_CARD = """---
library_name: transformers
---

{mark}

# {title}

This {kind} needs the package `{package}` besides Transformers. It is installed from a clone of its repository:

```bash
pip install .
```

{how_to_load}
"""

_LOAD = """Importing `modeling_peer` once is enough for the auto classes to find it:

```python
import modeling_peer
from transformers import {auto_class}

model = {auto_class}.from_pretrained("path/to/this/folder")
```

Where the package is not installed, `from_pretrained("path/to/this/folder", trust_remote_code=True)` runs the code that
the checkpoint carries."""

# No remote code: what a checkpoint carries has a registry of its own, in which nobody can register a variant before.
_LOAD_WITH_VARIANTS = """It has feed-forwards whose code no checkpoint carries, {classes}. Get that code from whoever
trained the model, and register it before the model is loaded:

```python
from modeling_peer import FeedForwardInterface
from transformers import {auto_class}

{registrations}
model = {auto_class}.from_pretrained("path/to/this/folder")
```"""


def write_card(
    save_directory: str | Path, kind: str, auto_class: str, variants: Mapping[str, type] | None = None
) -> None:
    """
    Write a README.md beside a saved model, unless there is one.

    Args:
        save_directory (`str` or `Path`): The folder. Nothing is written if this process saved no `config.json` there.
        kind (`str`): `PEER_MODEL` or `GRAFTED_MODEL`.
        auto_class (`str`): Name of the auto class that loads the model.
        variants (mapping of `str` to `type`, *optional*):
            Feed-forward variants whose code the checkpoint does not carry, by the names they are registered under.
    """
    folder = Path(save_directory)
    if (folder / "config.json").is_file() and not (folder / "README.md").exists():
        title = kind[0].upper() + kind[1:]
        how_to_load = _how_to_load(auto_class, variants or {})
        card = _CARD.format(mark=_MARK, title=title, kind=kind, package=PACKAGE, how_to_load=how_to_load)
        (folder / "README.md").write_text(card, encoding="utf-8")


def _how_to_load(auto_class, variants):
    if not variants:
        return _LOAD.format(auto_class=auto_class)
    classes = ", ".join(f"`{each.__module__}.{each.__qualname__}`" for each in variants.values())
    registrations = "\n".join(
        f"FeedForwardInterface.register({name!r}, {each.__name__})" for name, each in variants.items()
    )
    return _LOAD_WITH_VARIANTS.format(auto_class=auto_class, classes=classes, registrations=registrations)


def is_written_card(text: str) -> bool:
    """Whether a README.md is the one that [`write_card`] wrote, edited or not, by its text."""
    return _MARK in text
