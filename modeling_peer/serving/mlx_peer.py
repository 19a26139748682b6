# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
A PEER model for MLX, which `examples/convert_to_mlx.py` writes beside a checkpoint. `mlx_lm` runs it:

    python -m mlx_lm generate --model FOLDER --trust-remote-code --prompt "def main("

Attention, dense layers, caches and sampling are those of `mlx_lm`. This file adds PEER layers in evaluation mode, with
added experts and shared pools. It needs only `mlx_lm`.
"""

import math
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models import llama


ACTIVATIONS = {
    "silu": nn.silu,
    "swish": nn.silu,
    "gelu": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "relu": nn.relu,
    "linear": lambda inputs: inputs,
    None: lambda inputs: inputs,
}
SCORING_FUNCTIONS = {
    "softmax": lambda scores: mx.softmax(scores, axis=-1),
    "sigmoid": mx.sigmoid,
    "relu": nn.relu,
}
# Width of the gate of added experts, and the openness below which it is zero.
GATE_WIDTH, SHUT_BELOW = 64, 0.01


@dataclass
class ModelArgs(llama.ModelArgs):
    """The fields of `PeerConfig` that evaluation needs; it describes them."""

    rope_parameters: dict[str, Any] | None = None
    feed_forward_types: list[str] = field(default_factory=list)
    num_experts: int = 1024**2
    num_retrieval_heads: int = 8
    num_experts_per_head: int = 16
    query_size: int = 256
    query_norm: str | None = "batch"
    scoring_func: str = "softmax"
    sub_keys_per_head: bool = False
    expert_act: str | None = "gelu"
    gated_experts: bool = False
    share_experts_across_layers: bool = False
    shared_expert_intermediate_size: int | None = None
    expert_additions: list[dict[str, Any]] | None = None
    quantization_config: dict[str, Any] | None = None

    def __post_init__(self):
        super().__post_init__()
        rope = dict(self.rope_parameters or {})
        self.rope_theta = rope.pop("rope_theta", self.rope_theta)
        self.rope_scaling = rope if rope.get("rope_type", "default") != "default" else None

    def generations(self, layer: int | None) -> list[tuple[int, int, int]]:
        """Numbers of experts, heads and experts per head by generation of a layer, or of the shared pool if `None`."""
        found = [(self.num_experts, self.num_retrieval_heads, self.num_experts_per_head)]
        for addition in self.expert_additions or ():
            if layer is not None and layer not in addition["layers"]:
                continue
            if addition["mode"] == "open":
                found[0] = (found[0][0] + addition["num_experts"], *found[0][1:])
            else:
                names = ("num_experts", "num_retrieval_heads", "num_experts_per_head")
                found.append(tuple(addition[name] for name in names))
        return found


class Table(nn.Module):
    """Rows of experts, `(...) -> (..., hidden_size)`: floating point, or 8 bits with scales for groups of columns."""

    def __init__(self, args: ModelArgs, num_rows: int):
        super().__init__()
        self.weight = mx.zeros((num_rows, args.hidden_size))
        if args.quantization_config is not None:
            self.group = min(args.quantization_config["group_size"] or args.hidden_size, args.hidden_size)
            self.weight = self.weight.astype(mx.int8)
            self.scales = mx.zeros((num_rows, -(-args.hidden_size // self.group)))

    def __call__(self, rows: mx.array) -> mx.array:
        values = self.weight[rows]
        if "scales" not in self:
            return values
        scales = mx.repeat(self.scales[rows].astype(mx.float32), self.group, axis=-1)
        return values.astype(mx.float32) * scales[..., : values.shape[-1]]


class ExpertPool(nn.Module):
    """`Σ g_i(x) σ(u_i · x) v_i`, or `Σ g_i(x) σ(w_i · x) (u_i · x) v_i`"""

    def __init__(self, args: ModelArgs, num_experts: int, added: list[tuple[int, int, int]]):
        super().__init__()
        self.act = ACTIVATIONS[args.expert_act]
        self.up_proj, self.down_proj = Table(args, num_experts), Table(args, num_experts)
        if args.gated_experts:
            self.gate_proj = Table(args, num_experts)
        self.added = [ExpertPool(args, number, []) for number, _, _ in added]

    def __call__(self, hidden_states: mx.array, rows: mx.array, weights: mx.array) -> mx.array:
        def products(table: Table) -> mx.array:
            return (table(rows).astype(hidden_states.dtype) @ hidden_states[..., None])[..., 0]

        neurons = products(self.up_proj)
        neurons = self.act(products(self.gate_proj)) * neurons if "gate_proj" in self else self.act(neurons)
        weights = weights * neurons
        return (weights[..., None, :] @ self.down_proj(rows).astype(weights.dtype))[..., 0, :]


class Router(nn.Module):
    """Retrieves experts for all heads: indices and router weights, `hidden [..., d] -> [..., h · k]` each."""

    def __init__(self, args: ModelArgs, generation: tuple[int, int, int], is_added: bool = False):
        super().__init__()
        number, self.heads, self.k = generation
        self.args, self.half = args, args.query_size // 2
        self.query_proj = nn.Linear(args.hidden_size, self.heads * args.query_size, bias=False)
        self.query_norm: Any
        if args.query_norm == "batch":
            self.query_norm = nn.BatchNorm(self.heads * args.query_size, args.rms_norm_eps)
        elif args.query_norm == "rms":
            self.query_norm, self.key_norm = (nn.RMSNorm(self.half, args.rms_norm_eps) for _ in range(2))
        self.sub_keys = mx.zeros((self.heads if args.sub_keys_per_head else 1, 2, math.isqrt(number), self.half))
        if is_added:
            self.gate = Gate(args.hidden_size)

    def __call__(self, hidden_states: mx.array) -> tuple[mx.array, mx.array]:
        queries, sub_keys = self.query_proj(hidden_states).astype(mx.float32), self.sub_keys.astype(mx.float32)
        if self.args.query_norm == "batch":
            queries = self.query_norm(queries)
        queries = queries.reshape(*queries.shape[:-1], self.heads, 2, self.half)
        if self.args.query_norm == "rms":
            queries, sub_keys = self.query_norm(queries) * self.args.query_size**-0.5, self.key_norm(sub_keys)
        scores = (sub_keys @ queries[..., None])[..., 0]  # [..., h, 2, √N]
        places = mx.argpartition(-scores, self.k - 1, axis=-1)[..., : self.k]
        best = mx.take_along_axis(scores, places, axis=-1)
        sums = (best[..., 0, :, None] + best[..., 1, None, :]).flatten(-2)
        pairs = mx.argpartition(-sums, self.k - 1, axis=-1)[..., : self.k]
        row = mx.take_along_axis(places[..., 0, :], pairs // self.k, axis=-1)
        column = mx.take_along_axis(places[..., 1, :], pairs % self.k, axis=-1)
        row, column = row.astype(mx.int64), column.astype(mx.int64)
        shell = mx.maximum(row, column)
        weights = SCORING_FUNCTIONS[self.args.scoring_func](mx.take_along_axis(sums, pairs, axis=-1))
        weights = weights.astype(hidden_states.dtype).flatten(-2)
        if "gate" in self:
            weights = weights * self.gate(hidden_states)
        return (shell * shell + shell + row - column).flatten(-2), weights


class Gate(nn.Module):
    """The gate of added experts, between 0 and 1."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(hidden_size, GATE_WIDTH), nn.Linear(GATE_WIDTH, 1)

    def __call__(self, hidden_states: mx.array) -> mx.array:
        openness = mx.sigmoid(self.down_proj(nn.gelu(self.up_proj(hidden_states))))
        return mx.where(openness < SHUT_BELOW, 0.0, openness)


