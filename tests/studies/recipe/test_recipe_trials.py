# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What the recipe study tries beside flags: shared initialization, changes of the training, other feed-forwards."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import random_tokens, tiny_config, tiny_model
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from trainer_worker import counting_sequences, small_model, trainer_of

from modeling_peer import PeerForCausalLM, RowAdamW, expert_parameter_groups, model_costs
from modeling_peer.experts import expert_tables
from studies.recipe.trials import DecayMoments, apply_trial, share_initialization


def test_models_of_a_seed_share_what_they_have_in_common():
    """Made with other seeds: tables and keys too, if those are what two variants have in common."""
    kinds = [("dense", "dense"), ("dense", "peer"), ("dense", "peer")]
    models = [
        small_model(*kind, seed=seed, num_retrieval_heads=1 + seed % 2, expert_initializer_range=0.1)
        for seed, kind in enumerate(kinds)
    ]
    for model in models:
        share_initialization(model, 5)
    dense, one_head, two_heads = (model.state_dict() for model in models)
    for own, other, there in (
        (dense, one_head, "model.layers.1.self_attn.q_proj.weight"),
        (one_head, two_heads, "model.layers.1.mlp.expert_pool.down_proj.weight"),
        (one_head, two_heads, "model.layers.1.mlp.router.sub_keys"),
    ):
        shared = [name for name in own.keys() & other.keys() if own[name].shape == other[name].shape]
        assert there in shared and all(torch.equal(own[name], other[name]) for name in shared)
    assert len({float(value[0, 0]) for value in dense.values() if value.ndim == 2}) > 10
    before = dense["model.embed_tokens.weight"].clone()
    share_initialization(models[0], 6)
    assert not torch.equal(before, models[0].state_dict()["model.embed_tokens.weight"])
    assert before.std() == pytest.approx(0.1, rel=0.1)


def trained(folder, trial, steps=6, **options):
    """The trainer of a tiny model, and the rates of its groups and the norms of its gradients in each step."""
    model = small_model("dense", "peer")
    trainer = trainer_of(model, folder, counting_sequences(40), max_steps=steps, warmup_steps=2, **options)
    trainer.optimizer = RowAdamW(expert_parameter_groups(model, 1e-2, 0.0, 0.5, 8.0))
    apply_trial(trainer, **trial)
    seen = []
    step = trainer.optimizer.step

    def observed(*args, **kwargs):
        tables = [table.weight for table in expert_tables(model).values()]
        others = [each.grad for each in model.parameters() if not any(each is table for table in tables)]
        norms = [*(table.grad.norm() for table in tables), torch.cat([each.flatten() for each in others]).norm()]
        seen.append(([group["lr"] for group in trainer.optimizer.param_groups], torch.stack(norms)))
        return step(*args, **kwargs)

    trainer.optimizer.step = observed
    trainer.train()
    return trainer, seen


def test_tables_are_clipped_apart(tmp_path):
    _, together = trained(tmp_path / "together", {}, max_grad_norm=0.01)
    _, apart = trained(tmp_path / "apart", {"apart": True}, max_grad_norm=0.01)
    for _, norms in together:
        assert norms.norm() == pytest.approx(0.01, rel=1e-3)
    for _, norms in apart:
        torch.testing.assert_close(norms, torch.full_like(norms, 0.01), rtol=1e-3, atol=0.0)


def test_moments_decay_in_steps_that_do_not_touch_a_row():
    model = small_model("dense", "peer")
    optimizer = RowAdamW(expert_parameter_groups(model, 0.0))
    table = next(each.weight for name, each in expert_tables(model).items() if name.endswith("down_proj"))
    reference = torch.zeros_like(table), torch.zeros_like(table)
    callback = DecayMoments()
    for step in range(4):
        optimizer.zero_grad()
        tokens = random_tokens(1, 3, seed=step)
        model(tokens, labels=tokens).loss.backward()
        gradient = table.grad.to_rows() if hasattr(table.grad, "to_rows") else table.grad
        touched = gradient.ne(0).any(1)
        for moment, beta, new in zip(reference, (0.9, 0.999), (gradient, gradient**2), strict=True):
            moment.mul_(beta).add_(new, alpha=1 - beta)
        callback.on_pre_optimizer_step(None, SimpleNamespace(global_step=step), None, model, optimizer)
        optimizer.step()
        for name, moment in zip(("exp_avg", "exp_avg_sq"), reference, strict=True):
            torch.testing.assert_close(optimizer.state[table][name][touched], moment[touched], rtol=1e-4, atol=1e-10)
        assert (optimizer.state[table]["row_steps"][touched] == step + 1).all()


def test_the_gate_of_a_product_key_memory():
    layer = tiny_model(tiny_config("gated_pkm")).model.layers[0].mlp
    hidden_states = torch.randn(2, 5, 24)
    with torch.no_grad():
        memory = super(type(layer), layer).forward(hidden_states)
        gate = F.silu(hidden_states @ layer.gate_proj.weight.T)
        torch.testing.assert_close(layer(hidden_states), (memory * gate) @ layer.output_proj.weight.T)


def test_narrow_experts():
    layer = tiny_model(tiny_config("narrow_peer")).model.layers[0].mlp
    hidden_states = torch.randn(1, 5, 24)
    with torch.no_grad():
        indices, weights = layer.router(hidden_states)
        up, down = (
            table.weight[indices.flatten(-2)[0]] for table in (layer.expert_pool.up_proj, layer.expert_pool.down_proj)
        )
        narrow = hidden_states[0] @ layer.in_proj.weight.T
        neurons = F.gelu((up * narrow[:, None]).sum(-1)) * weights.flatten(-2)[0]
        expected = (neurons[..., None] * down).sum(1) @ layer.out_proj.weight.T
        torch.testing.assert_close(layer(hidden_states)[0], expected)
    assert layer.expert_pool.up_proj.weight.shape[1] == 12


@pytest.mark.parametrize(
    ("variant", "options"), [("gated_pkm", {}), ("narrow_peer", {}), ("narrow_peer", {"gated_experts": True})]
)
def test_costs_are_those_of_the_model(variant, options):
    config = tiny_config(
        "dense", variant, expert_kernels="eager", **options
    )  # torch counts nothing inside an operator
    model, costs = PeerForCausalLM(config).eval(), model_costs(config, 6)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(random_tokens(1, 6), use_cache=False)
    counted = counter.get_flop_counts()["PeerForCausalLM.model.layers.1.mlp"]
    assert sum(counted.values()) == 6 * costs.feed_forwards[1].flops
    assert sum(each.numel() for each in model.parameters()) == costs.total.parameters
