# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The query BatchNorm: its moments and running statistics, and which forward passes move them."""

import copy

import pytest
import torch
from release_names import enable_checkpointing
from tiny_models import VARIANTS, random_tokens, tiny_model
from torch import nn
from torch.distributed.utils import _apply_to_tensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from modeling_peer import freeze_query_norm, make_split_model
from modeling_peer.router import QueryBatchNorm


def statistics(norm):
    return torch.stack([norm.running_mean, norm.running_var])


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("present", [0.7, 1.0], ids=["padding", "no_padding"])
def test_training_equals_torchs_batch_norm_on_the_tokens(present):
    """Outputs, gradients through the moments, and running statistics, in float64."""
    torch.manual_seed(0)
    ours, theirs = QueryBatchNorm(6).double(), nn.BatchNorm1d(6).double()
    for norm in (ours, theirs):
        nn.init.constant_(norm.weight, 1.3)
        nn.init.constant_(norm.bias, -0.2)
    mask = torch.rand(4, 7) < present
    queries = (3 + 2 * torch.randn(4, 7, 6, dtype=torch.float64)).requires_grad_()
    direction = torch.randn(int(mask.sum()), 6, dtype=torch.float64)
    results = []
    for norm, outputs in ((ours, ours(queries, mask)[mask]), (theirs, theirs(queries[mask]))):
        results.append([outputs, *torch.autograd.grad(outputs, [queries, norm.weight, norm.bias], direction)])
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(statistics(ours), statistics(theirs), rtol=1e-10)
    assert ours.num_batches_tracked == 1
    assert torch.allclose(ours.eval()(queries[mask]), theirs.eval()(queries[mask]))


@pytest.mark.parametrize("mask", [None, torch.bool, torch.int64], ids=str)
def test_a_batch_without_padding(mask):
    """In float32, where the mean is large; whether a mask says that there is no padding, or none is given."""
    torch.manual_seed(0)
    norm, in_float64 = QueryBatchNorm(24), nn.BatchNorm1d(24).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    in_float64.load_state_dict(norm.state_dict())
    queries, direction = (10 + torch.randn(4, 50, 24)).requires_grad_(), torch.randn(4, 50, 24)
    outputs = norm(queries, None if mask is None else torch.ones(4, 50, dtype=mask))
    found = torch.autograd.grad(outputs, [queries, norm.weight, norm.bias], direction)
    exact = queries.detach().double().requires_grad_()
    expected = in_float64(exact.flatten(0, 1)).view_as(exact)
    gradients = torch.autograd.grad(expected, [exact, in_float64.weight, in_float64.bias], direction.double())
    for actual, reference in zip((outputs, *found), (expected, *gradients), strict=True):
        torch.testing.assert_close(actual.double(), reference, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.running_mean.double(), in_float64.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), in_float64.running_var, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("first_in_training", [True, False])
@pytest.mark.parametrize("second_is_masked", [True, False])
def test_a_forward_before_the_backward_of_another_changes_nothing_of_it(first_in_training, second_is_masked):
    """As of two batches in one loss."""
    torch.manual_seed(0)
    queries, mask = torch.randn(2, 4, 7, 6, requires_grad=True), torch.arange(7).expand(4, 7) < 5
    found = []
    for has_second in (False, True):
        norm = QueryBatchNorm(6).train(first_in_training)
        outputs = norm(3 * queries[0])
        if has_second:
            norm.train()(queries[1], mask if second_is_masked else None)
        found.append(torch.autograd.grad(outputs.square().sum(), queries)[0])
    assert torch.equal(*found)


