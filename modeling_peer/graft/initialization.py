# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Initialization of a graft: with an output of zero beside a feed-forward, from its neurons or at random in place of it.

From neurons, the router is initialized as well, if the pool has room. Each head gets an equal share of the neurons,
one in each column of the key grid. It looks for those with the largest input to the activation, times the norm of
their outgoing vector. Its query half for columns and the columns' sub-keys are the best factors, of d_k / 2 - 1
features, of the matrix that gives these products. Its half for rows finds one of the two rows that belong to the head,
one for each sign of a feature. Both rows hold all of the head's neurons.

Without the feed-forward of its middle layer, the loss of SmolLM2-135M is higher by 0.109. With its neurons in a graft
(N = 192², h = 8, k = 16) it is higher by 0.066, with random experts by 0.109 (`./run study graft_starts`).
"""

import math

import torch
from torch.nn import functional as F
from transformers import initialization as init

from ..configuration_peer import PeerConfig, grid_size
from ..experts import expert_index, router_weight_power
from ..graft_layer import PeerGraft
from .base_feed_forward import FeedForwardParts, weight_matrix


# Scale of the scores at first: small, so that a head's neurons get nearly equal weights.
FLATNESS = 0.05


@torch.no_grad()
def init_graft(graft: PeerGraft, parts: FeedForwardParts, placement: str, from_ffn: bool) -> None:
    """
    Move a graft to the device of its feed-forward and initialize it there. Beside the feed-forward, down-projection
    vectors are zeros. In place of it, experts are random or, if `from_ffn`, its neurons, see [`neuron_cells`].
    """
    graft.to(parts.up.weight.device)
    graft.init_weights()
    if placement == "beside":
        init.zeros_(graft.expert_pool.down_proj.weight)
    elif from_ffn:
        _copy_neurons(graft, parts)


def has_room_for_neurons(config: PeerConfig, num_neurons: int) -> bool:
    """Whether the router can start from neurons, under the conditions in `init_from_ffn` of [`PeerGraftConfig`]."""
    heads, size = config.num_retrieval_heads, grid_size(config.num_experts)
    fits = size >= max(2 * heads, -(-num_neurons // heads)) and heads < config.query_size // 2
    return fits and config.scoring_func == "softmax"


def neuron_cells(config: PeerConfig, num_neurons: int) -> torch.Tensor:
    """
    The indices of the experts that start as each neuron: int64 of shape `(1 or 2, num_neurons)`. Each neuron has two
    copies if there is room, see [`has_room_for_neurons`]. Otherwise the first experts are its neurons.
    """
    neurons = torch.arange(num_neurons)
    if not has_room_for_neurons(config, num_neurons):
        return neurons[None]
    head, column = neurons % config.num_retrieval_heads, neurons // config.num_retrieval_heads
    return torch.stack([expert_index(2 * head + sign, column) for sign in (0, 1)])


def _copy_neurons(graft, parts):
    hidden_size = parts.hidden_size
    cells = neuron_cells(graft.config, parts.intermediate_size).to(parts.up.weight.device)
    pool = graft.expert_pool
    pool.down_proj.weight.zero_()
    # A retrieved neuron gets about the weight that it has in the feed-forward, one: a router weight of a head's
    # softmax over k is about 1 / k.
    num_active = graft.config.num_experts_per_tok
    outgoing = weight_matrix(parts.down).T.to(pool.down_proj.weight.dtype)
    pool.down_proj.weight[cells, :hidden_size] = outgoing * math.sqrt(num_active / router_weight_power(graft.config))
    for table, layer in ((pool.up_proj, parts.up), (pool.gate_proj, parts.gate)):
        if layer is not None:
            incoming = _with_bias(layer, graft).to(table.weight.dtype)
            table.weight[:, hidden_size:] = 0
            table.weight[cells] = incoming
    if graft.output_bias is not None and parts.down.bias is not None:
        graft.output_bias.copy_(parts.down.bias)
    if has_room_for_neurons(graft.config, parts.intermediate_size):
        activated = parts.up if parts.gate is None else parts.gate
        _find_neurons(graft.router, _with_bias(activated, graft).float() * outgoing.float().norm(dim=1, keepdim=True))


def _with_bias(layer, graft):
    """The matrix of a linear layer, with its biases as a last column if the graft has biases."""
    matrix = weight_matrix(layer)
    if graft.output_bias is None:
        return matrix
    bias = matrix.new_zeros(len(matrix)) if layer.bias is None else layer.bias
    return torch.cat([matrix, bias[:, None]], dim=1)


def _find_neurons(router, activated):
    """Set the router to retrieve the largest of `activated @ x`, `activated` of shape `(num_neurons, width)`."""
    heads, half, size = router.num_heads, router.query_size // 2, router.sub_keys.shape[2]
    num_columns, width = -(-len(activated) // heads), activated.shape[1]
    padding = activated.new_zeros(num_columns * heads - len(activated), width)
    by_column = torch.cat([activated, padding]).view(num_columns, heads, width)
    left, singular, right = torch.linalg.svd(by_column.flatten(1), full_matrices=False)
    rank = min(half - 1, len(singular))

    queries = activated.new_zeros(heads, 2, half, width)
    queries[:, 1, :rank] = right[:rank].view(rank, heads, width).transpose(0, 1)
    sub_keys = activated.new_zeros(2, size, half)
    sub_keys[1, :num_columns, :rank] = left[:, :rank] * singular[:rank]
    sub_keys[1, num_columns:, -1] = 1  # no query has this feature, or those that unused rows get below
    sub_keys[0, 2 * heads :, heads:] = torch.randn_like(sub_keys[0, 2 * heads :, heads:])
    for head in range(heads):
        queries[head, 0, head] = by_column[:, head].mean(0)
        sub_keys[0, 2 * head, head], sub_keys[0, 2 * head + 1, head] = 1, -1
    queries = F.normalize(queries, dim=-1)
    if router.norm_type != "rms":  # which normalizes both halves of queries and keys
        sub_keys[1] /= sub_keys[1].norm(dim=-1).mean()
        sub_keys[0] *= 10
        sub_keys *= FLATNESS
    else:
        router.query_norm.weight.fill_(FLATNESS)
    router.query_proj.weight.copy_(queries.flatten(0, 2))
    router.sub_keys.copy_(sub_keys)
