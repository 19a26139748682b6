# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
The contenders of the benchmark, with random weights.

Retrieval costs all PEER contenders the same FLOPs: each head of PEER-pytorch has its own sub-keys and heads of this
package share them, but each query is compared with the same number. Single layers do not normalize queries; whole
models do. Random weights retrieve other experts than trained weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig
from transformers.initialization import no_init_weights

from modeling_peer import PeerConfig, PeerForCausalLM, configuration_path, quantize_experts
from modeling_peer.configuration_peer import generations_of, grid_size
from modeling_peer.experts import ExpertPool
from modeling_peer.feed_forward import DenseFeedForward, PeerFeedForward, PkmFeedForward
from modeling_peer.memory.advice import advise_huge_pages
from modeling_peer.memory.host_tables import advise_tables


@dataclass(frozen=True)
class Task:
    """
    One measurement: contender, operation and size. `indices` is how the expert indices of `expert_part` are drawn.
    """

    contender: str
    operation: str
    hidden_size: int = 512
    num_experts: int = 1024**2
    num_tokens: int = 1024
    num_retrieval_heads: int = 8
    num_experts_per_head: int = 16
    query_size: int = 256
    dtype: str = "float32"
    indices: str | None = None

    @property
    def num_active(self) -> int:
        """Active experts per token."""
        return self.num_retrieval_heads * self.num_experts_per_head

    @property
    def torch_dtype(self) -> torch.dtype:
        """The data type as a `torch.dtype`."""
        return getattr(torch, self.dtype)

    @property
    def table_bytes(self) -> int:
        """Bytes of one expert table."""
        return self.num_experts * self.hidden_size * self.torch_dtype.itemsize


def peer_config(task: Task, **fields) -> PeerConfig:
    """The configuration of the layers of this package at the size of a task."""
    sizes = ("hidden_size", "num_experts", "num_retrieval_heads", "num_experts_per_head", "query_size")
    fields = {"num_attention_heads": 1, "num_hidden_layers": 1, "query_norm": None} | fields
    fields = {"intermediate_size": 4 * task.hidden_size} | fields
    return PeerConfig(**{name: getattr(task, name) for name in sizes}, **fields)


def peer_eager(task: Task) -> nn.Module:
    """Algorithm 1 as printed in the paper, with the gradients of autograd."""
    return PeerFeedForward(peer_config(task, expert_kernels="eager"), 0)


def peer_pytorch(task: Task) -> nn.Module:
    """The PyPI package `peer-pytorch`, configured to compute the same function as the layer of this package."""
    from PEER_pytorch import PEER

    return PEER(
        task.hidden_size,
        heads=task.num_retrieval_heads,
        num_experts=task.num_experts,
        num_experts_per_head=task.num_experts_per_head,
        dim_key=task.query_size // 2,
        non_competing_scores=False,
    )


def doge_cdmoe(task: Task) -> nn.Module:
    """The cross-domain mixture of experts of Doge in Transformers. It includes a shared expert, here of one neuron."""
    from transformers.models.doge.modeling_doge import DogeCDMoE, DogeConfig

    class RoutedExperts(DogeCDMoE):
        def forward(self, hidden_states):
            return super().forward(hidden_states)[0]

    return RoutedExperts(
        DogeConfig(
            hidden_size=task.hidden_size,
            intermediate_size=1,
            num_attention_heads=1,
            hidden_act="gelu",
            num_experts=task.num_experts,
            num_experts_per_tok=task.num_active,
        )
    )