class OperatorNames(TorchDispatchMode):
    """The names of the operators that ran."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_on_a_gpu_it_is_torchs_batch_norm_without_a_mask_and_reads_none():
    """On tensors without values, in place of those of a GPU: a look at one fails."""
    norm, queries = QueryBatchNorm(6).to("meta"), torch.randn(4, 7, 6, device="meta", requires_grad=True)
    used = []
    for mask in (None, torch.ones(4, 7, dtype=torch.bool, device="meta")):
        with OperatorNames() as operators:
            norm(queries, mask).sum().backward()
        used.append("native_batch_norm" in operators.names)
    assert used == [True, False]


def test_padding_that_is_far_away_changes_nothing():
    """The same tokens with padding, in float32: another computation, with the same result."""
    torch.manual_seed(0)
    alone, padded = QueryBatchNorm(24), QueryBatchNorm(24)
    queries, mask = torch.randn(3, 20, 24), torch.arange(25) < 20
    longer = torch.cat([queries, torch.full((3, 5, 24), torch.nan)], dim=1)
    found = padded(longer, mask.expand(3, -1))[:, :20]
    torch.testing.assert_close(found, alone(queries), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics(padded), statistics(alone))


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_too_few_tokens_for_a_variance_leave_the_statistics(num_tokens):
    norm = QueryBatchNorm(6)
    before = statistics(norm).clone()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask.view(-1)[:num_tokens] = True
    for queries, padding_mask in ((torch.randn(2, 5, 6), mask), (torch.randn(1, num_tokens, 6), None)):
        norm(queries, padding_mask)
        assert torch.equal(statistics(norm), before)


@pytest.mark.parametrize("variant", ["peer", "pkm", "moe_expert_choice", "all_in_one"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not_reentrant", "reentrant"])
def test_activation_checkpointing_changes_nothing(variant, use_reentrant):
    """
    Layers run twice, and a forward without gradients comes between: gradients and running statistics are those of
    layers that run once, with the moments of their batch, of one with padding too.
    """
    plain = tiny_model(VARIANTS[variant]).train()
    checkpointed = copy.deepcopy(plain)
    enable_checkpointing(checkpointed, {"use_reentrant": use_reentrant})
    tokens, others = random_tokens(3, 8), random_tokens(2, 8, seed=2)
    for model in (plain, checkpointed):
        if use_reentrant:
            model.enable_input_require_grads()
        for attention_mask in (None, (torch.arange(8) < 6).long().expand_as(tokens)):
            loss = model(tokens, attention_mask=attention_mask, labels=tokens).loss
            with torch.no_grad():
                model(others)
            loss.backward()
    torch.testing.assert_close(gradients(checkpointed), gradients(plain))
    torch.testing.assert_close([*checkpointed.buffers()], [*plain.buffers()], rtol=0, atol=0)


def test_layers_whose_arguments_fsdp_copies_learn_once():
    """As it does where it computes in another dtype."""
    model, tokens = tiny_model(VARIANTS["peer"]).train(), random_tokens(3, 8)
    enable_checkpointing(model)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: (args, _apply_to_tensors(lambda tensor: tensor, kwargs)), with_kwargs=True
        )
    norm = model.model.layers[0].mlp.router.query_norm
    before = norm.num_batches_tracked.item()
    model(tokens, labels=tokens).loss.backward()
    assert norm.num_batches_tracked == before + 1


def test_the_statistics_rest_without_gradients_and_when_frozen():
    model = tiny_model(VARIANTS["peer"])
    tokens, norm = random_tokens(3, 8), model.model.layers[0].mlp.router.query_norm
    before = statistics(norm)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, model.train()(tokens).logits)
    assert torch.equal(statistics(norm), before)
    enable_checkpointing(model)
    model(tokens, labels=tokens).loss.backward()
    after = statistics(norm)
    assert not torch.equal(after, before)
    norm.requires_grad_(False)
    model(tokens, labels=tokens).loss.backward()
    assert torch.equal(statistics(norm), after)


@pytest.mark.parametrize("variant", ["peer", "pkm", "all_in_one"])
def test_a_model_with_frozen_norms_trains_as_it_evaluates(variant):
    """Outputs are the same, and all parameters learn but those of the norms."""
    model = tiny_model(VARIANTS[variant])
    freeze_query_norm(model)
    buffers = [buffer.clone() for buffer in model.buffers()]
    tokens = random_tokens(3, 8, seed=2)
    output = model.train()(tokens, labels=tokens)
    output.loss.backward()
    torch.testing.assert_close(output.logits, model.eval()(tokens).logits, rtol=0, atol=0)
    torch.testing.assert_close([*model.buffers()], buffers, rtol=0, atol=0)
    names = {name for name, _ in model.named_parameters()}
    assert names - set(gradients(model)) == {name for name in names if "query_norm" in name} != set()


def test_a_loaded_model_says_how_it_normalizes_when_its_training_begins(tmp_path, monkeypatch):
    """As a reference beside it does not. A new model has none, whose queries are to be normalized by their batch."""
    said = []
    monkeypatch.setattr("modeling_peer.optim.query_norm.logger.warning_once", said.append)
    model = tiny_model(VARIANTS["peer"])
    model.train()
    make_split_model(type(model), model.config)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert not said
    loaded.train()
    assert said and all("freeze_query_norm(model)" in each for each in said)
    said.clear()
    freeze_query_norm(loaded)
    loaded.eval().train()
    assert not said and loaded.training and loaded.model.layers[0].training


@pytest.mark.parametrize("variant", ["peer", "pkm", "all_in_one"])
def test_activation_checkpointing_of_the_whole_model_has_the_same_gradients(variant):
    plain = tiny_model(VARIANTS[variant]).train()
    checkpointed, tokens = copy.deepcopy(plain), random_tokens(3, 8)
    plain(tokens, labels=tokens).loss.backward()
    checkpoint(lambda tokens: checkpointed(tokens, labels=tokens).loss, tokens, use_reentrant=False).backward()
    torch.testing.assert_close(gradients(checkpointed), gradients(plain))
