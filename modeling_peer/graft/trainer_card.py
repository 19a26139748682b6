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
"""What the cards that trainers write over those of saved models keep of these."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import Trainer

from ..checkpoint_card import FOLDER, PACKAGE, how_to_install, how_to_use, package_link, tags_of
from ..configuration_peer import PeerConfig
from ..graft_merged import MODEL_TYPE
from .adapter_card import describe_adapter
from .peft_releases import PEFT_TYPE_NAME


_BASE_MODEL = """## The base model

It needs the package {package} besides Transformers. {how_to_install}

Import `modeling_peer` before it is loaded."""


def complete_model_card(trainer: Trainer) -> None:
    """
    Have the cards that a trainer writes, to push a model or with each checkpoint, say what those of saved models say:
    which package the model needs and how that is installed, how it is loaded, its sizes and its limitations. `Trainer`
    and the trainers of TRL otherwise write a card of their own over that of the saved model.

    Args:
        trainer (`Trainer`): A trainer of a PEER model, of a model with grafts, or of an adapter of either.

    ```python
    >>> trainer = Trainer(model, arguments, train_dataset=dataset)
    >>> complete_model_card(trainer)
    >>> trainer.push_to_hub(license="apache-2.0")
    ```
    """
    create = trainer.create_model_card

    def create_model_card(*args: Any, **kwargs: Any) -> None:
        create(*args, **kwargs)
        if trainer.is_world_process_zero():
            model = trainer.accelerator.unwrap_model(trainer.model)
            _complete(Path(trainer.args.output_dir, "README.md"), model, trainer.hub_model_id or FOLDER)

    trainer.create_model_card = create_model_card  # type: ignore[method-assign]


def _complete(file, model, name_or_path):
    card, use = ModelCard.load(file), _describe(model)
    if use is not None and f"`{PACKAGE}`" not in card.text:
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags_of(model)]))
        card.text = f"{card.text.rstrip()}\n\n{use.replace(FOLDER, name_or_path)}\n"
        card.save(file)


def _describe(model):
    """How the model of a trainer is used, which may be an adapter. `None` for one that does not need the package."""
    adapters = getattr(model, "peft_config", {})
    graft = next((config for config in adapters.values() if config.peft_type == PEFT_TYPE_NAME), None)
    if graft is not None:
        return f"## How to use it\n\n{describe_adapter(graft.base_model_name_or_path, graft.task_type)}"
    if not isinstance(model.config, PeerConfig) and model.config.model_type != MODEL_TYPE:
        return None
    return (
        _BASE_MODEL.format(package=package_link(), how_to_install=how_to_install()) if adapters else how_to_use(model)
    )
