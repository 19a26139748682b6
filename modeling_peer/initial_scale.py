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
Initial scale of the last projection of each feed-forward variant, such that its output has the variance of a dense
one.

The inputs of a feed-forward come from an RMSNorm and have unit variance, and vectors drawn with `initializer_range`
give pre-activations of standard deviation `initializer_range` √d in every variant. What remains to choose is the
standard deviation of the down-projection vectors.
"""

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from transformers.activations import ACT2FN

from .configuration_peer import PeerConfig


def activation_power(act_fn: Callable, config: PeerConfig, gated: bool) -> float:
    """Mean square of the activation of a neuron at initialization, times that of its gate if it is `gated`."""
    std = config.initializer_range * config.hidden_size**0.5
    inputs = torch.linspace(-8, 8, 2001, device="cpu", dtype=torch.float64)
    density = torch.exp(-(inputs**2) / 2)
    power = (act_fn(inputs * std) ** 2 * density).sum() / density.sum()
    return float(power) * (std**2 if gated else 1.0)


def matched_std(config: PeerConfig, power: float) -> float:
    """
    Standard deviation of down-projection vectors that gives the output variance of the dense feed-forward.

    Args:
        config (`PeerConfig`)
        power (`float`):
            Expected sum, over the active neurons of a token, of the square of the factor of their down-projection
            vector.
    """
    dense_power = config.intermediate_size * activation_power(ACT2FN[config.hidden_act], config, gated=True)
    return config.initializer_range * math.sqrt(dense_power / power)


def expert_std(config: PeerConfig, power: float) -> float:
    """Standard deviation of the vectors v_i of experts: `config.expert_initializer_range`, or else [`matched_std`]."""
    return matched_std(config, power) if config.expert_initializer_range is None else config.expert_initializer_range


def router_weight_power(config: PeerConfig) -> float:
    """Expected sum of the squared router weights of a token, over all heads and experts of a `ProductKeyRouter`."""
    num_active = config.num_retrieval_heads * config.num_experts_per_head
    if config.scoring_func == "softmax":
        return num_active / config.num_experts_per_head**2
    # The two sub-keys of a retrieved expert rank near the middle of the best √k of √N, with scores of unit variance.
    middle_rank = (config.num_experts_per_head**0.5 + 1) / 2
    score = math.sqrt(2) * NormalDist().inv_cdf(1 - middle_rank / (config.num_experts**0.5 + 1))
    # At least the root mean square of a rectified score without selection, for pools of a few experts.
    score = max(score, math.sqrt(0.5)) * initial_score_std(config)
    weight = score if config.scoring_func == "relu" else 1 / (1 + math.exp(-score))
    return num_active * weight**2


def initial_score_std(config: PeerConfig) -> float:
    """Standard deviation of the scores of experts at initialization: one if queries are normalized."""
    return 1.0 if config.query_norm is not None else config.initializer_range * config.hidden_size**0.5
