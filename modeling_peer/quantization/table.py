# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A table of experts in integers of 8 or 4 bits. It is frozen; gradients pass to tokens and router weights."""

from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from ..experts import expert_tables, plain_weight
from ..ops.quantized_rows import (
    INTEGER_DTYPES,
    SCALE_DTYPE,
    QuantizedRows,
    bytes_per_scale,
    dequantize,
    quantize,
    quantized_shapes,
)


class QuantizedTable(nn.Module):
    """
    A quantized table in place of an `nn.Embedding`: `weight` and `scales` are the `integers` and `scales` of
    [`QuantizedRows`].

    Args:
        num_embeddings (`int`): Number of rows.
        embedding_dim (`int`): Number of columns.
        bits (`int`): 8 or 4.
        group_size (`int`, *optional*): Number of columns that share a scale. The whole row if `None`.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: int, group_size: int | None):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.bits = num_embeddings, embedding_dim, bits
        self.bytes_per_scale = bytes_per_scale(embedding_dim, bits, group_size)
        self.shapes = quantized_shapes(num_embeddings, embedding_dim, bits, group_size)
        self.weight = Parameter(torch.empty(self.shapes[0], dtype=INTEGER_DTYPES[bits]), requires_grad=False)
        self.scales = Parameter(torch.empty(self.shapes[1], dtype=SCALE_DTYPE), requires_grad=False)

    @property
    def quantized_rows(self) -> QuantizedRows | None:
        """The rows that kernels read. `None` if only a call gives them, as with accelerate's hooks that move them."""
        if "forward" in vars(self) or self._forward_hooks or self._forward_pre_hooks:
            return None
        return self._all_rows()

    def _all_rows(self):
        return QuantizedRows(self.weight, self.scales, self.embedding_dim, self.bytes_per_scale)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """`(...) -> (..., embedding_dim)`: the rows of these indices in float32, exactly."""
        return dequantize(self._all_rows().select(rows))

    def init_own_weights(self) -> None:
        """
        Check the tensors after loading. Raises `ValueError` for tensors that a checkpoint lacks, as integers cannot be
        drawn, and for wrong shapes, which Transformers before 5.24 loads.
        """
        for each, shape in zip((self.weight, self.scales), self.shapes, strict=True):
            if each.shape == shape and (each.is_meta or getattr(each, "_is_hf_initialized", False)):
                continue
            raise ValueError(
                "The checkpoint lacks the `weight` or `scales` of a quantized table, or has them in other shapes than "
                "the `quantization_config` says."
            )

    def _apply(self, fn, recurse=True):
        # Scales keep their dtype, whatever that of the model becomes: they have the range of float32.
        def apply(tensor):
            return fn(tensor.view(torch.int16)).view(SCALE_DTYPE) if tensor.dtype == SCALE_DTYPE else fn(tensor)

        return super()._apply(apply, recurse)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"


def has_quantized_tables(model: nn.Module) -> bool:
    return any(isinstance(module, QuantizedTable) for module in model.modules())


def tables_to_quantize(model: nn.Module) -> dict[str, nn.Embedding]:
    """
    Find all expert tables of a model, by name.

    Raises:
        `ValueError`: if there is none, or one is not plain, see [`plain_weight`].
    """
    tables: dict[str, Any] = expert_tables(model)
    if not tables:
        raise ValueError(f"{type(model).__name__} has no expert tables.")
    for name, table in tables.items():
        if plain_weight(table) is None:
            raise ValueError(
                f"The expert table {name} cannot be quantized: expected an `nn.Embedding` in memory without an "
                f"adapter or hooks, whose weight is a plain tensor, got a {type(table).__name__}."
            )
    return tables


def make_quantized(table: nn.Embedding, bits: int, group_size: int | None) -> QuantizedTable:
    """A quantized table of the size of `table`, on the meta device."""
    with torch.device("meta"):
        quantized: Any = QuantizedTable(table.num_embeddings, table.embedding_dim, bits, group_size)
    quantized.init_std = getattr(table, "init_std", 0.0)  # for the table that it may become again
    return quantized.train(table.training)


def quantize_table(table: nn.Embedding, bits: int, group_size: int | None) -> QuantizedTable:
    """A quantized copy of a table. Raises `ValueError` if an element is NaN or infinite."""
    rows = quantize(table.weight.detach(), bits, group_size)
    quantized = make_quantized(table, bits, group_size)
    quantized.weight, quantized.scales = (Parameter(each, requires_grad=False) for each in rows[:2])
    return quantized


def dequantize_tables(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace the quantized tables of a model by trainable ones."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedTable):
            table: Any = nn.Embedding.from_pretrained(dequantize(module._all_rows(), dtype), freeze=False)
            table.init_std = module.init_std
            model.set_submodule(name, table.train(module.training))
