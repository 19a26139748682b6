# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Feed-forwards of the recipe study that the package does not have: a product-key memory with an output gate, and PEER
with rows narrower than the model.
"""

from copy import copy

import torch
from torch import nn
from torch.nn import functional as F

from modeling_peer import FeedForwardInterface, PartCosts, PeerConfig
from modeling_peer.analysis.costs import model_costs
from modeling_peer.configuration_peer import generations_of
from modeling_peer.experts import ExpertPool
from modeling_peer.feed_forward import PeerFeedForward, PkmFeedForward
from modeling_peer.router import ForwardPass


def _costs_of(config, variant):
    """Costs of one layer of a variant of the package."""
    alone = copy(config)
    alone.feed_forward_types = [variant] * config.num_hidden_layers
    return model_costs(alone, 1).feed_forwards[0]


class GatedPkmFeedForward(PkmFeedForward):
    """
    A product-key memory with the output gate of Memory+ (Berges et al., "Memory Layers at Scale", arXiv 2412.09764,
    section 3.2): `(y ⊙ silu(x W_1)) W_2` of the memory's output y.
    """

    def __init__(self, config: PeerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.gate_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.output_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        memory = super().forward(hidden_states, padding_mask, **kwargs)
        return self.output_proj(memory * F.silu(self.gate_proj(hidden_states)))

    @staticmethod
    def count_costs(config: PeerConfig, layer_idx: int) -> PartCosts:
        size = 2 * config.hidden_size**2
        return _costs_of(config, "pkm") + PartCosts(2 * size, size, size)


class NarrowPeerFeedForward(PeerFeedForward):
    """
    PEER whose experts have rows of half the width of the model, with an input and an output projection, like the
    values of UltraMem (arXiv 2411.12364). With twice as many experts per head, a token reads equally many bytes.
    """

    def __init__(self, config: PeerConfig, layer_idx: int):
        if config.share_experts_across_layers:
            raise ValueError("`narrow_peer` must not have `share_experts_across_layers`: each layer has its own pool.")
        super().__init__(config, layer_idx)
        narrow = self._narrow(config)
        self.expert_pool = ExpertPool(narrow, generations_of(narrow)[:1])
        self.in_proj = nn.Linear(config.hidden_size, narrow.hidden_size, bias=False)
        self.out_proj = nn.Linear(narrow.hidden_size, config.hidden_size, bias=False)

    @staticmethod
    def _narrow(config):
        narrow = copy(config)
        narrow.hidden_size = config.hidden_size // 2
        return narrow

    def forward(
        self,
        hidden_states: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        forward_pass: ForwardPass | None = None,
        **kwargs,
    ) -> torch.Tensor:
        indices, weights = self.router(hidden_states, padding_mask, forward_pass)
        tokens = self.in_proj(hidden_states).flatten(0, -2)
        output = self.expert_pool(tokens, indices.flatten(-2).flatten(0, -2), weights.flatten(-2).flatten(0, -2))
        output = self.out_proj(output).view_as(hidden_states)
        return output if self.shared_expert is None else output + self.shared_expert(hidden_states)

    @staticmethod
    def count_costs(config: PeerConfig, layer_idx: int) -> PartCosts:
        whole, active = _costs_of(config, "peer"), config.num_experts_per_tok
        columns = (3 if config.gated_experts else 2) * (config.hidden_size // 2)  # saved in the rows of all tables
        rows = PartCosts(-2 * active * columns, -config.num_experts * columns, -active * columns)
        size = 2 * config.hidden_size * (config.hidden_size // 2)
        return whole + rows + PartCosts(2 * size, size, size)


def register_variants() -> None:
    """Register these feed-forwards under the names that plans use."""
    FeedForwardInterface.register("gated_pkm", GatedPkmFeedForward)
    FeedForwardInterface.register("narrow_peer", NarrowPeerFeedForward)
