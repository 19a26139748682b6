# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Grafts that became a part of their model: it is saved and loaded without PEFT, generates the same, loads in processes
that have this package and in those that have the code in the checkpoint only. (Where neither is: `test_graft_registration.py`.)
"""

import copy
import pickle

import pytest
import torch
from graft_models import (
    BASE_MODELS,
    FAMILIES_AND_PLACEMENTS,
    HEADS,
    PLACEMENTS,
    TASKS,
    assert_same_state,
    base_model_of,
    graft_config,
    grafted,
    grafts_of,
    logits_of,
    state_of,
    trained,
)
from peft import LoraConfig, PeftModel, get_peft_model
from script_runs import run_script
from tiny_models import random_tokens, tiny_config
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from modeling_peer import PeerForCausalLM, graft_merged
from modeling_peer.graft_layer import GraftedFeedForward, find_decoder_layers
from modeling_peer.graft_merged import merge_grafts


GREEDY = {"max_new_tokens": 6, "do_sample": False}


def without_peft(model):
    return not any(
        "peft" in type(module).__module__ or ("Layer" in type(module).__name__ and "Graft" in type(module).__name__)
        for module in model.modules()
    )


def hooks_of(model):
    decoder = find_decoder_layers(model)[1]
    return decoder._forward_pre_hooks, decoder._forward_hooks


class TestRoundTrip:
    @pytest.mark.parametrize(("family", "placement"), FAMILIES_AND_PLACEMENTS)
    def test_is_equal_to_the_bit(self, family, placement, tmp_path):
        fields = PLACEMENTS[placement]
        model = trained(grafted(family, layers_to_transform=[0, 2], **fields))
        tokens = random_tokens(2, 5)
        logits, generated = logits_of(model), model.generate(input_ids=tokens, **GREEDY)
        merged = model.merge_and_unload()
        assert torch.equal(logits_of(merged), logits) and without_peft(merged)
        merged.save_pretrained(tmp_path)
        loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
        assert type(loaded) is type(merged) and isinstance(loaded, type(base_model_of(family)))
        assert torch.equal(logits_of(loaded), logits)
        for use_cache in (True, False):
            assert torch.equal(loaded.generate(tokens, use_cache=use_cache, **GREEDY), generated)
        in_place = fields.get("placement") == "in_place"
        own = [module.feed_forward for module in loaded.modules() if isinstance(module, GraftedFeedForward)]
        assert [feed_forward is None for feed_forward in own] == [in_place] * 2
        base_model = AutoModel.from_pretrained(tmp_path)
        hidden_states = base_model(tokens).last_hidden_state
        assert torch.equal(hidden_states, loaded.base_model(tokens).last_hidden_state)

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    @pytest.mark.parametrize("task_type", TASKS)
    def test_of_every_auto_class(self, family, task_type, tmp_path):
        """With the modules that are trained besides, which come back as an adapter too."""

        def base_model():
            torch.manual_seed(0)
            return TASKS[task_type].from_config(copy.deepcopy(BASE_MODELS[family])).eval()

        model = get_peft_model(base_model(), graft_config(task_type=task_type))
        heads = [name for name, _ in model.named_parameters() if ".modules_to_save." in name]
        assert family != "llama" or {name.split(".")[2] for name in heads} == HEADS.get(task_type, set())
        for name, parameter in model.named_parameters():
            if name in heads or ("down_proj.weight" in name and parameter.requires_grad):
                nn.init.normal_(parameter)
        tokens = random_tokens(1, 5)
        outputs = model.eval()(input_ids=tokens)[0]
        assert not torch.equal(outputs, base_model()(input_ids=tokens)[0])
        model.save_pretrained(tmp_path / "adapter")
        adapted = PeftModel.from_pretrained(base_model(), tmp_path / "adapter").eval()
        assert torch.equal(adapted(input_ids=tokens)[0], outputs)
        model.merge_and_unload().save_pretrained(tmp_path)
        loaded, report = TASKS[task_type].from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
        assert torch.equal(loaded(input_ids=tokens)[0], outputs)
        assert [len(hooks) for hooks in hooks_of(loaded)] == [1, 1]

    def test_of_pickles(self, tmp_path):
        """Also in another process, where no class was made yet."""
        merged = trained(grafted(query_norm="batch")).merge_and_unload()
        tokens = random_tokens(2, 5)
        torch.save((merged, pickle.dumps(merged.config), tokens, logits_of(merged, tokens)), tmp_path / "model.pt")
        script = """
