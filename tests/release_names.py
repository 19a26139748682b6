# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Names that differ between releases of Transformers, where tests use them."""

import transformers
from packaging.version import Version
from transformers import PreTrainedModel


def is_at_least(release: str) -> bool:
    """Whether the installed Transformers is of this release or a later one."""
    return Version(transformers.__version__).release >= Version(release).release


# What a forward calls the KV cache.
CACHE = "cache" if is_at_least("5.24") else "past_key_values"

# An option of `TrainingArguments`, with `_kwargs` its options, and with `_enable` a method of models.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)


def enable_checkpointing(model: PreTrainedModel, options: dict | None = None) -> None:
    """Let the model's layers run again in the backward instead of keeping what they computed."""
    getattr(model, f"{CHECKPOINTING}_enable")(options)
