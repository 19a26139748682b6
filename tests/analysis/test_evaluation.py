# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Evaluation mode, and the speed of a frozen LM head in it."""

import pytest
import torch
from graft_models import base_model_of
from tiny_models import random_tokens
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_peer.analysis.evaluation import evaluation


class Products(TorchDispatchMode):
    """Notes which operators give logits."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.found = vocab_size, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if "mm" in str(func) and output.shape[-1] == self.vocab_size:
            self.found.add(func._opname)
        return output


def test_a_frozen_head_is_one_product_and_all_is_restored_after_an_error():
    model = base_model_of(dtype=torch.bfloat16).train().requires_grad_(False)
    model.model.layers[0].eval()
    with pytest.raises(KeyError), evaluation(model), Products(model.config.vocab_size) as products:
        model(input_ids=random_tokens(3, 9), logits_to_keep=2)
        assert not model.training and not torch.is_grad_enabled()
        raise KeyError
    assert products.found == {"mm"}
    assert not any(each.requires_grad for each in model.parameters())
    assert model.training and not model.model.layers[0].training