import pickle, sys, torch
model, config, tokens, logits = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(model(tokens).logits, logits)
assert type(pickle.loads(config)) is type(model.config) is type(model).config_class
print(type(model).__name__)
"""
        assert run_script(script, tmp_path / "model.pt") == "PeerGraftedLlamaForCausalLM\n"
        with pytest.raises(AttributeError, match="no attribute 'PeerGraftedNothing'"):
            _ = graft_merged.PeerGraftedNothing

    def test_of_bfloat16_takes_the_dtype_of_the_base_model(self, tmp_path):
        model = trained(grafted(base_model_of(dtype=torch.bfloat16), query_norm="batch"))
        merged = model.merge_and_unload()
        assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
        merged.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
        assert torch.equal(logits_of(loaded), logits_of(merged))

    def test_of_one_of_several_adapters_and_twice(self, tmp_path):
        model = trained(grafted(adapter_name="first"))
        first = logits_of(model)
        model.add_adapter("second", graft_config(num_experts=6**2, layers_to_transform=[1, 2]))
        model.set_adapter("second")
        trained(model)
        one = copy.deepcopy(model).merge_and_unload(adapter_names=["first"])
        assert torch.equal(logits_of(one), first) and len(grafts_of(one)) == 1
        model.base_model.set_adapter(["first", "second"])
        logits = logits_of(model)
        merged = model.merge_and_unload()
        assert torch.equal(logits_of(merged), logits)
        assert len(grafts_of(merged)) == 3
        again = trained(grafted(merged, layers_to_transform=[0]))
        assert not torch.equal(logits_of(again), logits)
        logits = logits_of(again)
        again.merge_and_unload().save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits_of(loaded), logits)
        assert list(loaded.config.peer_grafts) == ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]

    @pytest.mark.parametrize("fields", [{}, {"target_modules": ["mlp"]}, PLACEMENTS["neurons"]])
    def test_twice_at_one_layer(self, fields, tmp_path):
        merged = trained(grafted()).merge_and_unload()
        plain = copy.deepcopy(merged)
        again = trained(grafted(merged, **fields))
        logits = logits_of(again)
        again.save_pretrained(tmp_path / "adapter")
        assert torch.equal(logits_of(PeftModel.from_pretrained(plain, tmp_path / "adapter")), logits)
        again.merge_and_unload().save_pretrained(tmp_path)
        assert [len(hooks) for hooks in hooks_of(merged)] == [1, 1]
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits_of(loaded), logits)
        assert len(grafts_of(loaded)) == 2
        assert list(loaded.config.peer_grafts) == ["layers.1.mlp", "layers.1.mlp.feed_forward"]

    def test_keeps_what_another_method_learned(self):
        lora = trained(get_peft_model(base_model_of(), LoraConfig(target_modules=["q_proj"])))
        with pytest.warns(UserWarning, match="for a second time"):
            model = trained(grafted(lora.get_base_model(), adapter_name="graft"))
        logits = logits_of(model)
        merged = model.merge_and_unload()
        assert without_peft(merged) and type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
        torch.testing.assert_close(logits_of(merged), logits)

    def test_of_what_another_method_left_in_the_host(self, tmp_path):
        """LoRA's `merge_and_unload` takes all layers of PEFT out, but makes no grafts a part of the configuration."""
        graft = trained(grafted())
        with pytest.warns(UserWarning, match="for a second time"):
            model = get_peft_model(graft.get_base_model(), LoraConfig(target_modules=["q_proj"]), adapter_name="lora")
        model = trained(model)
        logits = logits_of(model)
        merged = model.merge_and_unload()
        torch.testing.assert_close(logits_of(merged), logits)
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp"):
            merged.save_pretrained(tmp_path)
        merge_grafts(merged).save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(logits_of(loaded), logits_of(merged))

    def test_starts_anew_from_the_configuration(self, tmp_path):
        trained(grafted(placement="in_place", init_from_ffn=True, num_experts=100)).merge_and_unload().save_pretrained(
            tmp_path
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
        for graft in grafts_of(model):
            for name, parameter in graft.named_parameters():
                assert "norm" in name or 0 < parameter.std() < 2, (name, parameter)
        assert logits_of(model.eval()).isfinite().all()


class TestWhereItLoads:
    SCRIPT = """
import sys, torch
{imports}
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
tokens, logits, generated = torch.load(folder + "/expected.pt")
model = AutoModelForCausalLM.from_pretrained(folder, {arguments})
torch.testing.assert_close(model(tokens).logits, logits)  # the code in a checkpoint has no kernels in C
assert torch.equal(model.generate(tokens, max_new_tokens=6, do_sample=False), generated)
model.save_pretrained(folder + "/again")
again = AutoModelForCausalLM.from_pretrained(folder + "/again", {arguments})
torch.testing.assert_close(again(tokens).logits, logits)
print("loaded", type(model).__module__)
"""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("merged")
        model = trained(grafted("gemma2", query_norm="batch")).merge_and_unload()
        model.save_pretrained(folder)
        tokens = random_tokens(2, 5)
        torch.save((tokens, logits_of(model, tokens), model.generate(tokens, **GREEDY)), folder / "expected.pt")
        return folder

    @pytest.mark.parametrize(
        ("imports", "arguments", "module"),
        [
            ("import modeling_peer.graft_merged", "", "modeling_peer.graft_merged"),
            ("sys.modules['modeling_peer'] = None", "trust_remote_code=True", "transformers_modules"),
        ],
        ids=["by the package", "by the code in the checkpoint"],
    )
    def test_loads(self, folder, tmp_path, imports, arguments, module):
        variables = {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        script = self.SCRIPT.format(imports=imports, arguments=arguments)
        assert f"loaded {module}" in run_script(script, folder, cwd=tmp_path, **variables)


class TestRefusals:
    @pytest.mark.parametrize(
        ("model_class", "config"),
        [
            (type("Own", (LlamaForCausalLM,), {}), BASE_MODELS["llama"]),
            (PeerForCausalLM, tiny_config("dense", "peer", "dense")),
        ],
    )
    def test_of_models_that_could_not_be_loaded_again(self, model_class, config):
        base_model = model_class(copy.deepcopy(config))
        model = get_peft_model(base_model.eval(), graft_config(layers_to_transform=[0]))
        logits, before = logits_of(trained(model)), state_of(base_model)
        with pytest.raises(ValueError, match="none of .* finds"):
            model.merge_and_unload()
        assert_same_state(state_of(base_model), before)
        assert torch.equal(logits_of(model), logits)

    @pytest.mark.parametrize("names", [["typo"], "default", []])
    def test_of_adapters_that_are_not_there(self, names):
        model = trained(grafted())
        model.add_adapter("second", graft_config())
        logits = logits_of(model)
        with pytest.raises(ValueError, match="`merge_and_unload`"):
            model.merge_and_unload(adapter_names=names)
        assert torch.equal(logits_of(model), logits)

    def test_of_broken_weights(self):
        model = trained(grafted())
        grafts_of(model)[0].router.sub_keys.data[0, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            model.merge_and_unload(safe_merge=True)
        assert isinstance(model.base_model.model, LlamaForCausalLM) and not without_peft(model)


def test_the_base_model_and_its_class_stay_as_they_were():
    config = LlamaConfig(**BASE_MODELS["llama"].to_dict())
    before, other = config.to_dict(), LlamaForCausalLM(config)
    merged = grafted(LlamaForCausalLM(config)).merge_and_unload()
    assert type(config) is type(other.config) is LlamaConfig and other.config.to_dict() == before
    for module in merged.modules():
        if isinstance(getattr(module, "config", None), LlamaConfig):
            assert module.config is merged.config
    base_model = AutoModelForCausalLM.from_config(config)
    assert type(base_model) is LlamaForCausalLM and not grafts_of(base_model)
