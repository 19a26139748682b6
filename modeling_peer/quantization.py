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
Quantized expert tables as a quantizer of Transformers.

```python
>>> from modeling_peer import PeerForCausalLM, PeerQuantizationConfig, quantize_experts

>>> model = PeerForCausalLM.from_pretrained("path/to/a/checkpoint", quantization_config=PeerQuantizationConfig(bits=4))
>>> model.save_pretrained("path/to/a/quantized/checkpoint")  # loads as it is, with no argument

>>> model = quantize_experts(PeerForCausalLM.from_pretrained("path/to/a/checkpoint"), bits=8)
```

Transformers finds a quantizer by the `quant_method` of a configuration. It is registered when a model is loaded, not
when the package is imported, see [`register_quantization`].
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from .quantized_rows import INTEGER_DTYPES, quantize
from .quantized_table import (
    QuantizedExpertTable,
    dequantize_table,
    make_quantized,
    quantize_table,
    tables_to_quantize,
)


QUANT_METHOD = "peer"

# Columns that share a scale, by the number of bits; `None` is the whole row.
DEFAULT_GROUP_SIZES = {8: None, 4: 64}


class PeerQuantizationConfig(QuantizationConfigMixin):
    """
    How the expert tables of a model are quantized: those of PEER and PKM layers, of shared pools, of added experts and
    of merged grafts. All else stays as it is.

    Args:
        bits (`int`, *optional*, defaults to 8): Bits of an element, 8 or 4.
        group_size (`int`, *optional*): Number of columns of a row that share a scale. Defaults to the whole row with 8
            bits, and to 64 with 4 bits.
        quant_method (`str`, *optional*, defaults to `"peer"`): What a saved configuration is recognized by.

    Raises:
        `ValueError`: for another number of bits, a group size that is not a positive integer, or, with 4 bits, an odd
            one, or another method.
    """

    def __init__(self, bits: int = 8, group_size: int | None = None, quant_method: str = QUANT_METHOD):
        self.quant_method: Any = quant_method
        self.bits = bits
        self.group_size = DEFAULT_GROUP_SIZES.get(bits) if group_size is None else group_size
        self.post_init()

    def post_init(self) -> None:
        """Check the fields."""
        if self.quant_method != QUANT_METHOD:
            raise ValueError(f"`quant_method` must be {QUANT_METHOD!r}, got {self.quant_method!r}.")
        if type(self.bits) is not int or self.bits not in INTEGER_DTYPES:
            raise ValueError(f"`bits` must be one of {list(INTEGER_DTYPES)}, got {self.bits!r}.")
        size = self.group_size
        if size is not None and (type(size) is not int or size < 1 or size * self.bits % 8):
            kind = "a positive integer" if self.bits == 8 else "a positive even integer with 4 bits"
            raise ValueError(f"`group_size` must be {kind} or None, got {size!r}.")


class PeerHfQuantizer(HfQuantizer):
    """Puts quantized tables into a model, to load integers or to quantize what is loaded."""

    quantization_config: PeerQuantizationConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs):
        config = self.quantization_config
        for name, table in tables_to_quantize(model).items():
            quantized = make_quantized(table, config.bits, config.group_size)
            if not self.pre_quantized:
                quantized.weight = table.weight  # a tensor of a file is cast to the dtype of what it is loaded into
            model.set_submodule(name, quantized)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs) -> bool:
        name, _, parameter = param_name.rpartition(".")
        return parameter == "weight" and isinstance(model.get_submodule(name), QuantizedExpertTable)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        if not self.pre_quantized and self.param_needs_quantization(model, param_name):
            return self.quantization_config.bits / 8
        return param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeRows(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs):
        for module in model.modules():
            if isinstance(module, QuantizedExpertTable):
                module.scales.requires_grad_(False)  # loading makes all floating-point parameters trainable
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        _replace_by_dequantized(model, dtype or torch.float32)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        # What `Trainer` asks before it trains a model that is quantized. All but the tables is as trainable as ever.
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class QuantizeRows(ConversionOps):
    """Turns a table that was loaded into integers and scales."""

    def __init__(self, hf_quantizer: PeerHfQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict, full_layer_name=None, missing_keys=None, **kwargs) -> dict[str, torch.Tensor]:
        (loaded,) = input_dict.values()
        config = self.hf_quantizer.quantization_config
        rows = quantize(loaded[0] if isinstance(loaded, list) else loaded, config.bits, config.group_size)
        return {full_layer_name: rows.integers, f"{full_layer_name.removesuffix('weight')}scales": rows.scales}


