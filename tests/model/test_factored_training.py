# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Models whose optimizer takes gradients in factors have those of the literal experts, however they run."""

import pytest
import torch
from graft_models import FAMILIES_AND_PLACEMENTS, PLACEMENTS, base_model_of, grafted
from peft import LoraConfig, get_peft_model
from release_names import enable_checkpointing
from table_gradients import DenseRowAdamW, dense, optimizer_of, tables_of
from tiny_models import EXPERTS, GROWN, VARIANTS, let_added_experts_speak, random_tokens, tiny_config, tiny_model
from torch.testing import assert_close

from modeling_peer import RowAdamW, add_experts
from modeling_peer.ops.factored_gradient import FactoredGradient


EXACT = {"rtol": 1e-12, "atol": 1e-14}

# Transformers has no experts of MoE layers in float64.
CONFIGS = {name: VARIANTS[name] for name in ("peer", "pkm", "tied_embeddings")} | GROWN | EXPERTS
CONFIGS["both"] = tiny_config("peer", "pkm", "dense", "peer")


def set_kernels(model, name):
    for module in model.modules():
        if hasattr(type(module), "expert_table_names"):
            module.config.expert_kernels = name


def gradients_of(model):
    """The loss, and the gradients of two backwards as they are."""
    model.zero_grad()
    for tokens in (random_tokens(3, 9), random_tokens(2, 9, seed=2)):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, **tolerances):
    found, expected = ({name: dense(each) for name, each in gradients.items()} for gradients in (found, expected))
    assert_close(found, expected, **(EXACT | tolerances))


def assert_those_of_literal_experts(model, **tolerances):
    """For all kernels, of a model in float64 whose optimizer is made here: tables have factors, all else has none."""
    model.train()
    set_kernels(model, "eager")
    expected_loss, expected = gradients_of(model)
    optimizer = optimizer_of(model)
    trained = {name for name, table in tables_of(model).items() if table.requires_grad}
    rows = {id(table) for group in optimizer.param_groups if group["rows"] for table in group["params"]}
    assert rows == {id(model.get_parameter(name)) for name in trained}
    for kernels in ("auto", "cpu", "torch", "eager"):
        set_kernels(model, kernels)
        loss, found = gradients_of(model)
        assert_close(loss, expected_loss, **EXACT)
        in_factors = {name for name, gradient in found.items() if isinstance(gradient, FactoredGradient)}
        assert in_factors == (set() if kernels in ("torch", "eager") else trained)
        assert_same(found, expected, **tolerances)


class TestEqualLiteralExperts:
    @pytest.mark.parametrize("config", [pytest.param(c, id=name) for name, c in CONFIGS.items()])
    def test_of_every_variant(self, config):
        assert_those_of_literal_experts(tiny_model(config).double())

    def test_of_a_model_that_grew(self):
        model = tiny_model(tiny_config("peer", "dense", "peer"))
        add_experts(model, 13, mode="open")
        add_experts(model, 25, mode="protected")
        let_added_experts_speak(model)
        assert_those_of_literal_experts(model.double())

    @pytest.mark.parametrize("family, placement", FAMILIES_AND_PLACEMENTS)
    def test_of_grafts(self, family, placement):
        model = grafted(base_model_of(family, dtype=torch.float64), **PLACEMENTS[placement]).double()
        assert_those_of_literal_experts(model, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize(
        "targets",
        [
            {"target_modules": ["query_proj"], "modules_to_save": ["expert_pool"]},
            {"target_parameters": ["expert_pool.up_proj.weight", "expert_pool.down_proj.weight"]},
            {"target_modules": ["q_proj"], "target_parameters": ["expert_pool.down_proj.weight"]},
        ],
        ids=["pool saved", "both tables", "one table"],
    )
    def test_of_adapters(self, targets):
        torch.manual_seed(0)
        config = LoraConfig(r=4, init_lora_weights=False, **targets)
        assert_those_of_literal_experts(get_peft_model(tiny_model(tiny_config("peer", "peer")), config).double())

    def test_of_one_table_that_is_trained(self):
        model = tiny_model(tiny_config("peer", "peer", gated_experts=True)).double()
        model.model.layers[0].mlp.expert_pool.up_proj.weight.requires_grad_(False)
        model.model.layers[1].mlp.expert_pool.down_proj.weight.requires_grad_(False)
        assert_those_of_literal_experts(model)


@pytest.mark.parametrize("options", [{"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_activation_checkpointing(options):
    model = tiny_model(tiny_config("peer", "pkm", "peer", share_experts_across_layers=True)).double().train()
    _optimizer = optimizer_of(model)
    expected_loss, expected = gradients_of(model)
    enable_checkpointing(model, options)
    loss, found = gradients_of(model)
    assert_close(loss, expected_loss, **EXACT)
    assert {name for name, each in found.items() if isinstance(each, FactoredGradient)} == tables_of(model).keys()
    assert_same(found, expected)


def test_autocast(kernels="cpu"):
    """Gradients in factors are the dense ones, of float32, and near those of the literal experts."""
    model = tiny_model(tiny_config("peer", "pkm", gated_experts=True, expert_kernels=kernels)).train()
    found = []
    for optimizer_class, name in ((RowAdamW, kernels), (DenseRowAdamW, kernels), (DenseRowAdamW, "eager")):
        model.config.expert_kernels = name
        optimizer = optimizer_of(model, optimizer_class)
        with torch.autocast("cpu", torch.bfloat16):
            _, gradients = gradients_of(model)
        assert {type(gradients[name]) is FactoredGradient for name in tables_of(model)} == {
            optimizer_class is RowAdamW
        }
        found.append({name: dense(gradient) for name, gradient in gradients.items()})
        del optimizer
    assert {gradient.dtype for gradient in found[0].values()} == {torch.float32}
    assert_same(found[0], found[1], rtol=1e-6, atol=1e-8)
    # Experts that bfloat16 ranks otherwise make some of a difference.
    literal, difference = (
        torch.stack([(found[2][name] - sign * gradient).square().sum() for name, gradient in found[0].items()]).sum()
        for sign in (0, 1)
    )
    assert difference < 0.1 * literal
