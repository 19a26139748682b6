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
"""
PEFT's adapters and TRL's trainers on PEER models: adapters of every part train, save, load and merge; batches without
padding train as padded ones; a policy starts as its reference.
"""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from release_names import CHECKPOINTING
from sft import TRL_OPTIONS, preferences, save_tokenizer, sft_trainer
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


# A table of experts is a parameter to PEFT, as its LoRA of an embedding looks rows up by the first argument.
TABLES = ["expert_pool.up_proj.weight", "expert_pool.down_proj.weight"]

# What most recipes name.
USUAL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

ADAPTERS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "queries": {"target_modules": ["query_proj"]},
    "tables": {"target_parameters": TABLES},
    "all": {"target_modules": "all-linear", "target_parameters": TABLES},
    "norm_saved": {"target_modules": ["q_proj", "query_proj"], "modules_to_save": ["query_norm"]},
    "router_saved": {"target_modules": ["q_proj"], "modules_to_save": ["router"]},
    "experts_saved": {"target_modules": ["q_proj"], "modules_to_save": ["expert_pool"]},
}


def adapted(adapter, **fields):
    model = small_model(**fields)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **adapter))


def state_of_base(peft_model):
    """The state that was there before the adapter, under the names it had."""
    state = {}
    for name, tensor in peft_model.get_base_model().state_dict().items():
        if "lora_" not in name and "modules_to_save" not in name:
            state[name.replace("base_layer.", "").replace("original_module.", "")] = tensor
    return state


@torch.no_grad()
def logits_of(model):
    batch = pad_right(counting_sequences(8, seed=3))
    return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def assert_learns(peft_model, folder):
    trainer = trainer_of(peft_model, folder, max_steps=20, learning_rate=5e-2)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.99 * before


