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
"""Loading a checkpoint with fewer retrieval heads than it was trained with."""

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter


# What a `ProductKeyRouter` holds per head, head by head along the first dimension.
PER_HEAD_TENSORS = (
    "router.query_proj.weight",
    "router.query_norm.weight",
    "router.query_norm.bias",
    "router.query_norm.running_mean",
    "router.query_norm.running_var",
    "router.sub_keys",
)


class KeepLeadingHeads(ConversionOps):
    """
    Keeps as many leading rows of a checkpoint's tensor as the model has. If the tensor has fewer, Transformers reports
    that the sizes do not match.
    """

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, full_layer_name, model, **kwargs):
        rows = model.get_parameter_or_buffer(full_layer_name).shape[0]
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        return {key: [tensor[:rows]] for key, tensor in tensors.items()}  # lists, as quantizers expect

    @property
    def reverse_op(self) -> ConversionOps:
        return self  # a model's own tensors have as many rows as the model


def register_head_selection() -> None:
    """Let `from_pretrained(..., num_retrieval_heads=fewer)` keep the first heads."""
    register_checkpoint_conversion_mapping(
        "peer",
        [WeightConverter(name, name, operations=[KeepLeadingHeads()]) for name in PER_HEAD_TENSORS],
        overwrite=True,
    )
