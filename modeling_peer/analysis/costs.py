# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Costs of a model: FLOPs, parameters and bytes, counted from its configuration alone."""

import math
import operator
from dataclasses import astuple, dataclass, replace

import torch

from ..arguments.check_types import check_types
from ..configuration_peer import PeerConfig, generations_of, grid_size
from ..feed_forward import ALL_FEED_FORWARDS, DenseFeedForward, MoeFeedForward, PeerFeedForward, PkmFeedForward
from ..ops.quantized_rows import INTEGER_DTYPES, SCALE_DTYPE, quantized_shapes
from ..router import GATE_WIDTH


@dataclass(frozen=True)
class PartCosts:
    """
    Costs of a part of a model. Costs of several parts can be added.

    Args:
        flops (`int`): Forward FLOPs per token of matrix products, two per multiply-add.
        parameters (`int`): Number of parameters.
        active_parameters (`int`): Parameters that the forward pass of a token reads, each counted once. It is an upper
            bound where heads or layers may retrieve the same expert.
        table_rows (`int`): Number of rows of expert tables, with `hidden_size` parameters each.
        active_table_rows (`int`): Number of these rows that the forward pass of a token reads.
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
    Costs of a [`PeerForCausalLM`], as [`model_costs`] counts them. `print` shows them as a table.

    Args:
        sequence_length (`int`): Sequence length at which FLOPs of the attention are counted.
        dtype (`torch.dtype`): Data type in which bytes are counted.
        quantized_bits (`int`, *optional*): Bits of an element of expert tables, if they are quantized.
        feed_forwards (`tuple[PartCosts]`): Costs of each layer's feed-forward.
        parts (`dict[str, PartCosts]`): Costs of each part over all layers: the rows of the table. FLOPs of a
            pool that PEER layers share are counted in the part of the layers.
        total (`PartCosts`): Costs of the whole model, tied parameters counted once.
        weight_bytes (`int`): Bytes of the weights; quantized tables count as they are stored.
        weight_bytes_read (`int`): Bytes of the weights that are read to generate one token, in a batch of one.
        gradient_bytes (`int`): Bytes of dense gradients, in the data type of the weights. Quantized tables have none.
    """

    sequence_length: int
    dtype: torch.dtype
    quantized_bits: int | None
    feed_forwards: tuple[PartCosts, ...]
    parts: dict[str, PartCosts]
    total: PartCosts
    weight_bytes: int
    weight_bytes_read: int
    gradient_bytes: int

    @property
    def flops(self) -> int:
        """Forward FLOPs per token, at `sequence_length`. A training step takes three times as many."""
        return self.total.flops

    @property
    def parameters(self) -> int:
        """Parameters of the model, tied ones counted once."""
        return self.total.parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that the forward pass of a token reads."""
        return self.total.active_parameters

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the two moments of AdamW, in the data type of the weights."""
        return 2 * self.gradient_bytes

    @property
    def training_bytes(self) -> int:
        """Bytes that training with AdamW takes without activations: weights, gradients and two moments."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes

    def __str__(self) -> str:
        rows = {**self.parts, "total": self.total}
        heading = f"per token at length {self.sequence_length:,}"
        width = max(map(len, [heading, *rows]))
        lines = [f"{heading:<{width}}  {'MFLOPs':>12}  {'parameters':>15}  {'active':>13}"]
        lines += [
            f"{name:<{width}}  {each.flops / 1e6:>12,.3f}  {each.parameters:>15,}  {each.active_parameters:>13,}"
            for name, each in rows.items()
        ]
        memory = {
            "weights": self.weight_bytes,
            "gradients": self.gradient_bytes,
            "AdamW moments": self.optimizer_bytes,
            "training, before activations": self.training_bytes,
            "read per token": self.weight_bytes_read,
        }
        tables = "" if self.quantized_bits is None else f", expert tables in {self.quantized_bits} bits"
        lines += ["", f"in {str(self.dtype).split('.')[-1]}{tables}:"]
        lines += [f"{name:<28}  {size / 2**20:>12,.2f} MiB" for name, size in memory.items()]
        return "\n".join(lines)


@check_types
def model_costs(
    config: PeerConfig, sequence_length: int | None = None, dtype: torch.dtype | None = None
) -> ModelCosts:
    """
    Count the costs of a [`PeerForCausalLM`] from its configuration, without building it.

    FLOPs are those that `torch.utils.flop_counter.FlopCounterMode` counts in a forward pass of `sequence_length`
    tokens with logits for each: attention scores of every pair of positions, masked or not, and no elementwise
    operations. Expert tables take 8 or 4 bits per element if `config.quantization_config` is a
    [`PeerQuantizationConfig`]; other methods of quantization are ignored.

    A custom registered variant counts its own costs in a static method `count_costs(config, layer_idx) -> PartCosts`.

    Args:
        config (`PeerConfig`)
        sequence_length (`int`, *optional*):
            Sequence length to count the attention at. Defaults to `config.max_position_embeddings`. FLOPs at different
            lengths cannot be compared.
        dtype (`torch.dtype`, *optional*):
            Data type to count bytes in. Defaults to `config.dtype`, float32 if that is not set.

    Raises:
        `KeyError`: if a layer's variant is not registered.
        `ValueError`: if its cost is unknown.

    ```python
    >>> print(model_costs(PeerConfig()))
    ```
    """
    if sequence_length is not None and sequence_length < 1:
        raise ValueError(f"`sequence_length` must be at least 1, got {sequence_length}.")
    sequence_length = sequence_length or config.max_position_embeddings
    # The dtype is a string after a model was saved.
    dtype = dtype or getattr(torch, str(config.dtype or torch.float32).removeprefix("torch."))
    embedding, tied = config.vocab_size * config.hidden_size, config.tie_word_embeddings
    feed_forwards = tuple(_feed_forward(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
    parts = {
        # With tied embeddings, the LM head already counts the row.
        "embedding": PartCosts(0, embedding, 0 if tied else config.hidden_size),
        "attention": _attention(config, sequence_length),
        "norms": _elementwise((2 * config.num_hidden_layers + 1) * config.hidden_size),
    }
    for name, costs in zip(config.feed_forward_types, feed_forwards, strict=True):
        row = f"feed-forward {name} x {config.feed_forward_types.count(name)}"
        parts[row] = parts.get(row, PartCosts()) + costs
    if config.share_experts_across_layers and "peer" in config.feed_forward_types:
        parts["shared expert pool"] = _shared_pool(config)
    parts["LM head"] = PartCosts(2 * embedding, 0 if tied else embedding, embedding)
    total = sum(parts.values(), PartCosts())

    quantization = getattr(config, "quantization_config", None) or {}
    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    bits = fields["bits"] if fields.get("quant_method") == "peer" else None

    def num_bytes(num_parameters, num_rows):
        if bits is None:
            return num_parameters * dtype.itemsize
        integers, scales = map(math.prod, quantized_shapes(num_rows, config.hidden_size, bits, fields["group_size"]))
        rest = (num_parameters - num_rows * config.hidden_size) * dtype.itemsize
        return rest + integers * INTEGER_DTYPES[bits].itemsize + scales * SCALE_DTYPE.itemsize

    frozen = 0 if bits is None else total.table_rows * config.hidden_size
    return ModelCosts(
        sequence_length=sequence_length,
        dtype=dtype,
        quantized_bits=bits,
        feed_forwards=feed_forwards,
        parts=parts,
        total=total,
        weight_bytes=num_bytes(total.parameters, total.table_rows),
        weight_bytes_read=num_bytes(total.active_parameters, total.active_table_rows),
        gradient_bytes=(total.parameters - frozen) * dtype.itemsize,
    )


def _feed_forward(config: PeerConfig, layer_idx):
    name = config.feed_forward_types[layer_idx]
    variant = ALL_FEED_FORWARDS[name]
    count = getattr(variant, "count_costs", None) or _COUNTS.get(variant)
    if count is None:
        raise ValueError(f"The cost of {name!r} is unknown: give {variant.__name__} a static method `count_costs`.")
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


def _moe(config: PeerConfig, layer_idx):
    active = _gated_mlp(config, config.moe_intermediate_size * config.moe_num_experts_per_tok)
    experts = _gated_mlp(config, config.moe_intermediate_size * config.moe_num_experts)
    return _linear(config.hidden_size, config.moe_num_experts) + replace(active, parameters=experts.parameters)


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


def _tables(config: PeerConfig, generation, num_tables, num_layers=1):
    """Costs of tables with one row per expert, from which a token retrieves rows in each of `num_layers` layers."""
    num_retrieved = num_layers * generation.num_heads * generation.num_experts_per_head
    rows, active = num_tables * generation.num_experts, num_tables * min(num_retrieved, generation.num_experts)
    flops = 2 * num_tables * num_retrieved * config.hidden_size
    return PartCosts(flops, rows * config.hidden_size, active * config.hidden_size, rows, active)


def _peer(config: PeerConfig, layer_idx):
    costs = _gated_mlp(config, config.shared_expert_intermediate_size or 0)
    for generation in generations_of(config, layer_idx):
        pool = _tables(config, generation, 3 if config.gated_experts else 2)
        costs += _router(config, generation)
        costs += PartCosts(flops=pool.flops) if config.share_experts_across_layers else pool
        if generation.first_expert:  # a gate, whose second layer is no matrix product
            costs += _linear(config.hidden_size, GATE_WIDTH) + _elementwise(2 * GATE_WIDTH + 1)
    return costs


def _shared_pool(config: PeerConfig):
    num_layers, num_tables = config.feed_forward_types.count("peer"), 3 if config.gated_experts else 2
    pools = [_tables(config, generation, num_tables, num_layers) for generation in generations_of(config)]
    return replace(sum(pools, PartCosts()), flops=0)


def _pkm(config: PeerConfig, layer_idx):
    generation = generations_of(config, layer_idx)[0]
    return _router(config, generation) + _tables(config, generation, num_tables=1)


_COUNTS = {
    DenseFeedForward: lambda config, _: _gated_mlp(config, config.intermediate_size),
    MoeFeedForward: _moe,
    PeerFeedForward: _peer,
    PkmFeedForward: _pkm,
}
