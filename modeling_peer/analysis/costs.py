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
Costs of a model: FLOPs, parameters and bytes, counted from its configuration alone.

```python
>>> from modeling_peer import PeerConfig, model_costs

>>> print(model_costs(PeerConfig()))
```
"""

import math
import operator
from dataclasses import astuple, dataclass, replace

import torch
from transformers import PreTrainedConfig

from ..configuration_peer import PeerConfig
from ..expert_generations import first_generation, generations_of, shared_generations
from ..feed_forward import ALL_FEED_FORWARDS, check_feed_forward_types
from ..feed_forward_dense import DenseFeedForward
from ..feed_forward_moe import MoeFeedForward
from ..feed_forward_peer import PeerFeedForward
from ..feed_forward_pkm import PkmFeedForward
from ..key_grid import grid_size
from ..product_key_router import GATE_WIDTH
from ..quantization import QUANT_METHOD, PeerQuantizationConfig
from ..quantized_rows import INTEGER_DTYPES, SCALE_DTYPE, quantized_shapes
from .arguments import check_integer


@dataclass(frozen=True)
class PartCosts:
    """
    Costs of a part of a model. Those of several parts can be added.

    Args:
        flops (`int`): Forward FLOPs per token: those of matrix products, two per multiply-add.
        parameters (`int`): Number of parameters.
        active_parameters (`int`): Parameters that the forward pass of a token reads, each counted once. An upper bound
            where heads or layers may retrieve the same expert.
        table_rows (`int`): Rows of expert tables, of `hidden_size` of the parameters each.
        active_table_rows (`int`): Those among them that the forward pass of a token reads.
    """

    flops: int = 0
    parameters: int = 0
    active_parameters: int = 0
    table_rows: int = 0
    active_table_rows: int = 0

    def __add__(self, other: "PartCosts") -> "PartCosts":
        return PartCosts(*map(operator.add, astuple(self), astuple(other)))


@dataclass(frozen=True)
class ModelCosts:
    """
    Costs of a [`PeerForCausalLM`], made by [`model_costs`]. Printed, they are a table.

    Args:
        sequence_length (`int`): Sequence length that FLOPs of the attention are counted at.
        dtype (`torch.dtype`): Data type that bytes are counted in.
        hidden_size (`int`): Width of the rows of expert tables.
        quantization (`PeerQuantizationConfig`, *optional*): How expert tables are quantized, if they are.
        embedding, attention, norms, expert_pool, lm_head (`PartCosts`): Costs of each over all layers. `expert_pool`
            is the pool that PEER layers share, zero where each has its own; its FLOPs are counted as those of the
            layers.
        feed_forward_types (`tuple[str]`): Feed-forward variant of each layer.
        feed_forwards (`tuple[PartCosts]`): Costs of each layer's feed-forward.
    """

    sequence_length: int
    dtype: torch.dtype
    hidden_size: int
    quantization: PeerQuantizationConfig | None
    embedding: PartCosts
    attention: PartCosts
    norms: PartCosts
    feed_forward_types: tuple[str, ...]
    feed_forwards: tuple[PartCosts, ...]
    expert_pool: PartCosts
    lm_head: PartCosts

    @property
    def total(self) -> PartCosts:
        """Costs of the whole model."""
        return sum(self._parts().values(), PartCosts())

    @property
    def flops(self) -> int:
        """Forward FLOPs per token, at `sequence_length`. Those of a training step are three times as many."""
        return self.total.flops

    @property
    def feed_forward_flops(self) -> list[int]:
        """Forward FLOPs per token of each layer's feed-forward."""
        return [costs.flops for costs in self.feed_forwards]

    @property
    def parameters(self) -> int:
        """Parameters of the model, tied ones counted once."""
        return self.total.parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that the forward pass of a token reads."""
        return self.total.active_parameters

    @property
    def weight_bytes_read(self) -> int:
        """Bytes of the weights that are read to generate one token, in a batch of one."""
        return self._weight_bytes(self.active_parameters, self.total.active_table_rows)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights, those of quantized tables as they are stored."""
        return self._weight_bytes(self.parameters, self.total.table_rows)

    @property
    def gradient_bytes(self) -> int:
        """
        Bytes of dense gradients, which `torch.autograd` keeps in the data type of the weights. Quantized tables have
        none.
        """
        frozen = 0 if self.quantization is None else self.total.table_rows * self.hidden_size
        return (self.parameters - frozen) * self.dtype.itemsize

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the two moments of AdamW, which `torch.optim` keeps in the data type of the weights."""
        return 2 * self.gradient_bytes

    @property
    def training_bytes(self) -> int:
        """Bytes that training with AdamW takes without activations: weights, gradients and two moments."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes

    def _weight_bytes(self, num_parameters, num_rows):
        if self.quantization is None:
            return num_parameters * self.dtype.itemsize
        bits, group_size = self.quantization.bits, self.quantization.group_size
        integers, scales = map(math.prod, quantized_shapes(num_rows, self.hidden_size, bits, group_size))
        rest = (num_parameters - num_rows * self.hidden_size) * self.dtype.itemsize
        return rest + integers * INTEGER_DTYPES[bits].itemsize + scales * SCALE_DTYPE.itemsize

    def _parts(self) -> dict[str, PartCosts]:
        parts = {"embedding": self.embedding, "attention": self.attention, "norms": self.norms}
        for name, costs in zip(self.feed_forward_types, self.feed_forwards, strict=True):
            row = f"feed-forward {name} x {self.feed_forward_types.count(name)}"
            parts[row] = parts.get(row, PartCosts()) + costs
        if self.expert_pool != PartCosts():
            parts["shared expert pool"] = self.expert_pool
        parts["LM head"] = self.lm_head
        return parts

    def __str__(self) -> str:
        rows = {**self._parts(), "total": self.total}
        # FLOPs without their length cannot be compared: attention takes more of them in longer sequences.
        heading = f"per token at length {self.sequence_length:,}"
        width = max(map(len, [heading, *rows]))
        lines = [f"{heading:<{width}}  {'MFLOPs':>12}  {'parameters':>15}  {'active':>13}"]
        for name, costs in rows.items():
            lines.append(
                f"{name:<{width}}  {costs.flops / 1e6:>12,.3f}  {costs.parameters:>15,}  "
                f"{costs.active_parameters:>13,}"
            )
        memory = {
            "weights": self.weight_bytes,
            "gradients": self.gradient_bytes,
            "AdamW moments": self.optimizer_bytes,
            "training, before activations": self.training_bytes,
            "read per token": self.weight_bytes_read,
        }
        tables = "" if self.quantization is None else f", expert tables in {self.quantization.bits} bits"
        lines += ["", f"in {str(self.dtype).split('.')[-1]}{tables}:"]
        width = max(map(len, memory))
        lines += [f"{name:<{width}}  {size / 2**30:>10.3f} GiB" for name, size in memory.items()]
        return "\n".join(lines)


