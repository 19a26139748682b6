# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
PEFT's adapters and TRL's trainers on PEER models: adapters of every part train, save, load and merge; batches without
padding train as padded ones; a policy starts as its reference.
"""

import copy

import pytest
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from sft import TRL_OPTIONS, logits_of, preferences, save_tokenizer, sft_trainer
from torch.testing import assert_close
from trainer_worker import (
    copy_of_state,
    counting_sequences,
    logged,
    pad_right,
    query_batch_norms,
    small_model,
    train,
    trainer_of,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from modeling_peer import PeerForCausalLM, freeze_query_norm
from modeling_peer.experts import expert_tables, plain_weight


TABLES = ["expert_pool.up_proj.weight", "expert_pool.down_proj.weight"]

# What most recipes name: tables of experts, too.
USUAL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

ADAPTERS = {
    "queries": {"target_modules": ["query_proj"]},
    "usual": {"target_modules": USUAL},
    "parameters": {"target_modules": "all-linear", "target_parameters": TABLES},
    "norm_saved": {"target_modules": ["q_proj", "query_proj"], "modules_to_save": ["query_norm"]},
    "experts_saved": {"target_modules": ["q_proj"], "modules_to_save": ["router", "expert_pool"]},
}


def adapted(adapter, **fields):
    model = small_model(**fields)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **adapter))


def state_of_base(peft_model):
    """The state that was there before the adapter, under the names it had."""
    return {
        name.replace("base_layer.", "").replace("original_module.", ""): tensor
        for name, tensor in peft_model.get_base_model().state_dict().items()
        if "lora_" not in name and "modules_to_save" not in name
    }


class TestAdapters:
    @pytest.mark.parametrize("query_norm", ["batch", "rms"])
    @pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
    def test_trains_saves_loads_and_merges(self, tmp_path, adapter, query_norm):
        base = small_model(query_norm=query_norm)
        before, logits_before = copy_of_state(base), logits_of(base)
        model = adapted(adapter, query_norm=query_norm)
        trainer = trainer_of(model, tmp_path, max_steps=20, learning_rate=5e-2)
        loss = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < 0.99 * loss
        logits = logits_of(model)
        assert (logits - logits_before).abs().max() > 0.1

        assert_close(state_of_base(model), before, rtol=0, atol=0)
        with model.disable_adapter():
            assert_close(logits_of(model), logits_before, rtol=1e-5, atol=1e-5)

        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert_close(logits_of(loaded), logits, rtol=0, atol=0)

        merged = loaded.merge_and_unload()
        assert all(plain_weight(table) is not None for table in expert_tables(merged).values())
        assert_close(logits_of(merged), logits, rtol=1e-4, atol=1e-5)
        merged.save_pretrained(tmp_path / "merged")
        assert_close(logits_of(PeerForCausalLM.from_pretrained(tmp_path / "merged")), logits_of(merged))


class TestTables:
    """Tables are adapted as embeddings, or as parameters."""

    @pytest.mark.parametrize(
        ("adapter", "feed_forward", "fields"),
        [
            ({"target_modules": ["up_proj", "down_proj"]}, "peer", {}),
            ({"target_modules": USUAL}, "peer", {"share_experts_across_layers": True, "gated_experts": True}),
            ({"target_modules": ["values"]}, "pkm", {}),
            ({"target_parameters": TABLES, "target_modules": ["q_proj"]}, "peer", {}),
        ],
        ids=["tables", "all_of_one_pool", "values", "parameters"],
    )
    def test_are_those_of_the_merged_model_and_so_are_gradients(self, adapter, feed_forward, fields):
        model = small_model(feed_forward, feed_forward, **fields).double().eval()
        config = LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, **adapter)
        model = get_peft_model(model, config)
        merged = copy.deepcopy(model).merge_and_unload()
        tokens = pad_right(counting_sequences(8, seed=3))["input_ids"]
        losses = [each(input_ids=tokens, labels=tokens).loss for each in (model, merged.requires_grad_(True))]
        assert_close(*losses, rtol=1e-12, atol=0)
        for loss in losses:
            loss.backward()
        adapters = dict(model.named_parameters())
        found = 0
        for name, table in expert_tables(merged).items():
            prefix = f"base_model.model.{name}.lora_"
            if f"{prefix}embedding_A.default" in adapters:  # the table has (B A)ᵀ added to it
                a, b = (adapters[f"{prefix}embedding_{part}.default"] for part in "AB")
                of_delta = 2 * table.weight.grad.T
            else:  # a parameter of shape (out, in) has B A
                a, b = (adapters[f"{prefix}{part}.default.weight"] for part in "AB")
                of_delta = 2 * (table.weight.grad if b.shape[0] == len(table.weight) else table.weight.grad.T)
            assert_close(a.grad, b.T @ of_delta, rtol=1e-9, atol=1e-12)
            assert_close(b.grad, of_delta @ a.T, rtol=1e-9, atol=1e-12)
            found += a.grad.any() and b.grad.any()
        assert found == len(expert_tables(merged))

    @pytest.mark.parametrize("config", [LoraConfig(), IA3Config(), LoraConfig(target_modules="all-linear")], ids=str)
    @pytest.mark.parametrize("fields", [{}, {"share_experts_across_layers": True, "gated_experts": True}], ids=str)
    def test_are_not_among_the_defaults(self, config, fields):
        model = get_peft_model(small_model(**fields), copy.deepcopy(config))
        assert model.targeted_module_names
        assert all(plain_weight(table) is not None for table in expert_tables(model).values())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder of a model whose running statistics are not its first ones, and of the tokenizer of `texts`."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_tokenizer(folder)
    model = train(small_model(), folder, max_steps=3).model
    model.save_pretrained(folder)
    return folder


def sft(*args, **options):
    """The same, trained."""
    trainer = sft_trainer(*args, **options)
    trainer.train()
    return trainer


class TestSupervisedFineTuning:
    @pytest.mark.parametrize("query_norm", ["batch", "rms"])
    def test_without_padding_as_with_it(self, tmp_path, query_norm):
        """A row of many documents: each attends to itself, and as many tokens make the statistics."""
        small_model(query_norm=query_norm).save_pretrained(tmp_path / "model")
        save_tokenizer(tmp_path / "model")
        padded, padding_free = (
            sft(PeerForCausalLM.from_pretrained(tmp_path / "model"), tmp_path, max_steps=5, **options)
            for options in ({}, {"padding_free": True, "max_length": None})
        )
        assert logged(padding_free) == pytest.approx(logged(padded), rel=1e-5)
        assert logged(padding_free, "grad_norm") == pytest.approx(logged(padded, "grad_norm"), rel=1e-4)
        for norms in zip(query_batch_norms(padding_free.model), query_batch_norms(padded.model), strict=True):
            assert_close(*(norm.state_dict() for norm in norms), rtol=1e-4, atol=1e-5)

    def test_packed(self, tmp_path, checkpoint):
        """Documents that share a row do not see each other: their loss is that which they have apart."""
        packed = sft(str(checkpoint), tmp_path, packing=True, max_length=32)
        assert logged(packed)[-1] < 0.5 * logged(packed)[0]
        packed.save_model(tmp_path)
        apart = sft_trainer(str(tmp_path), tmp_path)
        assert len(packed.eval_dataset) < len(apart.eval_dataset)
        assert packed.evaluate()["eval_loss"] == pytest.approx(apart.evaluate()["eval_loss"], rel=1e-5)


class TestPolicies:
    """Before the first update a policy is its reference, although it is in training mode and has a query BatchNorm."""

    @pytest.mark.parametrize("adapter", [None, "usual"])
    def test_direct_preference_optimization(self, tmp_path, checkpoint, adapter):
        model = PeerForCausalLM.from_pretrained(checkpoint)
        if adapter is None:
            freeze_query_norm(model)  # PEFT freezes the norms with the rest of the base model
        before = [copy_of_state(norm) for norm in query_batch_norms(model)]
        trainer = DPOTrainer(
            model,
            args=DPOConfig(str(tmp_path), max_steps=6, **TRL_OPTIONS),
            train_dataset=preferences(80),
            peft_config=adapter and LoraConfig(r=4, task_type="CAUSAL_LM", **ADAPTERS[adapter]),
        )
        trainer.train()
        margins = logged(trainer, "rewards/margins")
        assert margins[0] == logged(trainer, "rewards/chosen")[0] == 0.0
        assert margins[-1] > 0.0
        assert_close([norm.state_dict() for norm in query_batch_norms(trainer.model)], before, rtol=0, atol=0)

    @pytest.mark.parametrize("adapter", [None, "usual"])
    def test_group_relative_policy_optimization(self, tmp_path, checkpoint, adapter):
        trainer = GRPOTrainer(
            str(checkpoint),
            reward_funcs=lambda completions, **_: [float(text.count("w1")) for text in completions],
            args=GRPOConfig(
                str(tmp_path), max_steps=2, num_generations=4, max_completion_length=6, beta=0.1, **TRL_OPTIONS
            ),
            train_dataset=preferences(8).select_columns("prompt"),
            peft_config=adapter and LoraConfig(r=4, task_type="CAUSAL_LM", **ADAPTERS[adapter]),
        )
        if adapter is None:
            freeze_query_norm(trainer.model)
        trainer.train()
        divergences = logged(trainer, "kl")
        assert divergences[0] == 0.0
        assert divergences[1] > 0.0
