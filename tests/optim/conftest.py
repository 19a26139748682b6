# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What moves the rows of tables on a CPU."""

import pytest
import torch

from modeling_peer.optim import row_adamw


@pytest.fixture(params=["cpu", "torch"])
def path(request, monkeypatch):
    """The compiled kernel or torch operations, these in several chunks."""
    if request.param == "torch":
        monkeypatch.setattr(row_adamw.cpu, "can_update", lambda *tensors: False)
        monkeypatch.setattr(row_adamw, "CHUNK_ELEMENTS", 100)
    else:
        assert row_adamw.cpu.can_update(torch.empty(1, 1), torch.empty(1, 1))
    return request.param