def register_quantization() -> None:
    """
    Let Transformers find the quantizer of this code by `quant_method`. Called before each model is loaded: where both
    this package and code that came with a checkpoint are, each has tables of its own classes.
    """
    if AUTO_QUANTIZER_MAPPING.get(QUANT_METHOD) is not PeerHfQuantizer:
        AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
        AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
        register_quantization_config(QUANT_METHOD)(PeerQuantizationConfig)
        register_quantizer(QUANT_METHOD)(PeerHfQuantizer)


def quantize_experts(model: nn.Module, bits: int = 8, group_size: int | None = None) -> nn.Module:
    """
    Quantize all expert tables of a model in place, one after the other.

    A PEER model, or one with merged grafts, is saved as it then is, and loads again with no argument. Grafts of PEFT
    that are not merged can be quantized to run them, and neither saved nor merged then.

    Args:
        model (`nn.Module`): A model with PEER or PKM layers or with grafts.
        bits, group_size: See [`PeerQuantizationConfig`].

    Returns:
        The model.

    Raises:
        `ValueError`: for wrong arguments, a model that is quantized in another way, or tables that cannot be
            quantized: there is none, one is quantized already, has an adapter or a hook, is split over processes or
            offloaded to disk, or has elements that are NaN or infinite. Only in the last case are tables that come
            before it quantized.

    ```python
    >>> from modeling_peer import PeerForCausalLM, quantize_experts

    >>> model = quantize_experts(PeerForCausalLM.from_pretrained("path/to/a/checkpoint"), bits=4)
    ```
    """
    config = PeerQuantizationConfig(bits, group_size)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        method = quantizer.quantization_config.quant_method
        raise ValueError(
            f"The model is quantized with {getattr(method, 'value', method)}, and its configuration describes one way "
            "of quantization only."
        )
    tables = tables_to_quantize(model)
    for name, table in tables.items():
        if table.weight.is_meta:
            raise ValueError(
                f"The expert table {name} has no memory: it is offloaded, or the model is not loaded yet."
            )
    for name in list(tables):
        model.set_submodule(name, quantize_table(tables.pop(name), bits, config.group_size))
    # A class of models whose checkpoints say how their tables are quantized.
    if getattr(model, "saves_quantized_experts", False):
        _describe(model, config)
    return model


def _describe(model, config):
    """Let a model know that it is quantized, as one does that was loaded so."""
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.hf_quantizer = PeerHfQuantizer(config, pre_quantized=False)
    model.hf_quantizer.postprocess_model(model)


def dequantize_experts(model: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """
    Undo [`quantize_experts`] in place, but for what was rounded: the tables are floating point and trainable again.

    Args:
        model (`nn.Module`)
        dtype (`torch.dtype`, *optional*): Data type of the tables, that of the model if not given.

    Returns:
        The model.
    """
    if getattr(getattr(model, "hf_quantizer", None), "quantization_config", None) is not None:
        return model.dequantize(dtype or model.dtype)
    _replace_by_dequantized(
        model, dtype or next(each.dtype for each in model.parameters() if each.is_floating_point())
    )
    return model


def _replace_by_dequantized(model, dtype):
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedExpertTable):
            model.set_submodule(name, dequantize_table(module, dtype))
