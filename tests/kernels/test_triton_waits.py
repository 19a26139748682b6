# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
That the host never waits for a GPU: a step of training runs on tensors without values, where every look at one fails.
"""

import pytest
import torch
from kernel_cases import needs_triton
from tiny_models import tiny_config
from torch.nn.utils import clip_grad_norm_
from triton_compiler import recorded_launches

from modeling_peer import PeerForCausalLM, RowAdamW, expert_parameter_groups
from modeling_peer.ops import kernels_triton, retrieval_triton
from modeling_peer.ops.factored_gradient import FactoredGradient
from modeling_peer.ops.kernels_triton import TritonKernels
from modeling_peer.optim import row_adamw_triton


pytestmark = needs_triton


@pytest.fixture
def kernels_on_meta(monkeypatch):
    for module in (kernels_triton, row_adamw_triton):
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


def test_pairs_are_copied_to_a_device_once():
    with torch.inference_mode():
        pairs = retrieval_triton._pairs(13, torch.device("cpu"))
    assert not any(each.is_inference() for each in pairs)
    assert retrieval_triton._pairs(13, torch.device("cpu")) is pairs
