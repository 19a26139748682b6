# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Training on the kernels in Triton, in its interpreter: a model with all of them, against torch operations."""

import pytest
import torch
from table_gradients import tables_of
from tiny_models import random_tokens, tiny_config, tiny_model
from torch.nn.utils import clip_grad_norm_

from modeling_peer import RowAdamW, expert_parameter_groups
from modeling_peer.ops.factored_gradient import FactoredGradient
from modeling_peer.optim import row_adamw


pytestmark = pytest.mark.interpreted


def trained(kernels):
    """Loss, norm of the gradient and norm of the experts' alone of two steps, and the model after them."""
    model = tiny_model(tiny_config("peer", "pkm", expert_kernels="torch", num_retrieval_heads=1)).train()
    model.config.expert_kernels = kernels
    # With a smaller eps, Adam turns the rounding of a vanishing gradient into a step of full size.
    optimizer = RowAdamW(expert_parameter_groups(model, learning_rate=0.02, weight_decay=0.1), eps=1e-4)
    history = []
    for step in range(2):
        for part in range(2):  # accumulated
            tokens = random_tokens(1, 4, seed=2 * step + part)
            loss = model(tokens, labels=tokens).loss
            loss.backward()
        gradients = [table.grad for table in tables_of(model).values()]
        assert {isinstance(gradient, FactoredGradient) for gradient in gradients} == {kernels == "triton"}
        norms = [gradient.norm() for gradient in gradients]
        history.append([loss.detach(), clip_grad_norm_(model.parameters(), 0.5), *norms])
        optimizer.step()
        optimizer.zero_grad()
    return history, model.state_dict()


def test_trains_as_torch_operations_do(monkeypatch):
    monkeypatch.setattr(row_adamw.cpu, "can_update", lambda *tensors: False)
    steps, update = [], row_adamw.triton.update_by_factors
    monkeypatch.setattr(row_adamw.triton, "update_by_factors", lambda *args: steps.append(1) or update(*args))
    history, model = trained("triton")
    assert len(steps) == 2 * 3  # of three tables
    monkeypatch.setattr(row_adamw.triton, "can_update", lambda *tensors: False)
    expected_history, expected = trained("torch")
    torch.testing.assert_close(history, expected_history, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(model, expected, rtol=1e-3, atol=1e-3)
