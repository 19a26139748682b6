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

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from .quantization import QUANT_METHOD


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


# Arguments of `from_pretrained` that say where a file is.
_PLACES = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token", "_commit_hash"
)  # fmt: skip


@contextmanager
def head_selection(config_class: type[PreTrainedConfig], path: Any, arguments: dict[str, Any]) -> Iterator[None]:
    """
    Let `from_pretrained` keep the first heads of a checkpoint, inside of this context, if it has more than the model
    is to have. Only then: a registered conversion of a tensor takes the place of those by which quantizers read what
    they have saved, and Transformers first compiles the patterns of all its models, a third of a second.

    Args:
        config_class (`type`): Class of the configuration.
        path (`str` or `os.PathLike`, *optional*): The checkpoint, as `from_pretrained` takes it.
        arguments (`dict[str, Any]`): The other arguments of `from_pretrained`.

    Raises:
        `ValueError`: for fewer heads than those of a checkpoint that a quantizer of Transformers has saved.
    """
    if not _drops_heads(config_class, path, arguments):
        yield
        return
    converters: list[Any] = [WeightConverter(name, name, [KeepLeadingHeads()]) for name in PER_HEAD_TENSORS]
    register_checkpoint_conversion_mapping("peer", converters, overwrite=True)
    try:
        yield
    finally:
        register_checkpoint_conversion_mapping("peer", [], overwrite=True)


def _drops_heads(config_class, path, arguments):
    """Whether the model is to have fewer heads than the checkpoint, or the checkpoint does not say how many it has."""
    config, wanted = arguments.get("config"), arguments.get("num_retrieval_heads")
    places = {name: arguments[name] for name in _PLACES if name in arguments}
    if isinstance(config, PreTrainedConfig):
        wanted = config.num_retrieval_heads
    elif config is not None and wanted is None:
        wanted = _saved_heads(config_class, config_class.get_config_dict(config, **places)[0])
    if not isinstance(wanted, int):  # whose type the configuration refuses, if it is not `None`
        return False
    if path is None:
        return _has_more_heads(arguments.get("state_dict") or {}, config)
    try:
        saved = config_class.get_config_dict(path, **places)[0]
    except OSError:  # weights without a configuration
        return True
    trained = _saved_heads(config_class, saved)
    # Quantized tables of experts are not of heads.
    if wanted < trained and saved.get("quantization_config", {}).get("quant_method", QUANT_METHOD) != QUANT_METHOD:
        raise ValueError(
            f"`num_retrieval_heads` of a quantized checkpoint cannot be lowered at load: it has {trained} heads, got "
            f"{wanted}. Load the checkpoint that it was made of with fewer heads and quantize that."
        )
    return wanted < trained


def _has_more_heads(state_dict, config):
    rows = config.num_retrieval_heads * config.query_size
    return any(name.endswith(PER_HEAD_TENSORS[0]) and len(tensor) > rows for name, tensor in state_dict.items())


def _saved_heads(config_class, fields):
    return fields.get("num_retrieval_heads", config_class.num_retrieval_heads)  # a default is not saved