class Peer(nn.Module):
    """A PEER layer with its own pool or the pool of the model."""

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        first, *added = args.generations(layer)
        self.router = Router(args, first)
        self.added_routers = [Router(args, each, is_added=True) for each in added]
        if not args.share_experts_across_layers:
            self.expert_pool = ExpertPool(args, first[0], added)
        if args.shared_expert_intermediate_size is not None:
            of_shared = copy(args)
            of_shared.intermediate_size = args.shared_expert_intermediate_size
            self.shared_expert = llama.MLP(of_shared)

    def __call__(self, hidden_states: mx.array) -> mx.array:
        pool = self.expert_pool if "expert_pool" in self else self._pool
        routers, pools = [self.router, *self.added_routers], [pool, *pool.added]
        output = sum(
            experts(hidden_states, *router(hidden_states)) for router, experts in zip(routers, pools, strict=True)
        )
        return output + self.shared_expert(hidden_states) if "shared_expert" in self else output


class Model(llama.Model):
    """`PeerForCausalLM` for MLX, which loads checkpoints of that class."""

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        if args.share_experts_across_layers:
            first, *added = args.generations(None)
            self.model.expert_pool = ExpertPool(args, first[0], added)
        for index, (layer, kind) in enumerate(zip(self.layers, args.feed_forward_types, strict=True)):
            if kind == "peer":
                layer.mlp = Peer(args, index)
                if args.share_experts_across_layers:
                    layer.mlp._pool = self.model.expert_pool  # no parameter of the layer

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return {
            name: value
            for name, value in super().sanitize(weights).items()
            if not name.endswith("num_batches_tracked")
        }
