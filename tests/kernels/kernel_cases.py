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
"""Random tokens and experts for the tests of kernels."""

import torch


IMPLEMENTATIONS = ["torch", "cpu"]


def experts(num_tokens, active, width, num_experts, dtype, seed=0):
    """hidden states, weights, indices, table"""
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(num_tokens, width, generator=generator).to(dtype)
    weights = torch.randn(num_tokens, active, generator=generator).to(dtype)
    indices = torch.randint(num_experts, (num_tokens, active), generator=generator)
    return hidden_states, weights, indices, torch.randn(num_experts, width, generator=generator).to(dtype)