def model_costs(
    config: PeerConfig, sequence_length: int | None = None, dtype: torch.dtype | None = None
) -> ModelCosts:
    """
    Count the costs of a [`PeerForCausalLM`] from its configuration, without building it.

    FLOPs are those that `torch.utils.flop_counter.FlopCounterMode` counts in a forward pass of `sequence_length`
    tokens with logits for each: attention scores of every pair of positions, masked or not, and no elementwise
    operations. The formulas of retrieval are in section 2 of the paper and its Algorithm 1.

    Bytes of expert tables are those of 8 or 4 bits where `config.quantization_config` is a [`PeerQuantizationConfig`],
    as it is of models that were loaded or made quantized. Other ways of quantization are not counted.

    A registered variant of your own counts itself, in a static method `count_costs(config, layer_idx) -> PartCosts`.

    Args:
        config (`PeerConfig`)
        sequence_length (`int`, *optional*):
            Sequence length to count the attention at. Defaults to `config.max_position_embeddings`. FLOPs at different
            lengths cannot be compared.
        dtype (`torch.dtype`, *optional*):
            Data type to count bytes in. Defaults to `config.dtype`, float32 if that is not set.

    Returns:
        `ModelCosts`.

    Raises:
        `ValueError`: if `config` is not a [`PeerConfig`] or `sequence_length` not a positive integer.
        `ValueError`: if a layer's variant is not registered or of unknown cost.
    """
    # Not by its class: a checkpoint's own code has another of this name.
    if not isinstance(config, PreTrainedConfig) or config.model_type != PeerConfig.model_type:
        raise ValueError(f"`config` must be a `PeerConfig`, got an object of class {type(config).__name__}.")
    check_feed_forward_types(config.feed_forward_types)
    if sequence_length is None:
        sequence_length = config.max_position_embeddings
    check_integer("sequence_length", sequence_length)
    num_embedding_parameters = config.vocab_size * config.hidden_size
    tied = config.tie_word_embeddings
    return ModelCosts(
        sequence_length=sequence_length,
        dtype=dtype or dtype_of(config),
        hidden_size=config.hidden_size,
        quantization=_quantization_of(config),
        # A tied row is among those that the LM head reads.
        embedding=PartCosts(0, num_embedding_parameters, 0 if tied else config.hidden_size),
        attention=_attention(config, sequence_length),
        norms=_elementwise((2 * config.num_hidden_layers + 1) * config.hidden_size),
        feed_forward_types=tuple(config.feed_forward_types),
        feed_forwards=tuple(_feed_forward(config, layer_idx) for layer_idx in range(config.num_hidden_layers)),
        expert_pool=_shared_pool(config),
        lm_head=PartCosts(
            2 * num_embedding_parameters, 0 if tied else num_embedding_parameters, num_embedding_parameters
        ),
    )


def dtype_of(config: PeerConfig) -> torch.dtype:
    """The data type that a configuration names, float32 if it names none. Saving a model makes it a string."""
    dtype = config.dtype or torch.float32
    return getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype


def _quantization_of(config: PeerConfig):
    """How expert tables are quantized, `None` if they are not. Configurations that were read have a dictionary."""
    quantization = getattr(config, "quantization_config", None)
    fields = quantization if isinstance(quantization, dict | None) else quantization.to_dict()
    return PeerQuantizationConfig(**fields) if fields and fields.get("quant_method") == QUANT_METHOD else None


def _feed_forward(config: PeerConfig, layer_idx):
    name = config.feed_forward_types[layer_idx]
    variant = ALL_FEED_FORWARDS[name]
    count = getattr(variant, "count_costs", None) or _COUNTS.get(variant)
    if count is None:
        raise ValueError(
            f"The cost of the feed-forward variant {name!r} of layer {layer_idx} is unknown: give its class "
            f"{variant.__name__} a static method `count_costs(config, layer_idx)` that returns a `PartCosts`."
        )
    return count(config, layer_idx)


def _linear(in_features, out_features):
    """Costs of a linear layer without a bias."""
    size = in_features * out_features
    return PartCosts(2 * size, size, size)


def _elementwise(num_parameters):
    return PartCosts(0, num_parameters, num_parameters)


def _attention(config: PeerConfig, sequence_length):
    query_size = config.num_attention_heads * config.head_dim
    key_value_size = config.num_key_value_heads * config.head_dim
    layer = _linear(config.hidden_size, query_size + 2 * key_value_size) + _linear(query_size, config.hidden_size)
    layer += PartCosts(flops=4 * sequence_length * query_size)  # scores, and the sum over values
    if config.attention_bias:
        layer += _elementwise(query_size + 2 * key_value_size + config.hidden_size)
    return sum([layer] * config.num_hidden_layers, PartCosts())


def _gated_mlp(config: PeerConfig, width):
    return _linear(config.hidden_size, 2 * width) + _linear(width, config.hidden_size)


def _dense(config: PeerConfig, layer_idx):
    return _gated_mlp(config, config.intermediate_size)


def _moe(config: PeerConfig, layer_idx):
    expert = _gated_mlp(config, config.moe_intermediate_size)
    num_active = config.moe_num_experts_per_tok
    experts = PartCosts(
        num_active * expert.flops, config.moe_num_experts * expert.parameters, num_active * expert.active_parameters
    )
    return _linear(config.hidden_size, config.moe_num_experts) + experts


def _router(config: PeerConfig, generation):
    all_queries_size = generation.num_heads * config.query_size
    num_sub_keys = grid_size(generation.num_experts) * (generation.num_heads if config.sub_keys_per_head else 1)
    costs = _linear(config.hidden_size, all_queries_size) + _elementwise(num_sub_keys * config.query_size)
    costs += PartCosts(flops=2 * grid_size(generation.num_experts) * all_queries_size)
    if config.query_norm == "batch":
        costs += _elementwise(2 * all_queries_size)  # a scale and a shift
    elif config.query_norm == "rms":
        costs += _elementwise(config.query_size)  # a scale of half queries, and one of half keys
    return costs


def _gate(config: PeerConfig):
    return _linear(config.hidden_size, GATE_WIDTH) + _linear(GATE_WIDTH, 1) + _elementwise(GATE_WIDTH + 1)


def _tables(config: PeerConfig, generation, num_tables, num_layers=1):
    """Costs of tables with one row per expert, from which a token retrieves rows in each of `num_layers` layers."""
    num_experts = generation.num_experts
    num_retrieved = num_layers * generation.num_heads * generation.num_experts_per_head
    row = num_tables * config.hidden_size
    num_active = min(num_retrieved, num_experts)
    return PartCosts(
        flops=2 * num_retrieved * row,
        parameters=num_experts * row,
        active_parameters=num_active * row,
        table_rows=num_experts * num_tables,
        active_table_rows=num_active * num_tables,
    )


def _num_pool_tables(config: PeerConfig):
    return 3 if config.gated_experts else 2


def _peer(config: PeerConfig, layer_idx):
    costs = PartCosts()
    for generation in generations_of(config, layer_idx):
        pool = _tables(config, generation, _num_pool_tables(config))
        costs += _router(config, generation)
        costs += PartCosts(flops=pool.flops) if config.share_experts_across_layers else pool
        if generation.first_expert:
            costs += _gate(config)
    if config.shared_expert_intermediate_size is not None:
        costs += _gated_mlp(config, config.shared_expert_intermediate_size)
    return costs


def _shared_pool(config: PeerConfig):
    num_layers = config.feed_forward_types.count("peer")
    if not config.share_experts_across_layers or not num_layers:
        return PartCosts()
    num_tables = _num_pool_tables(config)
    pools = [_tables(config, generation, num_tables, num_layers) for generation in shared_generations(config)]
    pool = sum(pools, PartCosts())
    return replace(pool, flops=0)


def _pkm(config: PeerConfig, layer_idx):
    generation = first_generation(config)
    return _router(config, generation) + _tables(config, generation, num_tables=1)


_COUNTS = {DenseFeedForward: _dense, MoeFeedForward: _moe, PeerFeedForward: _peer, PkmFeedForward: _pkm}


__all__ = ["ModelCosts", "PartCosts", "model_costs"]
