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
That the host never waits for a GPU: a step of training runs on tensors without values, where every look at one fails.
"""

import platform

import pytest
import torch
from tiny_models import tiny_config
from torch.nn.utils import clip_grad_norm_
from triton_compiler import recorded_launches

from modeling_peer import PeerForCausalLM, RowAdamW, expert_kernels_triton, expert_parameter_groups
from modeling_peer.expert_kernels_triton import TritonKernels
from modeling_peer.factored_gradient import FactoredGradient
from modeling_peer.key_grid import winning_pairs
from modeling_peer.optim import row_adamw_triton


# Where its wheels are, Triton is a part of the test environment, and its absence a failure.
pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Triton is for Linux, on x86-64."
)


@pytest.fixture
def kernels_on_meta(monkeypatch):
    for module in (expert_kernels_triton, row_adamw_triton):
        monkeypatch.setattr(module, "can_run_on", lambda device: device.type == "meta")


def test_a_step_of_training(kernels_on_meta):
    model = PeerForCausalLM(tiny_config("peer", "pkm", expert_kernels="triton")).to("meta").train()
    optimizer = RowAdamW(expert_parameter_groups(model, learning_rate=0.1))
    tokens = torch.zeros(2, 5, dtype=torch.int64, device="meta")

    def step():
        for _ in range(2):
            model(tokens, labels=tokens).loss.backward()
        assert any(isinstance(parameter.grad, FactoredGradient) for parameter in model.parameters())
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    names = {kernel.__name__ for kernel, *_ in recorded_launches(step)}
    assert names >= {"_up", "_down", "_sum_chunk", "_squared_norm", "_step_row"}


def test_retrieval():
    """By itself: of an operator, tensors without values see the shapes of what it returns alone."""
    queries, sub_keys = torch.empty(9, 2, 2, 8, device="meta"), torch.empty(2, 2, 30, 8, device="meta")

    def run():
        indices, scores = TritonKernels.retrieve(queries, sub_keys, 4)
        TritonKernels.retrieval_gradients(scores, indices, queries, sub_keys)

    names = {kernel.__name__ for kernel, *_ in recorded_launches(run)}
    assert names == {"_score", "_select", "_select_pairs", "_sum_chunk", "_row_gradient"}


def test_dense_gradients_of_halves():
    hidden, table = torch.empty(9, 24, device="meta"), torch.empty(12, 24, device="meta")
    indices = torch.empty(9, 7, dtype=torch.int64, device="meta")

    def run():
        rows, starts, order = TritonKernels.group(indices.flatten(), 12)
        TritonKernels.row_gradient(torch.empty(63, device="meta"), order // 7, starts, hidden, table, rows)

    assert [kernel.__name__ for kernel, *_ in recorded_launches(run)] == ["_sum_chunk", "_row_gradient"]


def test_pairs_are_copied_to_a_device_once():
    assert winning_pairs(16, torch.device("cpu")) is winning_pairs(16, torch.device("cpu"))


def test_pairs_that_inference_copied_can_be_trained_with():
    with torch.inference_mode():
        pairs = winning_pairs(13, torch.device("cpu"))
    assert not any(each.is_inference() for each in pairs)
    assert winning_pairs(13, torch.device("cpu")) is pairs
