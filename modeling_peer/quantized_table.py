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
Expert tables whose rows are integers of 8 or 4 bits, see `quantized_rows.py`, and their place in a model.

They are for inference: a quantized table is frozen, and gradients pass through it to the input and to router weights.
"""

import torch
from torch import nn
from torch.nn import Parameter
from transformers import initialization as init

from .configuration_peer import PeerConfig
from .expert_kernels import ALL_EXPERT_KERNELS, needs_operator
from .expert_table import ExpertDownProjection, ExpertTable, ExpertUpProjection
from .quantized_operators import quantized_down, quantized_up
from .quantized_rows import (
    INTEGER_DTYPES,
    SCALE_DTYPE,
    QuantizedRows,
    bytes_per_scale,
    dequantize,
    quantize,
    quantized_shapes,
)


OPERATORS = {"up": quantized_up, "down": quantized_down}


class QuantizedExpertTable(ExpertTable):
    """
    A table with a row of `hidden_size` integers per expert: `weight` and `scales` are the `integers` and `scales` of
    [`QuantizedRows`].

    Args:
        config (`PeerConfig`): See [`ExpertTable`].
        num_experts (`int`): Number of rows.
        bits (`int`): 8 or 4.
        group_size (`int`, *optional*): Number of columns that share a scale. The whole row if `None`.
    """

    is_quantized = True

    def __init__(self, config: PeerConfig, num_experts: int, bits: int, group_size: int | None):
        with torch.device("meta"):
            super().__init__(config, num_experts, init_std=0.0)
        of_integers, of_scales = quantized_shapes(num_experts, config.hidden_size, bits, group_size)
        self.bytes_per_scale = bytes_per_scale(config.hidden_size, bits, group_size)
        self.weight = Parameter(torch.empty(of_integers, dtype=INTEGER_DTYPES[bits]), requires_grad=False)
        self.scales = Parameter(torch.empty(of_scales, dtype=SCALE_DTYPE), requires_grad=False)

    @property
    def rows(self) -> QuantizedRows:
        return QuantizedRows(self.weight, self.scales, self.embedding_dim, self.bytes_per_scale)

    def init_own_weights(self) -> None:
        """Integers are not drawn: what a checkpoint lacks is zero."""
        init.zeros_(self.weight)
        init.zeros_(self.scales)

    def append_rows(self, rows: torch.Tensor) -> None:
        raise NotImplementedError("Rows cannot be appended to a quantized table.")

    def _apply(self, fn, recurse=True):
        # Scales keep their dtype, whatever that of the model becomes: they have the range of float32.
        def apply(tensor):
            return fn(tensor.view(torch.int16)).view(SCALE_DTYPE) if tensor.dtype == SCALE_DTYPE else fn(tensor)

        return super()._apply(apply, recurse)

    @property
    def kernels(self) -> str:
        # Of a dtype that kernels for tables know.
        return self.kernels_on(self.scales)

    def _run(self, half, operator, tokens, indices):
        table = self.rows
        if table.integers.is_cpu and tokens.device != table.integers.device:  # a table in host memory
            device = table.integers.device
            return self._run(half, operator, tokens.to(device), indices.to(device)).to(tokens.device)
        kernels = self.kernels_on(table.scales)
        if kernels == "eager" or not needs_operator(tokens, table.integers):
            return getattr(ALL_EXPERT_KERNELS[kernels], f"quantized_{half}")(tokens, indices, table)
        return OPERATORS[half](tokens, indices, *table, kernels)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.rows.bits}"


class QuantizedUpProjection(QuantizedExpertTable, ExpertUpProjection):
    """[`ExpertUpProjection`] whose rows are quantized."""


class QuantizedDownProjection(QuantizedExpertTable, ExpertDownProjection):
    """[`ExpertDownProjection`] whose rows are quantized."""


QUANTIZED_CLASSES: dict[type, type[QuantizedExpertTable]] = {
    ExpertUpProjection: QuantizedUpProjection,
    ExpertDownProjection: QuantizedDownProjection,
}


def tables_to_quantize(model: nn.Module) -> dict[str, ExpertTable]:
    """
    Find all expert tables of a model, by name.

    Raises:
        `ValueError`: if there is none, or one is quantized already, has an adapter, a parametrization or a hook, or
            has a weight that is no plain tensor, as it is where processes share it.
    """
    tables = {name: module for name, module in model.named_modules() if isinstance(module, ExpertTable)}
    if not tables:
        raise ValueError(f"{type(model).__name__} has no expert tables: it has neither PEER nor PKM layers.")
    for name, table in tables.items():
        if table.is_quantized:
            raise ValueError(f"The expert table {name} is quantized already.")
        if not table.is_plain:
            weight = table._parameters.get("weight")
            raise ValueError(
                f"The expert table {name} cannot be quantized: a {type(table).__name__} with a weight of type "
                f"{type(weight).__name__}, expected one without an adapter, a parametrization or hooks, whose weight "
                "is whole and in this process's memory."
            )
    return tables


def make_quantized(table: ExpertTable, bits: int, group_size: int | None) -> QuantizedExpertTable:
    """A quantized table of the size of `table`, on the meta device."""
    with torch.device("meta"):
        return QUANTIZED_CLASSES[type(table)](table.config, table.num_embeddings, bits, group_size)


def quantize_table(table: ExpertTable, bits: int, group_size: int | None) -> QuantizedExpertTable:
    """A quantized copy of a table. Raises `ValueError` if an element is NaN or infinite."""
    rows = quantize(table.weight.detach(), bits, group_size)
    quantized = make_quantized(table, bits, group_size)
    quantized.weight, quantized.scales = (Parameter(each, requires_grad=False) for each in rows[:2])
    return quantized.train(table.training)


def dequantize_table(quantized: QuantizedExpertTable, dtype: torch.dtype) -> ExpertTable:
    """A trainable table of the elements of a quantized one."""
    (table_class,) = (each for each, own in QUANTIZED_CLASSES.items() if type(quantized) is own)
    with torch.device("meta"):
        table = table_class(quantized.config, quantized.num_embeddings, 0.0)
    table.weight = Parameter(dequantize(quantized.rows, dtype))
    return table.train(quantized.training)
