# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Quantized expert tables as a quantizer of Transformers."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..arguments.check_types import check_types
from ..ops.quantized_rows import INTEGER_DTYPES, quantize
from .table import QuantizedTable, dequantize_tables, make_quantized, quantize_table, tables_to_quantize


QUANT_METHOD = "peer"

# Columns that share a scale, by the number of bits; `None` is the whole row.
DEFAULT_GROUP_SIZES = {8: None, 4: 64}

# The `model_type` of models whose checkpoints contain their tables, unlike base models whose grafts are an adapter.
MODEL_TYPES = ("peer", "peer_grafted")


class PeerQuantizationConfig(QuantizationConfigMixin):
    """
    How the expert tables of a model are quantized: those of PEER and PKM layers, of shared pools, of added experts and
    of merged grafts. All else stays as it is.

    Args:
        bits (`int`, *optional*, defaults to 8): Bits of an element, 8 or 4.
        group_size (`int`, *optional*): Number of columns of a row that share a scale. Defaults to the whole row with 8
            bits, and to 64 with 4 bits.
        quant_method (`str`, *optional*, defaults to `"peer"`): Name that identifies a saved configuration.

    Raises:
        `ValueError`: for another number of bits, or a group size that is not positive or, with 4 bits, odd.
    """

    @check_types
    def __init__(self, bits: int = 8, group_size: int | None = None, quant_method: str = QUANT_METHOD):
        self.quant_method: Any = quant_method
        self.bits = bits
        if bits not in INTEGER_DTYPES:
            raise ValueError(f"`bits` must be one of {list(INTEGER_DTYPES)}, got {bits!r}.")
        self.group_size = DEFAULT_GROUP_SIZES[bits] if group_size is None else group_size
        if self.group_size is not None and (self.group_size < 1 or self.group_size * bits % 8):
            raise ValueError(f"`group_size` must be positive, and even with 4 bits, got {group_size!r}.")


class PeerHfQuantizer(HfQuantizer):
    """Puts quantized tables into a model, to load integers or to quantize loaded tables."""

    quantization_config: PeerQuantizationConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs):
        config = self.quantization_config
        for name, table in tables_to_quantize(model).items():
            quantized: Any = make_quantized(table, config.bits, config.group_size)
            if not self.pre_quantized:
                quantized.weight = table.weight  # a tensor of a file is cast to the dtype of what it is loaded into
            model.set_submodule(name, quantized)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs) -> bool:
        name, _, parameter = param_name.rpartition(".")
        of_table = parameter == "weight" and isinstance(model.get_submodule(name), QuantizedTable)
        return of_table and not self.pre_quantized

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        quantizes = self.param_needs_quantization(model, param_name)
        return self.quantization_config.bits / 8 if quantizes else param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        return QuantizeRows(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs):
        for module in model.modules():
            if isinstance(module, QuantizedTable):
                module.scales.requires_grad_(False)  # loading makes all floating-point parameters trainable
                if self.pre_quantized and not hasattr(model, "hf_device_map"):
                    module.init_own_weights()  # which the base models of grafts do not call
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        dequantize_tables(model, dtype or torch.float32)
        return model

    def is_serializable(self) -> bool:
        return True

    # `Trainer` asks before it trains a quantized model. All parameters except the tables stay trainable.
    is_trainable = is_qat_trainable = is_compileable = True


class QuantizeRows(ConversionOps):
    """Turns a table that was loaded into integers and scales."""

    def __init__(self, hf_quantizer: PeerHfQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict, full_layer_name=None, missing_keys=None, **kwargs) -> dict[str, torch.Tensor]:
        (loaded,) = input_dict.values()
        config = self.hf_quantizer.quantization_config
        rows = quantize(loaded[0] if isinstance(loaded, list) else loaded, config.bits, config.group_size)
        return {full_layer_name: rows.integers, f"{full_layer_name.removesuffix('weight')}scales": rows.scales}


@check_types
def quantize_experts(model: nn.Module, bits: int = 8, group_size: int | None = None) -> nn.Module:
    """
    Quantize all expert tables of a model in place, one after the other.

    A PEER model, or one with merged grafts, can then be saved as it is, and loads again without further arguments.
    Unmerged grafts of PEFT can be quantized to run them, but then neither be saved nor merged.

    Args:
        model (`nn.Module`): A model with PEER or PKM layers or with grafts.
        bits, group_size: See [`PeerQuantizationConfig`].

    Returns:
        The model.

    Raises:
        `ValueError`: for wrong arguments, a model that is quantized already or has no tables, or a table that cannot
            be quantized. That is one with an adapter or a hook, split over processes, offloaded to disk, or with NaN
            or infinite elements. The model is then as it was.
    """
    config = PeerQuantizationConfig(bits, group_size)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        method = quantizer.quantization_config.quant_method
        raise ValueError(f"The model is quantized with {getattr(method, 'value', method)} already.")
    tables = tables_to_quantize(model)
    for name, table in tables.items():
        if not all(map(torch.isfinite, table.weight.aminmax())):
            raise ValueError(f"A table with NaN or infinite elements cannot be quantized: {name}.")
    for name in list(tables):
        model.set_submodule(name, quantize_table(tables.pop(name), bits, config.group_size))
    saved = _saved_model(model)
    if saved is not None:
        # Marks the model as quantized, like a loaded one, but no other model that shares its configuration. The copied
        # configuration shares its facts with the grafts, which may remove some.
        replace_config(saved, copy.copy(saved.config))
        saved.is_quantized, saved.quantization_method = True, QUANT_METHOD
        saved.hf_quantizer = PeerHfQuantizer(config, pre_quantized=False)
        saved.hf_quantizer.postprocess_model(saved)
    return model


def replace_config(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Give a model another configuration, without changing the old one, which other models may share."""
    old_config = model.config
    module: Any
    for module in model.modules():
        if getattr(module, "config", None) is old_config:
            module.config = config


def _saved_model(model):
    """Return the model whose configuration describes its tables, which may be inside a `PeftModel`."""
    models = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return next((each for each in models if each.config.model_type in MODEL_TYPES), None)


@check_types
def dequantize_experts(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """
    Undo [`quantize_experts`] in place, except for the rounding: tables are floating point and trainable again.

    Args:
        model (`nn.Module`)
        dtype (`torch.dtype`, *optional*): Data type of the tables, that of the model if not given.

    Returns:
        The model.

    Raises:
        `ValueError`: for a `dtype` that is not floating point.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"`dtype` must be floating point, got {dtype}.")
    dequantize_tables(model, dtype or next(each.dtype for each in model.parameters() if each.is_floating_point()))
    saved = _saved_model(model)
    if saved is not None and isinstance(getattr(saved, "hf_quantizer", None), PeerHfQuantizer):
        saved.hf_quantizer.remove_quantization_config(saved)
    return model
