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
How large the last projection of a feed-forward variant starts, so that its output varies as a dense one's does.

The inputs of a feed-forward come from an RMSNorm, of unit variance; rows drawn with `initializer_range` make
pre-activations of standard deviation `initializer_range` √d in every variant. What is left to choose is the standard
deviation of the rows that come out.
"""

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from transformers.activations import ACT2FN

from .configuration_peer import PeerConfig


def activation_power(act_fn: Callable, config: PeerConfig, gated: bool) -> float:
    """Mean square of a neuron's output at initialization, times that of its gate where it has one."""
    std = config.initializer_range * config.hidden_size**0.5
    inputs = torch.linspace(-8, 8, 2001, device="cpu", dtype=torch.float64)
    density = torch.exp(-(inputs**2) / 2)
    power = (act_fn(inputs * std) ** 2 * density).sum() / density.sum()
    return float(power) * (std**2 if gated else 1.0)


def matched_std(config: PeerConfig, power: float) -> float:
    """
    Standard deviation of output rows that gives the output variance of the dense feed-forward.

    Args:
        power (`float`): expected sum over a token's active neurons of the square of what multiplies their row.
    """
    dense_power = config.intermediate_size * activation_power(ACT2FN[config.hidden_act], config, gated=True)
    return config.initializer_range * math.sqrt(dense_power / power)


def expert_std(config: PeerConfig, power: float) -> float:
    """Standard deviation of the rows of experts: `config.expert_initializer_range`, or what [`matched_std`] makes of `power`."""
    return matched_std(config, power) if config.expert_initializer_range is None else config.expert_initializer_range


def router_weight_power(config: PeerConfig) -> float:
    """Expected sum of squared router weights of a token, over the heads and experts of a `ProductKeyRouter`."""
    num_active = config.num_retrieval_heads * config.num_experts_per_head
    if config.scoring_func == "softmax":
        return num_active / config.num_experts_per_head**2
    # A retrieved expert's two sub-keys stand near the middle of the best √k ... 1 of √N, in scores of unit variance.
    middle_rank = (config.num_experts_per_head**0.5 + 1) / 2
    score = math.sqrt(2) * NormalDist().inv_cdf(1 - middle_rank / (config.num_experts**0.5 + 1))
    # At least the root mean square of a rectified score that nothing selected, for pools of a few experts.
    score = max(score, math.sqrt(0.5)) * initial_score_std(config)
    weight = score if config.scoring_func == "relu" else 1 / (1 + math.exp(-score))
    return num_active * weight**2


def initial_score_std(config: PeerConfig) -> float:
    """Standard deviation of the experts' scores at initialization: one where queries are normalized."""
    return 1.0 if config.query_norm is not None else config.initializer_range * config.hidden_size**0.5