class EmbeddingBagMemory(nn.Module):
    """Product-key memory as in the PyPI package `product-key-memory`, without its normalization of queries."""

    def __init__(self, task: Task):
        super().__init__()
        self.num_heads, self.k = task.num_retrieval_heads, task.num_experts_per_head
        self.to_queries = nn.Linear(task.hidden_size, self.num_heads * task.query_size, bias=False)
        size = grid_size(task.num_experts)
        self.keys = nn.Parameter(torch.empty(self.num_heads, size, 2, task.query_size // 2))
        self.values = nn.EmbeddingBag(task.num_experts, task.hidden_size, mode="sum")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        queries = self.to_queries(hidden_states).view(-1, 2, self.num_heads, self.keys.shape[-1])
        scores, ranks = torch.einsum("tphd,hnpd->thpn", queries, self.keys).topk(self.k)
        scores = scores[:, :, 0, :, None] + scores[:, :, 1, None]
        indices = ranks[:, :, 0, :, None] * self.keys.shape[1] + ranks[:, :, 1, None]
        scores, best = scores.flatten(2).topk(self.k)
        indices = indices.flatten(2).gather(-1, best).flatten(1)
        return self.values(indices, per_sample_weights=scores.softmax(-1).flatten(1)).view_as(hidden_states)


def dense(task: Task) -> nn.Module:
    """The two-matrix feed-forward, of width 4 d."""
    width = 4 * task.hidden_size
    return nn.Sequential(
        nn.Linear(task.hidden_size, width, bias=False), nn.GELU(), nn.Linear(width, task.hidden_size, bias=False)
    )


def named_model(name: str) -> Callable[[Task], nn.Module]:
    """Returns a function that makes a whole model from a named configuration."""
    return lambda task: PeerForCausalLM(AutoConfig.from_pretrained(configuration_path(name)))


def mid_model(task: Task, **fields) -> nn.Module:
    """A model of twelve layers at the size of a task, with the query norm of the paper."""
    num_heads = max(1, task.hidden_size // 64)
    return PeerForCausalLM(
        peer_config(task, num_hidden_layers=12, num_attention_heads=num_heads, query_norm="batch", **fields)
    )


def expert_part(task: Task) -> nn.Module:
    """The experts of a layer, without retrieval."""
    return ExpertPool(peer_config(task), generations_of(peer_config(task)))


# Constructors of contenders by name, in the order of tables and plots.
CONTENDERS: dict[str, Callable[[Task], nn.Module]] = {
    "peer": lambda task: PeerFeedForward(peer_config(task), 0),
    "peer_eager": peer_eager,
    "peer_pytorch": peer_pytorch,
    "doge_cdmoe": doge_cdmoe,
    "pkm": lambda task: PkmFeedForward(peer_config(task), 0),
    "pkm_embedding_bag": EmbeddingBagMemory,
    "dense": dense,
    "dense_gated": lambda task: DenseFeedForward(peer_config(task), 0),
    "expert_part": expert_part,
    "expert_part_int8": expert_part,
    "expert_part_int4": expert_part,
    "peer-tiny": named_model("peer-tiny"),
    "dense-tiny": named_model("dense-tiny"),
    "peer-mid": mid_model,
    "peer-mid_int8": mid_model,
    "peer-mid_int4": mid_model,
    "dense-mid": lambda task: mid_model(task, feed_forward_types=["dense"] * 12),
}
# Contenders whose expert tables are quantized once they have their weights, and the bits.
BITS = {"expert_part_int8": 8, "expert_part_int4": 4, "peer-mid_int8": 8, "peer-mid_int4": 4}
OURS = ("peer", "pkm", "expert_part", "peer-mid", "peer-tiny", *BITS)
NUM_TABLES = {"pkm": 1, "pkm_embedding_bag": 1, "dense": 0, "dense_gated": 0, "dense-tiny": 0, "dense-mid": 0}
NUM_TABLES |= dict.fromkeys(BITS, 3)  # two in bfloat16, beside the quantized ones


def build(task: Task, device: str = "cpu") -> nn.Module:
    """Makes a contender with random weights. The values repeat, because drawing gigabytes of them takes too long."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(task.torch_dtype)
    try:
        with no_init_weights(), torch.device(device):
            module = CONTENDERS[task.contender](task)
            advise_tables(module, advise_huge_pages)  # as the package does when it makes a model
    finally:
        torch.set_default_dtype(default)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
            continue
        values = torch.randn(min(parameter.numel(), 2**22), device=device) * 0.02
        for piece in parameter.data.view(-1).split(len(values)):
            piece.copy_(values[: len(piece)])
    return quantize_experts(module, BITS[task.contender]) if task.contender in BITS else module
