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

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from .configuration_peer import PeerConfig
from .expert_table import ExpertTable
from .quantized_table import QuantizedExpertTable


PACKAGE = "modeling-peer"

# The address of the package's repository, once it has one. It is set here and in pyproject.toml.
REPOSITORY: str | None = None

MARK = "<!-- Written for the saved model. To change this file, remove this line, or a training replaces it. -->"

# Follows the mark where a card is as [`write_card`] writes it: cards of trainings have the mark alone.
_CHECKSUM = "\n<!-- Checksum of the rest: {}. While it is right, saving the model again replaces this file. -->"

# Where the code of a card loads the model from.
FOLDER = "path/to/this/folder"

# In what Transformers writes over the card of a model that it pushes to a repository without any.
_CARD_OF_TRANSFORMERS = "This model card has been automatically generated."

_CARD = """---
library_name: transformers
{metadata}---

{mark}

# {title}

{use}
"""

_USE = """This {kind} needs the package {package} besides Transformers. {how_to_install}

{how_to_load}{sizes}

## Limitations

What it was trained on and for is not known to the code that wrote this. As any language model it may state what is
wrong, offensive or private; evaluate it for your use."""

_LOAD = """Importing `modeling_peer` once is enough for the auto classes to find it:

```python
import modeling_peer
from transformers import {auto_class}

model = {auto_class}.from_pretrained("path/to/this/folder")
```

Where the package is not installed, the model runs the code that the checkpoint carries, and a tokenizer needs none:

```python
from transformers import AutoTokenizer, {auto_class}

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder", trust_remote_code=False)
model = {auto_class}.from_pretrained("path/to/this/folder", trust_remote_code=True)
```"""

# No remote code: what a checkpoint carries has a registry of its own, in which nobody can register a variant before.
_LOAD_WITH_VARIANTS = """It has feed-forwards whose code no checkpoint carries, {classes}. Get that code from whoever
trained the model, and register it before the model is loaded:

```python
from modeling_peer import FeedForwardInterface
from transformers import {auto_class}

{registrations}
model = {auto_class}.from_pretrained("path/to/this/folder")
```"""


def write_card(save_directory: str | Path, model: PreTrainedModel, variants: Mapping[str, type] | None = None) -> None:
    """
    Write a README.md beside a saved model, unless there is one that says something of its own: one that this function
    wrote and that nobody edited since is replaced, as the model may have changed.

    Args:
        save_directory (`str` or `Path`): The folder. Nothing is written if this process saved no `config.json` there.
        model (`PreTrainedModel`):
            A PEER model, or one with merged grafts. The card says its base model, if that is one of the Hub, and its
            sizes.
        variants (mapping of `str` to `type`, *optional*):
            Feed-forward variants whose code the checkpoint does not carry, by the names they are registered under.
    """
    folder = Path(save_directory)
    file = folder / "README.md"
    if (folder / "config.json").is_file() and (not file.exists() or _is_unedited(file)):
        base_model, kind = base_model_of(model), _kind_of(model)
        card = _CARD.format(
            metadata=("" if base_model is None else f"base_model: {base_model}\n") + _tags_in_metadata(model),
            mark=MARK,
            title=kind[0].upper() + kind[1:],
            use=_describe_use(model, variants or {}),
        )
        file.write_text(_with_checksum(card), encoding="utf-8")


def _with_checksum(card):
    return card.replace(MARK, MARK + _CHECKSUM.format(hashlib.sha256(card.encode()).hexdigest()[:16]))


def _is_unedited(file):
    """Whether a card is as [`write_card`] wrote it, of whatever model."""
    text = file.read_text(encoding="utf-8", errors="replace")
    rest = re.sub(_CHECKSUM.format("[0-9a-f]{16}"), "", text)
    return rest != text == _with_checksum(rest)


def replace_card_of_transformers(
    folder: str | Path, model: PreTrainedModel, variants: Mapping[str, type] | None = None
) -> None:
    """
    Replace the card that `push_to_hub` of Transformers wrote over that of [`write_card`], and keep its tags. A card
    that the repository has already stays as it is.

    Args:
        folder (`str` or `Path`): The folder that is about to be uploaded.
        model, variants: See [`write_card`].
    """
    file = Path(folder, "README.md")
    pushed = ModelCard.load(file) if file.exists() else None
    if pushed is not None and _CARD_OF_TRANSFORMERS in pushed.text:
        file.unlink()
        write_card(folder, model, variants)
        card = ModelCard.load(file)
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *(pushed.data.tags or [])]))
        card.save(file)


def how_to_use(model: PreTrainedModel) -> str:
    """A part of a card in Markdown: how such a model is loaded, its sizes and its limitations."""
    return "## How to use it\n\n" + _describe_use(model, {})


