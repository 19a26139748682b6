# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Compiled models are trained as others are: in one graph with dense gradients of the tables, and with breaks around the
experts while an optimizer takes the gradients in factors.
"""

import gc

import pytest
import torch
from release_names import enable_checkpointing
from slow_tests import slow
from table_gradients import DenseRowAdamW, dense, model_of, optimizer_of, tables_of
from tiny_models import GROWN, random_tokens, tiny_config, tiny_model
from torch._dynamo.utils import counters
from torch.testing import assert_close

from modeling_peer import RowAdamW
from modeling_peer.ops.factored_gradient import FactoredGradient


EXACT = {"rtol": 1e-10, "atol": 1e-12}

TOKENS = random_tokens(3, 9), random_tokens(3, 9, seed=2)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model, **options):
    return torch.compile(model, **({"fullgraph": True, "backend": "aot_eager"} | options))


def loss_of(run, tokens=TOKENS[0]):
    return run(input_ids=tokens, labels=tokens, use_cache=False).loss


def gradients_of(model, run):
    """After two backwards."""
    model.zero_grad()
    for tokens in TOKENS:
        loss_of(run, tokens).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def come_in_factors(model, run) -> set[bool]:
    """Of the gradients of the tables, which are in factors. They are those of a model that is not compiled."""
    with torch.compiler.set_stance("force_eager"):
        expected = gradients_of(model, model)
    found = gradients_of(model, run)
    assert_close(
        *({name: dense(each) for name, each in gradients.items()} for gradients in (found, expected)), **EXACT
    )
    return {isinstance(found[name], FactoredGradient) for name in tables_of(model) if name in found}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(tiny_config("peer", "pkm", gated_experts=True), id="peer and pkm"),
        pytest.param(tiny_config("peer", "peer", share_experts_across_layers=True), id="one pool", marks=slow),
        pytest.param(GROWN["grown"], id="grown", marks=slow),
    ],
)
def test_dense_gradients_come_from_one_graph(config):
    """And nothing is compiled anew for further steps."""
    model = tiny_model(config).double().train()
    run = compiled(model)
    for _ in range(2):
        assert come_in_factors(model, run) == {False}
        assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("optimizer_class", "gated"),
    [(RowAdamW, False), pytest.param(RowAdamW, True, marks=slow), (DenseRowAdamW, False)],
)
def test_factors_come_with_graph_breaks(optimizer_class, gated):
    """And none for another optimizer."""
    model = model_of("peer", "pkm", gated_experts=gated)
    _optimizer = optimizer_of(model, optimizer_class)
    assert come_in_factors(model, compiled(model, fullgraph=False)) == {optimizer_class is RowAdamW}


def test_optimizers_that_come_after_a_graph():
    """Gradients are right whoever takes them, and in factors where a graph was compiled with their optimizer."""
    model = model_of()
    for layer in model.model.layers:  # the feed-forwards alone, which takes less time
        layer.mlp.compile(backend="aot_eager")
    assert come_in_factors(model, model) == {False}
    optimizer = optimizer_of(model)
    come_in_factors(model, model)
    torch._dynamo.reset()
    assert come_in_factors(model, model) == {True}
    del optimizer
    gc.collect()
    assert come_in_factors(model, model) == {False}


@slow
@pytest.mark.parametrize("options", [{"use_reentrant": False}, {"use_reentrant": True}], ids=str)
@pytest.mark.parametrize("optimizer_class", [RowAdamW, DenseRowAdamW])
def test_activation_checkpointing(options, optimizer_class):
    model = model_of("peer", "pkm", "peer", share_experts_across_layers=True, query_norm="rms")
    _optimizer = optimizer_of(model, optimizer_class)
    enable_checkpointing(model, options)
    assert come_in_factors(model, compiled(model, fullgraph=False)) == {optimizer_class is RowAdamW}


@slow
def test_autocast():
    found = []
    for compiles in (False, True):
        model = tiny_model(tiny_config("peer", "pkm", gated_experts=True)).train()
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients_of(model, compiled(model) if compiles else model))
    for name in tables_of(model):
        expected = dense(found[0][name])
        assert (dense(found[1][name]) - expected).norm() < 0.02 * expected.norm()  # bfloat16 is rounded otherwise


def test_inference_is_one_graph():
    model = model_of()
    _optimizer = optimizer_of(model)
    with torch.no_grad():
        assert_close(compiled(model)(TOKENS[0]).logits, model(TOKENS[0]).logits)
    assert counters["stats"]["unique_graphs"] == 1
