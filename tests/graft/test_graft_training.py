# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Grafts in the stock `Trainer` and in TRL's `SFTTrainer`, with the optimizer and the measures of PEER models."""

import pytest
import torch
from graft_models import base_model_of, graft_config, grafted, grafts_of, merged_in_turn
from peft import PeftModel, get_peft_model
from sft import logits_of, save_tokenizer, sft_trainer
from torch.testing import assert_close
from trainer_worker import copy_of_state, counting_sequences, logged, pad_right, train, trainer_of
from transformers import AutoModelForCausalLM, TrainerCallback

from modeling_peer import (
    ExpertBackground,
    ExpertUsageCallback,
    SparseFinetuningCallback,
    freeze_experts,
    masked_experts,
    measure_usage,
)
from modeling_peer.analysis.expert_sets import find_expert_sets, observe_routers


def model_of(family="llama", **fields):
    return grafted(base_model_of(family), **fields)


class TestTrainer:
    def test_resumes_to_the_bit(self, tmp_path):
        options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 2}

        def trainer_in(folder):
            return trainer_of(model_of(query_norm="batch"), tmp_path / folder, counting_sequences(40), **options)

        whole = trainer_in("whole")
        whole.train()
        resumed = trainer_in("resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
        assert logged(resumed)[-4:] == logged(whole)[-4:]
        assert_close(copy_of_state(resumed.model), copy_of_state(whole.model), rtol=0, atol=0)

    def test_usage_of_grafts_that_were_merged_one_after_the_other(self, tmp_path):
        model, seen = merged_in_turn(64, 36), {64: set(), 36: set()}
        for graft in grafts_of(model):
            own = seen[graft.config.num_experts]
            graft.router.register_forward_hook(
                lambda module, args, output, own=own: own.update(output[0][args[1].bool()].flatten().tolist())
            )
        trainer = train(model, tmp_path, max_steps=1, callbacks=[ExpertUsageCallback()])
        assert {
            label: logged(trainer, f"expert_usage/{label}") for label in ("layer_1_graft_0", "layer_1_graft_1")
        } == {
            "layer_1_graft_0": [pytest.approx(len(seen[64]) / 64)],
            "layer_1_graft_1": [pytest.approx(len(seen[36]) / 36)],
        }

    def test_measures_and_freezes_of_a_graft_are_of_the_active_adapter(self, tmp_path):
        model = grafted(adapter_name="first")
        model.add_adapter("second", graft_config(num_experts=6**2))
        tokens = pad_right(counting_sequences(8))["input_ids"]
        for adapter, num_experts in (("first", 64), ("second", 36)):
            model.set_adapter(adapter)
            name = f"base_model.model.model.layers.1.mlp.peer_graft_layer.{adapter}.expert_pool"
            assert {each: found.num_experts for each, found in find_expert_sets(model).items()} == {name: num_experts}
            assert find_expert_sets(model)[name].label == f"layer_1_{adapter}"
            assert len(measure_usage(model, input_ids=tokens)) == 1
            frozen = freeze_experts(model, range(30))
            assert frozen.num_frozen == {name: 30}
            before = copy_of_state(model)
            train(model, tmp_path, max_steps=3, weight_decay=0.1)
            for table, tensor in model.state_dict().items():
                if "_proj.weight" in table and "expert_pool" in table:
                    moved = tensor.ne(before[table]).any(1)
                    assert not moved[:30].any() and moved[30:].any() == (f".{adapter}." in table)
            frozen.remove()
            logits, masked = logits_of(model), torch.arange(num_experts) < num_experts // 2
            with masked_experts(model, masked):
                assert not torch.equal(logits_of(model), logits)
                seen = []
                hooks = observe_routers(find_expert_sets(model), lambda _, found, __, seen=seen: seen.append(found))
                logits_of(model)
                hooks[0].remove()
            assert torch.cat(seen).min() >= num_experts // 2
            assert torch.equal(logits_of(model), logits)

    def test_sparse_finetuning_of_a_graft(self, tmp_path):
        """Whatever makes all of the adapter require gradients, before the training or in it."""

        class SwitchOff(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **kwargs):
                with model.disable_adapter():
                    pass

        model = model_of(query_norm="batch")
        background = ExpertBackground.measure(model, counting_sequences(8), progress_bar=False)
        callback = SparseFinetuningCallback(model, background, num_trained_experts=5)
        with model.disable_adapter():
            pass
        before = copy_of_state(model)
        options = {"max_steps": 3, "optim": "sgd", "learning_rate": 1.0}
        trainer = train(model, tmp_path, callbacks=[callback, SwitchOff()], **options)
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        (name,) = find_expert_sets(model)
        assert moved == {f"{name}.down_proj.weight"}
        assert logged(trainer, "sparse_finetuning/trained_experts/layer_1_default") == [5.0] * 3


class TestSupervisedFineTuning:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        """Of a base model and the tokenizer of the texts."""
        folder = tmp_path_factory.mktemp("base_model")
        save_tokenizer(folder)
        base_model_of("qwen3", seed=1).save_pretrained(folder)
        return folder

    @pytest.mark.parametrize(
        ("by_config", "query_norm"), [(True, "rms"), (False, "batch")], ids=["peft_config", "wrapped"]
    )
    def test_of_a_graft(self, tmp_path, folder, by_config, query_norm):
        config = graft_config(query_norm=query_norm)
        model = str(folder) if by_config else get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
        options = {"max_steps": 20, "learning_rate": 3e-2}
        trainer = sft_trainer(model, tmp_path, config if by_config else None, **options)
        trainer.train()
        assert logged(trainer)[-1] < 0.9 * logged(trainer)[0]
        trainer.save_model(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
        assert_close(logits_of(loaded), logits_of(trainer.model), rtol=0, atol=0)
