# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Algorithm 1 of the paper, one token, one head, one expert at a time."""

import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN

from modeling_peer.experts import expert_index


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def retrieve(config, router, x):
    """Algorithm 1 without product keys: for each head of one token all N scores, the best k, their weights."""
    half, size = config.query_size // 2, round(config.num_experts**0.5)
    query = router.query_proj.weight @ x
    if config.query_norm == "batch":
        norm = router.query_norm
        query = (query - norm.running_mean) / (norm.running_var + config.rms_norm_eps).sqrt() * norm.weight + norm.bias
    for head in range(config.num_retrieval_heads):
        keys = router.sub_keys[head if config.sub_keys_per_head else 0]
        halves = query.view(config.num_retrieval_heads, 2, half)[head]
        if config.query_norm == "rms":
            halves = rms_norm(halves, router.query_norm.weight, config.rms_norm_eps) / config.query_size**0.5
            keys = rms_norm(keys, router.key_norm.weight, config.rms_norm_eps)
        scores = {
            int(expert_index(torch.tensor(i), torch.tensor(j))): halves[0] @ keys[0, i] + halves[1] @ keys[1, j]
            for i in range(size)
            for j in range(size)
        }
        best = sorted(scores, key=lambda expert: -scores[expert].item())[: config.num_experts_per_head]
        scores = torch.stack([scores[expert] for expert in best])
        weights = {"softmax": F.softmax(scores, dim=0), "sigmoid": scores.sigmoid(), "relu": scores.relu()}
        yield best, weights[config.scoring_func]


def literal_peer(config, layer, hidden_states, pool=None):
    """One token, one head, one expert at a time."""
    pool = pool or layer.expert_pool
    activation = ACT2FN[config.expert_act] if config.expert_act else (lambda x: x)
    outputs = []
    for x in hidden_states.flatten(0, -2):
        output = 0
        for experts, weights in retrieve(config, layer.router, x):
            for expert, weight in zip(experts, weights, strict=True):
                neuron = pool.up_proj.weight[expert] @ x
                if config.gated_experts:
                    neuron = activation(pool.gate_proj.weight[expert] @ x) * neuron
                else:
                    neuron = activation(neuron)
                output = output + weight * neuron * pool.down_proj.weight[expert]
        if layer.shared_expert is not None:
            branch = layer.shared_expert
            gate = ACT2FN[config.hidden_act](branch.gate_proj.weight @ x)
            output = output + branch.down_proj.weight @ (gate * (branch.up_proj.weight @ x))
        outputs.append(output)
    return torch.stack(outputs).view_as(hidden_states)