class TestAdapters:
    @pytest.mark.parametrize("query_norm", ["batch", "rms"])
    @pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
    def test_trains_saves_loads_and_merges(self, tmp_path, adapter, query_norm):
        base = small_model(query_norm=query_norm)
        before, logits_before = copy_of_state(base), logits_of(base)
        model = adapted(adapter, query_norm=query_norm)
        assert_learns(model, tmp_path)
        logits = logits_of(model)
        assert (logits - logits_before).abs().max() > 0.1

        assert_close(state_of_base(model), before, rtol=0, atol=0)
        with model.disable_adapter():
            assert_close(logits_of(model), logits_before, rtol=0, atol=0)

        model.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert_close(logits_of(loaded), logits, rtol=0, atol=0)

        merged = loaded.merge_and_unload()
        assert_close(logits_of(merged), logits, rtol=1e-4, atol=1e-5)
        merged.save_pretrained(tmp_path / "merged")
        assert_close(logits_of(PeerForCausalLM.from_pretrained(tmp_path / "merged")), logits_of(merged))

    @pytest.mark.parametrize(
        ("adapter", "fields"),
        [
            ({"target_parameters": ["expert_pool.gate_proj.weight"]}, {"gated_experts": True}),
            ({"target_parameters": TABLES}, {"share_experts_across_layers": True, "query_norm": "rms"}),
        ],
        ids=["gates", "one_pool"],
    )
    def test_of_other_tables_train(self, tmp_path, adapter, fields):
        model = adapted(adapter, **fields)
        assert any("expert_pool" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
        assert_learns(model, tmp_path)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_activation_checkpointing_changes_nothing(self, tmp_path, use_reentrant):
        plain, checkpointed = (
            train(
                adapted(ADAPTERS["all"]),
                tmp_path,
                max_steps=5,
                **{CHECKPOINTING: checkpointing},
                **{f"{CHECKPOINTING}_kwargs": {"use_reentrant": use_reentrant}},
            )
            for checkpointing in (False, True)
        )
        assert logged(checkpointed) == pytest.approx(logged(plain), rel=1e-6)
        assert logged(checkpointed, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-5)
        assert logged(plain)[-1] != logged(plain)[0]


class TestTargetModules:
    """Expert tables, whose names are those of linear layers, are left out of them."""

    @pytest.mark.parametrize(
        ("config", "adapted_of_dense", "adapted_of_attention"),
        [
            (LoraConfig(target_modules=USUAL), ["down_proj", "gate_proj", "up_proj"], 4),
            (LoraConfig(target_modules=USUAL, target_parameters=TABLES), ["down_proj", "gate_proj", "up_proj"], 4),
            (LoraConfig(target_modules=r".*\.(q_proj|up_proj)", exclude_modules=r".*\.1\..*q_proj"), ["up_proj"], 1),
            (LoraConfig(), [], 2),
            (IA3Config(), ["down_proj"], 2),
            (
                IA3Config(target_modules=USUAL, feedforward_modules=["down_proj"]),
                ["down_proj", "gate_proj", "up_proj"],
                4,
            ),
        ],
        ids=["list", "list_and_tables", "pattern", "defaults", "defaults_of_ia3", "ia3"],
    )
    @pytest.mark.parametrize("fields", [{}, {"share_experts_across_layers": True, "gated_experts": True}], ids=str)
    def test_of_linear_layers(self, tmp_path, config, adapted_of_dense, adapted_of_attention, fields):
        model = get_peft_model(small_model(**fields), copy.deepcopy(config))
        names = [name for name in model.targeted_module_names if ".self_attn." not in name]
        assert sorted(names) == [f"model.layers.0.mlp.{name}" for name in adapted_of_dense]
        assert len({name for name in model.targeted_module_names if ".0.self_attn." in name}) == adapted_of_attention
        assert bool(model.targeted_parameter_names) == bool(getattr(config, "target_parameters", None))
        logits = logits_of(model)
        model.save_pretrained(tmp_path)
        assert_close(logits_of(PeftModel.from_pretrained(small_model(**fields), tmp_path)), logits, rtol=0, atol=0)

    def test_of_models_without_dense_feed_forwards(self):
        model = small_model("peer", "peer")
        inject_adapter_in_model(LoraConfig(target_modules=USUAL), model)
        assert sum("lora_A" in name for name, _ in model.named_parameters()) == 2 * 4

    @pytest.mark.parametrize("targets", [["up_proj"], ["q_proj", "expert_pool.up_proj"], r".*\.expert_pool\.up_proj"])
    def test_that_are_tables_raise(self, targets):
        """Rather than computing something else."""
        with pytest.raises(ValueError, match=r"target_parameters=\['expert_pool.up_proj.weight'\]"):
            get_peft_model(small_model("peer", "peer"), LoraConfig(target_modules=targets))

    def test_beside_an_adapter_of_tables(self):
        model = adapted(ADAPTERS["tables"])
        model.add_adapter("second", LoraConfig(target_modules=USUAL))
        assert not [name for name, _ in model.named_parameters() if "expert_pool" in name and ".second." in name]
        model.set_adapter("second")
        assert logits_of(model).isfinite().all()


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
    def test_by_path_and_by_object(self, tmp_path, checkpoint):
        by_path = sft(str(checkpoint), tmp_path)
        by_object = sft(PeerForCausalLM.from_pretrained(checkpoint), tmp_path)
        assert type(by_path.model) is PeerForCausalLM
        assert logged(by_path)[-1] < 0.5 * logged(by_path)[0]
        assert logged(by_path) == logged(by_object)

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

    def test_of_a_mixture_of_experts(self, tmp_path, checkpoint):
        """TRL would balance as many experts as PEER has: the balancing loss has to be turned off."""
        trainer = sft(
            PeerForCausalLM.from_pretrained(checkpoint, feed_forward_types=["dense", "moe"]),
            tmp_path,
            router_aux_loss_coef=0.0,
        )
        assert logged(trainer)[-1] < 0.5 * logged(trainer)[0]

    @pytest.mark.parametrize("by_path", [True, False], ids=["path", "object"])
    def test_of_an_adapter(self, tmp_path, checkpoint, by_path):
        model = str(checkpoint) if by_path else PeerForCausalLM.from_pretrained(checkpoint)
        trainer = sft(model, tmp_path, LoraConfig(r=4, task_type="CAUSAL_LM", **ADAPTERS["all"]))
        assert logged(trainer)[-1] < 0.95 * logged(trainer)[0]
        trainer.save_model(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(PeerForCausalLM.from_pretrained(checkpoint), tmp_path / "adapter")
        assert_close(logits_of(loaded), logits_of(trainer.model), rtol=0, atol=0)


class TestPolicies:
    """Before the first update a policy is its reference, although it is in training mode and has a query BatchNorm."""

    @pytest.mark.parametrize("adapter", [None, "all"])
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

    @pytest.mark.parametrize("adapter", [None, "all"])
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