def _kind_of(model):
    return "PEER model" if isinstance(model.config, PeerConfig) else "model with PEER grafts"


def tags_of(model: PreTrainedModel) -> list[str]:
    """The tag of models with experts, by which they are found on the Hub."""
    config = model.config
    return ["peer"] if not isinstance(config, PeerConfig) or "peer" in config.feed_forward_types else []


def _tags_in_metadata(model):
    return "".join(f"tags:\n- {tag}\n" for tag in tags_of(model))


def _describe_use(model, variants):
    sizes = describe_sizes(model)
    return _USE.format(
        kind=_kind_of(model),
        package=package_link(),
        how_to_install=how_to_install(),
        how_to_load=_how_to_load(type(model)._auto_class, variants),
        sizes=sizes and f"\n\n## Sizes\n\n{sizes}",
    )


def package_link() -> str:
    """The package in Markdown, with a link to its repository, once it has one."""
    return f"`{PACKAGE}`" if REPOSITORY is None else f"[`{PACKAGE}`]({REPOSITORY})"


def how_to_install(extra: str | None = None) -> str:
    """How to install the package, with an extra if it is named: a sentence, and a command, in Markdown."""
    extra = "" if extra is None else f"[{extra}]"
    if REPOSITORY is None:
        sentence, package = "It is installed from a clone of its repository:", f'".{extra}"' if extra else "."
    else:
        sentence, package = "It is installed from its repository:", f'"{PACKAGE}{extra} @ git+{REPOSITORY}"'
    return f"{sentence}\n\n```bash\npip install {package}\n```"


def base_model_of(model: PreTrainedModel) -> str | None:
    """The model of the Hub that a model was loaded from, `None` if it was loaded from a folder."""
    name = model.name_or_path
    return name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists() else None


def describe_sizes(model: PreTrainedModel) -> str:
    """
    Sentences on the experts and parameters of a PEER model, without the parameters where other processes have parts of
    them. Empty for other models.
    """
    config = model.config
    if not isinstance(config, PeerConfig):
        return ""
    sentences = [describe_experts(config)]
    tables = [module for module in model.modules() if isinstance(module, ExpertTable)]
    if getattr(model.base_model, "memory_group", None) is None:
        rest = model.num_parameters() - sum(each.numel() for table in tables for each in table.parameters())
        # Counted by rows: integers may be packed, and their scales are no parameters of the model.
        in_tables = sum(table.num_embeddings * table.embedding_dim for table in tables)
        sentences.append(f"It has {rest + in_tables:,} parameters")
        active = _num_active_parameters(model, rest)
        sentences[-1] += "." if active is None else f", of which a token reads {active:,}."
    bits = {table.rows.bits for table in tables if isinstance(table, QuantizedExpertTable)}
    sentences += [f"Its expert tables are quantized to {each} bits." for each in bits]
    return " ".join(filter(None, sentences))


def describe_experts(config: PeerConfig) -> str:
    """Sentences on the experts of a PEER model and how many of them a token uses. Empty for a model without."""
    layers = [index for index, name in enumerate(config.feed_forward_types) if name == "peer"]
    if not layers:
        return ""
    h, k = config.num_retrieval_heads, config.num_experts_per_head
    pool = " of one pool" if config.share_experts_across_layers else " each"
    return (
        f"PEER in {'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))} of "
        f"{config.num_hidden_layers}, counted from 0: for every token h = {h} heads retrieve k = {k} of "
        f"N = {config.num_experts:,} experts{pool if len(layers) > 1 else ''}, single neurons of width "
        f"{config.hidden_size}.{_describe_additions(config.expert_additions)}"
    )


def _describe_additions(additions):
    """Sentences that go on from others. Empty if no experts were added."""
    if not additions:
        return ""
    sentences = [
        f" {each['num_experts']:,} experts were added to {'layer' if len(each['layers']) == 1 else 'layers'} "
        f"{', '.join(map(str, each['layers']))} in {each['mode']} mode."
        for each in additions
    ]
    return "".join(sentences) + " In `with modeling_peer.masked_experts(model):` it runs without them."


def _num_active_parameters(model, active):
    """Parameters that a token reads: of the experts and the embeddings, only its own; `active` outside of experts."""
    config = model.config
    if config.expert_additions or not {"dense", "peer", "pkm"}.issuperset(config.feed_forward_types):
        return None
    read = config.num_retrieval_heads * config.num_experts_per_head * config.hidden_size
    num_tables = {"dense": 0, "pkm": 1, "peer": 3 if config.gated_experts else 2}
    active += read * sum(num_tables[name] for name in config.feed_forward_types)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embeddings.weight:
        active -= embeddings.weight.numel() - config.hidden_size
    return active


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
    return MARK in text
