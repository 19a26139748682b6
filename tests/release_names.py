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
"""Names that differ between releases of Transformers, where tests use them."""

from transformers import PreTrainedModel

from modeling_peer.library_releases import CACHE as CACHE


# An option of `TrainingArguments`, with `_kwargs` its options, and with `_enable` a method of models.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)


def enable_checkpointing(model: PreTrainedModel, options: dict | None = None) -> None:
    """Let the model's layers run again in the backward instead of keeping what they computed."""
    getattr(model, f"{CHECKPOINTING}_enable")(options)
