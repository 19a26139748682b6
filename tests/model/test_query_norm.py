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
"""The query BatchNorm against torch's, and what must not move its statistics."""

import pytest
import torch
from release_names import CACHE, enable_checkpointing
from tiny_models import VARIANTS, random_tokens, tiny_model
from torch import nn

from modeling_peer.query_norm import QueryBatchNorm


def statistics(norm):
    return torch.stack([norm.running_mean, norm.running_var])


def test_training_equals_torchs_batch_norm_on_the_tokens():
    """Outputs, gradients through the moments, and running statistics, in float64."""
    torch.manual_seed(0)
    ours, theirs = QueryBatchNorm(6).double(), nn.BatchNorm1d(6).double()
    for norm in (ours, theirs):
        nn.init.constant_(norm.weight, 1.3)
        nn.init.constant_(norm.bias, -0.2)
    mask = torch.rand(4, 7) > 0.3
    queries = (3 + 2 * torch.randn(4, 7, 6, dtype=torch.float64)).requires_grad_()
    direction = torch.randn(int(mask.sum()), 6, dtype=torch.float64)
    results = []
    for norm, outputs in ((ours, ours(queries, mask)[mask]), (theirs, theirs(queries[mask]))):
        results.append([outputs, *torch.autograd.grad(outputs, [queries, norm.weight, norm.bias], direction)])
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-12)
    ours.fold_moments()
    assert torch.allclose(statistics(ours), statistics(theirs), rtol=1e-10)
    assert torch.allclose(ours.eval()(queries[mask]), theirs.eval()(queries[mask]))


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_too_few_tokens_for_a_variance_teach_nothing(num_tokens):
    norm = QueryBatchNorm(6)
    before = statistics(norm).clone()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask.view(-1)[:num_tokens] = True
    norm(torch.randn(2, 5, 6), mask)
    norm.fold_moments()
    assert torch.equal(statistics(norm), before)


def model_and_norm():
    model = tiny_model(VARIANTS["peer"]).train()
    norm = model.model.layers[0].mlp.router.query_norm
    return model, norm, statistics(norm).clone()


def test_a_forward_without_gradients_teaches_nothing():
    model, norm, before = model_and_norm()
    tokens = random_tokens(3, 8)
    with torch.no_grad():
        logits = model(tokens).logits
    assert torch.equal(statistics(norm), before)
    assert torch.equal(logits, model.eval()(tokens).logits)


def test_a_frozen_norm_keeps_what_it_had_when_it_was_frozen():
    model, norm, before = model_and_norm()
    tokens = random_tokens(3, 8)
    enable_checkpointing(model)
    model(tokens, labels=tokens).loss.backward()  # the recomputation leaves moments behind
    after = statistics(norm).clone()
    assert not torch.equal(after, before)
    norm.requires_grad_(False)
    model(tokens, labels=tokens).loss.backward()
    assert torch.equal(statistics(norm), after)


def test_of_a_mask_of_past_and_present_the_present_counts():
    """A chunk after a cached prompt, in training: the mask covers both."""
    tokens = random_tokens(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = mask[1, 8:] = 0
    results = []
    for masks in ({"attention_mask": mask}, {"attention_mask": mask, "padding_mask": mask[:, 6:]}):
        model, norm, _ = model_and_norm()
        with torch.no_grad():
            cache = model(tokens[:, :6], attention_mask=mask[:, :6], use_cache=True)[CACHE]
        model(tokens[:, 6:], **{CACHE: cache}, use_cache=True, **masks)
        results.append(statistics(norm))
    assert torch.equal(*results)


def test_a_mask_shorter_than_the_inputs_is_refused():
    model, *_ = model_and_norm()
    with pytest.raises(ValueError, match="`attention_mask` must cover past and present tokens, at least 8"):
        model(random_tokens(2, 8), attention_mask=torch.ones(2, 5, dtype=torch.long))
