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
Grafts as adapters of PEFT, on six families of hosts: they start as nothing, train alone, save alone, come back to the bit,
are switched, disabled, deleted; what does not fit is refused and leaves the host as it was.
"""

import copy
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from graft_hosts import HOSTS, SIZES, graft_config, grafted, grafts_of, host_of, logits_of, trained
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from release_names import enable_checkpointing
from safetensors.torch import load_file
from test_feed_forward_peer import literal_peer
from tiny_models import random_tokens
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BloomConfig,
    BloomForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from modeling_peer.graft import initialization as graft_initialization
from modeling_peer.graft import model as graft_model
from modeling_peer.graft.initialization import neuron_cells
from modeling_peer.graft.model import PeerGraftConfig, PeerGraftLayer
from modeling_peer.graft_layer import GraftedFeedForward, recognize_feed_forward, weight_matrix


FAMILIES = pytest.mark.parametrize("family", HOSTS)

PLACEMENTS = {
    "beside": {},
    "beside_batch": {"query_norm": "batch", "gated_experts": True},
    "in_place": {"placement": "in_place", "init_from_ffn": False, "query_norm": None, "scoring_func": "sigmoid"},
    "neurons": {"placement": "in_place", "num_experts": 10**2},
}
ALL_PLACEMENTS = pytest.mark.parametrize("fields", PLACEMENTS.values(), ids=PLACEMENTS)


def state_of(host):
    """Everything that a refusal must leave alone."""
    tensors = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    modules = [(name, type(module)) for name, module in host.named_modules()]
    trains = [parameter.requires_grad for parameter in host.parameters()]
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in host.modules()]
    return tensors, modules, trains, hooks, host.config.to_dict(), hasattr(host, "peft_config")


def assert_same_state(found, expected):
    for name, tensor in expected[0].items():
        assert torch.equal(found[0][name], tensor), name
    assert found[0].keys() == expected[0].keys()
    assert found[1:] == expected[1:]


def assert_refused(host, config, message):
    before = state_of(host)
    with pytest.raises(ValueError, match=message):
        get_peft_model(host, config)
    assert_same_state(state_of(host), before)


TASKS = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
}
HEADS = {"SEQ_CLS": {"score"}, "TOKEN_CLS": {"score"}, "QUESTION_ANS": {"qa_outputs"}}


class TestStart:
    @FAMILIES
    @pytest.mark.parametrize("query_norm", ["rms", "batch"])
    def test_beside_it_is_nothing(self, family, query_norm):
        host = host_of(family)
        before = logits_of(host)
        model = grafted(host, query_norm=query_norm)
        assert isinstance(host.base_model.get_submodule(middle_feed_forward(family)), PeerGraftLayer)
        assert len(grafts_of(model)) == 1
        assert torch.equal(logits_of(model), before)
        assert torch.equal(logits_of(model.train()), before)

    @pytest.mark.parametrize("layers", [[0, 2], 2, [1, 1]])
    def test_on_chosen_layers(self, layers):
        model = grafted(layers_to_transform=layers)
        names = {
            name.split("layers.")[1][0] for name, module in model.named_modules() if type(module) is PeerGraftLayer
        }
        assert names == {str(layer) for layer in (layers if isinstance(layers, list) else [layers])}

    @pytest.mark.parametrize(
        ("fields", "layers"),
        [
            ({"target_modules": ["mlp"], "layers_to_transform": [0, 2]}, "02"),
            ({"target_modules": r".*\.[12]\.mlp"}, "12"),
            ({"target_modules": ["model.layers.2.mlp"]}, "2"),
            ({"target_modules": ["mlp"], "layers_to_transform": [2], "layers_pattern": "layers"}, "2"),
        ],
    )
    def test_on_named_modules(self, fields, layers):
        model = grafted(**fields)
        names = {
            name.split("layers.")[1][0] for name, module in model.named_modules() if type(module) is PeerGraftLayer
        }
        assert names == set(layers)

    def test_takes_the_first_scale_of_the_host(self):
        graft = grafts_of(grafted())[0]
        assert graft.expert_pool.up_proj.weight.std().item() == pytest.approx(0.2, rel=0.1)
        assert graft.router.query_proj.weight.std().item() == pytest.approx(0.2, rel=0.2)

    @ALL_PLACEMENTS
    def test_equals_algorithm_1(self, fields):
        host = host_of(dtype=torch.float64)
        feed_forward = copy.deepcopy(host.model.layers[1].mlp)
        model = grafted(host, sub_keys_per_head=True, **fields)
        graft = grafts_of(model)[0]
        assert graft.router.sub_keys.dtype == torch.float64
        graft.double()  # running statistics too
        for name, tensor in graft.named_parameters():
            nn.init.uniform_(tensor, 0.5, 1.5) if "norm" in name else nn.init.normal_(tensor)
        hidden_states = torch.randn(2, 3, 24, dtype=torch.float64)
        with torch.no_grad():
            output = host.model.layers[1].mlp(hidden_states)
            expected = literal_peer(graft.config, graft, hidden_states)
            if fields.get("placement") != "in_place":
                expected = expected + feed_forward(hidden_states)
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)

    def test_again_with_a_configuration_that_was_filled_in(self):
        """Neurons anew; only what was read from a file waits for weights."""
        config = graft_config(**PLACEMENTS["neurons"])
        for _ in range(2):
            down = grafts_of(get_peft_model(host_of(), config))[0].expert_pool.down_proj.weight
            assert down.any(1).sum() == 32
        assert_refused(host_of("gpt2"), config, "'llama', this one has 'gpt2'. A new adapter needs a configuration of")

    def test_elsewhere_with_a_configuration_that_was_filled_in(self):
        config = graft_config(**PLACEMENTS["neurons"])
        get_peft_model(host_of(), config)
        config.layers_to_transform = [0]
        assert_refused(
            host_of(), config, r"`layers_to_transform` is \[0\], and `target_modules` names \['model.layers.1.mlp'\]"
        )
        # Another option is no sign of weights to come: experts start as neurons.
        config = dataclasses.replace(config, layers_to_transform=None, num_experts_per_head=2)
        down = grafts_of(get_peft_model(host_of(), config))[0].expert_pool.down_proj.weight
        assert down.any(1).sum() == 32

    @pytest.mark.parametrize("kind", ["llava", "gemma3"])
    def test_in_the_decoder_of_text(self, kind):
        """Not in the tower of images, of as many layers."""
        text = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
        text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
        vision = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2}
        vision |= {"image_size": 28, "patch_size": 14}
        if kind == "gemma3":
            host = Gemma3ForConditionalGeneration(Gemma3Config(vision_config=vision, text_config=text))
        else:
            configs = {"vision_config": {**vision, "model_type": "siglip_vision_model"}}
            configs["text_config"] = {**text, "model_type": "llama"}
            host = LlavaForConditionalGeneration(LlavaConfig(**configs))
        model = get_peft_model(host.eval(), graft_config(layers_to_transform=[0]))
        assert model.peft_config["default"].target_modules == {"model.language_model.layers.0.mlp"}
        before = logits_of(model)
        nn.init.normal_(grafts_of(model)[0].expert_pool.down_proj.weight)
        assert not torch.equal(logits_of(model), before)


def middle_feed_forward(family):
    return "h.1.mlp" if family == "gpt2" else "layers.1.mlp"


class TestNeurons:
    """In place of a feed-forward, from its own neurons: with all of them at a softmax's mean weight it is the feed-forward."""

    @pytest.mark.parametrize("num_experts", [10**2, 48**2], ids=["as_they_are", "found_by_the_router"])
    @pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
    def test_are_experts(self, family, num_experts):
        host = host_of(family, dtype=torch.float64)
        feed_forward = copy.deepcopy(host.base_model.get_submodule(middle_feed_forward(family)))
        graft = grafts_of(grafted(host, **{**PLACEMENTS["neurons"], "num_experts": num_experts}))[0]
        width = recognize_feed_forward(feed_forward).intermediate_size
        assert graft.config.gated_experts is (family != "gpt2")
        copies = neuron_cells(graft.config, width)
        assert copies.shape == (1 if num_experts == 10**2 else 2, width)
        hidden_states = torch.randn(1, 5, 24, dtype=torch.float64)
        for cells in copies:
            indices = cells.expand(1, 5, 1, width)
            weights = torch.full(indices.shape, 1 / graft.config.num_experts_per_head, dtype=torch.float64)
            graft.router.forward = lambda *_, output=(indices, weights): output
            with torch.no_grad():
                torch.testing.assert_close(graft(hidden_states), feed_forward(hidden_states), rtol=1e-8, atol=1e-8)
        others = torch.ones(num_experts, dtype=torch.bool)
        others[copies.flatten()] = False
        down = graft.expert_pool.down_proj.weight
        assert not down[others].any() and down[~others].any(1).all()

    @pytest.mark.parametrize("query_norm", ["rms", "batch", None])
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_are_found_by_their_inputs(self, family, query_norm):
        """With as many features as neurons of a head, every head retrieves those of its share with the largest inputs."""
        host = host_of(family)
        fields = {**PLACEMENTS["neurons"], "num_experts": 48**2, "query_size": 128, "query_norm": query_norm}
        feed_forward = copy.deepcopy(host.base_model.get_submodule(middle_feed_forward(family)))
        graft, parts = grafts_of(grafted(host, **fields))[0], recognize_feed_forward(feed_forward)
        activated, width = parts.gate or parts.up, parts.intermediate_size
        hidden_states = torch.randn(4, 16, 24)
        features = hidden_states if family != "gpt2" else torch.cat([hidden_states, torch.ones(4, 16, 1)], dim=-1)
        inputs = activated(hidden_states) * weight_matrix(parts.down).norm(dim=0)
        cells = neuron_cells(graft.config, width)
        found = graft.router(features)[0]
        share = []
        for head in range(2):
            best = inputs[..., head::2].topk(4).indices * 2 + head
            named = cells[:, best]
            share.append(
                (found[:, :, head, None, :, None] == named.movedim(0, 2)[..., None, :]).any(2).any(-1).float()
            )
        assert torch.stack(share).mean() > 0.6
        assert (graft(hidden_states) - feed_forward(hidden_states)).norm() < 0.9 * feed_forward(hidden_states).norm()

    def test_padded_experts_give_nothing_and_learn(self):
        model = grafted(**PLACEMENTS["neurons"])
        down = grafts_of(model)[0].expert_pool.down_proj.weight
        empty = down.abs().sum(-1) == 0
        assert empty.sum() == 100 - 32
        trained(model, steps=20)
        assert (down[empty].abs().sum(-1) > 0).any()

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"num_experts": 5**2}, r"`num_experts` must be at least 32, .* the least square is 36"),
            ({"expert_act": "relu"}, "`expert_act` must be 'silu' or 'auto'"),
            ({"gated_experts": False}, "`gated_experts` must be True or 'auto'"),
        ],
    )
    def test_that_do_not_fit_are_refused(self, fields, message):
        assert_refused(host_of(), graft_config(**{**PLACEMENTS["neurons"], **fields}), message)

    def test_of_another_kind_of_feed_forward_are_refused(self):
        host = host_of()
        host.model.layers[1].mlp.act_fn = nn.Tanh()
        assert_refused(host, graft_config(**PLACEMENTS["neurons"]), "the activation 'silu', .* something else")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_of_nearly_the_same_kind_are_refused(self, dtype):
        host = host_of("gpt2", dtype=dtype)
        host.transformer.h[1].mlp.act = nn.GELU()
        assert_refused(host, graft_config(**PLACEMENTS["neurons"]), "the activation 'gelu_new', .* something else")

    @pytest.mark.parametrize("num_experts", [10**2, 48**2], ids=["as_they_are", "found_by_the_router"])
    def test_on_the_device_of_the_host(self, num_experts):
        """A graft is made on the CPU; the host may be elsewhere, here on a device that every machine has."""
        model = grafted(host_of("gpt2").to("meta"), **{**PLACEMENTS["neurons"], "num_experts": num_experts})
        assert {tensor.device.type for tensor in grafts_of(model)[0].state_dict().values()} == {"meta"}

    def test_are_not_looked_for_when_weights_are_loaded(self, tmp_path, monkeypatch):
        """They may be quantized by then."""
        model = trained(grafted("gpt2", **PLACEMENTS["neurons"]))
        model.save_pretrained(tmp_path)
        host = host_of("gpt2")
        for name in ("computes", "_copy_neurons"):
            for module in (graft_initialization, graft_model):
                monkeypatch.setattr(module, name, lambda *_: pytest.fail("looked for"), raising=False)
        loaded = PeftModel.from_pretrained(host, tmp_path)
        assert torch.equal(logits_of(loaded.eval()), logits_of(model))
        host = host_of("gpt2")
        for parameter in host.transformer.h[1].mlp.parameters():
            parameter.requires_grad_(False).data = parameter.data.to(torch.int8)
        graft = grafts_of(PeftModel.from_pretrained(host, tmp_path))[0]
        assert torch.equal(graft.output_bias, grafts_of(model)[0].output_bias)


class TestTraining:
    @FAMILIES
    @ALL_PLACEMENTS
    def test_moves_the_graft_alone_and_comes_back_to_the_bit(self, family, fields, tmp_path):
        host = host_of(family)
        before = copy.deepcopy(host)
        host_logits = logits_of(host)
        model = grafted(host, **fields)
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trained(model)
        logits = logits_of(model)
        assert (logits - host_logits).abs().max() > 1e-3
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
        assert moved and all("peer_graft_layer" in name for name in moved)
        assert {"up_proj", "down_proj", "query_proj"} <= {part for name in moved for part in name.split(".")}
        assert any("sub_keys" in name for name in moved)
        assert fields.get("query_norm") != "batch" or any("running_var" in name for name in moved)
        with model.disable_adapter():
            assert torch.equal(logits_of(model), host_logits)
        assert torch.equal(logits_of(model), logits)

        model.save_pretrained(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert all(
            ".mlp.peer_graft_layer.router." in k or ".mlp.peer_graft_layer.expert_pool." in k or "output_bias" in k
            for k in saved
        )
        assert len(saved) == len(grafts_of(model)[0].state_dict())
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(copy.deepcopy(before), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
            assert torch.equal(logits_of(loaded.eval()), logits)
            assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.parameters())

    @FAMILIES
    def test_generates_with_a_cache_as_without(self, family):
        model = trained(grafted(family, query_norm="batch"))
        tokens = random_tokens(2, 5)
        tokens[0, :2] = 0
        options = {"attention_mask": (tokens != 0).long(), "max_new_tokens": 8, "do_sample": False}
        with_cache = model.generate(input_ids=tokens, **options)
        assert torch.equal(model.generate(input_ids=tokens, use_cache=False, **options), with_cache)

    def test_goes_on_from_a_saved_adapter(self, tmp_path):
        model = trained(grafted(query_norm="batch"))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(host_of(), tmp_path, is_trainable=True)
        assert torch.equal(logits_of(trained(loaded)), logits_of(trained(model)))

    @pytest.mark.parametrize("task_type", TASKS)
    def test_of_modules_besides(self, tmp_path, task_type):
        def host():
            torch.manual_seed(0)
            return TASKS[task_type].from_config(copy.deepcopy(HOSTS["llama"])).eval()

        model = get_peft_model(host(), graft_config(task_type=task_type))
        heads = [name for name, _ in model.named_parameters() if ".modules_to_save." in name]
        assert {name.split(".")[2] for name in heads} == HEADS.get(task_type, set())
        for name, parameter in model.named_parameters():
            if name in heads or ("down_proj.weight" in name and parameter.requires_grad):
                nn.init.normal_(parameter)
        tokens = random_tokens(2, 9)
        outputs = model.eval()(input_ids=tokens)[0]
        assert not torch.equal(outputs, host()(input_ids=tokens)[0])
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(host(), tmp_path).eval()
        assert torch.equal(loaded(input_ids=tokens)[0], outputs)

    def test_in_the_dtype_of_the_host_or_in_float32(self, tmp_path):
        tokens = random_tokens(2, 9)
        host = host_of(dtype=torch.bfloat16)
        before = logits_of(host)
        model = grafted(host, query_norm="batch")
        assert {parameter.dtype for parameter in grafts_of(model)[0].parameters()} == {torch.float32}
        assert torch.equal(logits_of(model), before)
        logits = logits_of(trained(model))
        assert logits.dtype == torch.bfloat16 and not torch.equal(logits, before)
        model.save_pretrained(tmp_path)
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(
                host_of(dtype=torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
            )
            assert torch.equal(logits_of(loaded.eval()), logits)
        narrow = get_peft_model(
            host_of(dtype=torch.bfloat16), graft_config(query_norm="batch"), autocast_adapter_dtype=False
        )
        graft = grafts_of(narrow)[0]
        assert {parameter.dtype for parameter in graft.parameters()} == {torch.bfloat16}
        assert graft.router.query_norm.running_var.dtype == torch.float32
        assert trained(narrow)(input_ids=tokens).logits.isfinite().all()
        assert graft.expert_pool.down_proj.weight.any()


class TestPadding:
    @pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
    @pytest.mark.parametrize("query_norm", ["rms", "batch"])
    def test_changes_no_token(self, family, query_norm):
        model = trained(grafted(family, query_norm=query_norm))
        tokens = random_tokens(2, 9)
        padded = torch.cat([torch.zeros(2, 4, dtype=torch.int64), tokens], dim=1)
        mask = (padded != 0).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        found = logits_of(model, padded, attention_mask=mask, position_ids=positions)[:, 4:]
        torch.testing.assert_close(found, logits_of(model, tokens), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_is_left_out_of_the_statistics(self, family):
        statistics = []
        tokens = random_tokens(2, 9)
        for width in (0, 5):
            model = grafted(family, query_norm="batch").train()
            padded = torch.cat([tokens, torch.zeros(2, width, dtype=torch.int64)], dim=1)
            model(input_ids=padded, attention_mask=(padded != 0).long())
            statistics.append(grafts_of(model)[0].router.query_norm.state_dict())
        torch.testing.assert_close(*statistics, rtol=1e-4, atol=1e-6)
        assert statistics[0]["num_batches_tracked"] == 1 and statistics[0]["running_mean"].abs().max() > 0

    def test_of_a_mask_given_by_position(self):
        model = grafted(query_norm="batch").train()
        tokens = random_tokens(2, 9)
        mask = torch.ones_like(tokens)
        mask[:, 4:] = 0
        model.base_model.model.model(tokens, mask)
        by_position = grafts_of(model)[0].router.query_norm.running_mean.clone()
        other = grafted(query_norm="batch").train()
        other(input_ids=tokens, attention_mask=mask)
        assert torch.equal(grafts_of(other)[0].router.query_norm.running_mean, by_position)

    def test_statistics_rest_without_gradients_and_when_frozen(self):
        model = grafted(query_norm="batch").train()
        tokens = random_tokens(2, 9)
        with torch.no_grad():
            model(input_ids=tokens)
        model.eval()(input_ids=tokens)
        with model.disable_adapter():
            model.train()(input_ids=tokens)
        assert grafts_of(model)[0].router.query_norm.num_batches_tracked == 0

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_activation_checkpointing_changes_nothing(self, family, use_reentrant):
        results = []
        for checkpointing in (False, True):
            model = grafted(family, query_norm="batch")
            nn.init.normal_(grafts_of(model)[0].expert_pool.down_proj.weight)
            if checkpointing:
                enable_checkpointing(model.base_model.model, {"use_reentrant": use_reentrant})
                model.enable_input_require_grads()
            tokens = random_tokens(2, 9)
            mask = torch.ones_like(tokens)
            mask[:, 6:] = 0
            model.train()(input_ids=tokens, attention_mask=mask, labels=tokens).loss.backward()
            graft = grafts_of(model)[0]
            gradients = [parameter.grad for parameter in graft.parameters()]
            model.eval()(input_ids=tokens)  # a second forward that the backward ran counts neither here nor there
            results.append((gradients, graft.router.query_norm.state_dict()))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)
        assert results[0][1]["num_batches_tracked"] == 1

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("query_norm", ["rms", None])
    def test_activation_checkpointing_of_two_forwards(self, query_norm, use_reentrant):
        """The backward runs the longer batch again, after the mask of the shorter one was seen."""
        results = []
        for checkpointing in (False, True):
            model = grafted(query_norm=query_norm)
            nn.init.normal_(grafts_of(model)[0].expert_pool.down_proj.weight)
            if checkpointing:
                enable_checkpointing(model.base_model.model, {"use_reentrant": use_reentrant})
                model.enable_input_require_grads()
            model.train()
            losses = [
                model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss
                for tokens in (random_tokens(2, 12), random_tokens(2, 5))
            ]
            sum(losses).backward()
            results.append([parameter.grad for parameter in grafts_of(model)[0].parameters()])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


class TestSeveralAdapters:
    def two(self, **fields):
        model = trained(grafted(adapter_name="first"))
        torch.manual_seed(1)
        model.add_adapter("second", graft_config(num_experts=6**2, layers_to_transform=[1, 2], **fields))
        return model

    def test_are_switched_added_up_and_deleted(self, tmp_path):
        model = self.two(expert_act="relu")
        first = logits_of(model)
        model.set_adapter("second")
        assert torch.equal(logits_of(model), logits_of(host_of()))
        trained(model)
        second = logits_of(model)
        assert not torch.equal(second, first)
        model.set_adapter("first")
        assert torch.equal(logits_of(model), first)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable and all(".first." in name for name in trainable)

        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(host_of(), tmp_path / "first", adapter_name="one").eval()
        loaded.load_adapter(tmp_path / "second", adapter_name="other")
        assert torch.equal(logits_of(loaded), first)
        loaded.set_adapter("other")
        assert torch.equal(logits_of(loaded), second)
        loaded.base_model.set_adapter(["one", "other"])
        both = logits_of(loaded)
        assert not torch.equal(both, first) and not torch.equal(both, second)
        # One after the other, at layers that only one of them has, or that both have.
        hidden_states = torch.randn(1, 3, 24)
        layer = loaded.base_model.model.model.layers[1].mlp
        expected = layer.base_layer(hidden_states) + sum(
            graft(hidden_states) for graft in layer.peer_graft_layer.values()
        )
        torch.testing.assert_close(layer(hidden_states), expected)

        loaded.delete_adapter("one")
        assert torch.equal(logits_of(loaded), second)
        assert len(grafts_of(loaded)) == 2 and list(loaded.peft_config) == ["other"]
        assert list(layer.peer_graft_placement) == ["other"]

    def test_two_cannot_be_in_one_place(self):
        model = grafted(adapter_name="first", placement="in_place")
        model.add_adapter("second", graft_config(placement="in_place", layers_to_transform=[1]))
        model.add_adapter("elsewhere", graft_config(placement="in_place", layers_to_transform=[2]))
        logits = logits_of(model)
        with pytest.raises(ValueError, match=r"Only one of the adapters \['first', 'second'\] can be in place of"):
            model.base_model.set_adapter(["first", "second"])
        assert torch.equal(logits_of(model), logits)
        with pytest.raises(ValueError, match=r"Only one of the adapters \['first', 'second'\] can be in place of"):
            model.base_model.model.model.layers[1].mlp.set_adapter(["first", "second"])  # as the library does
        assert torch.equal(logits_of(model), logits)
        before = state_of(model)
        with pytest.raises(
            ValueError, match=r"the adapters \['first', 'second'\] can be in place of model.layers.1.mlp"
        ):
            model.merge_and_unload(adapter_names=["first", "second"])
        assert_same_state(state_of(model), before)
        model.base_model.set_adapter(["first", "elsewhere"])
        assert not torch.equal(logits_of(model), logits)

    def test_of_a_name_in_the_model_are_refused(self):
        names = {
            "router": "the name of a part",
            "mlp": "the name of a part",
            "a.b": "which cannot",
            "keys": "which cannot",
            "training": "which cannot",
        }
        for name, message in names.items():
            host = host_of()
            with pytest.raises(ValueError, match=f"`adapter_name` is '{name}', {message}"):
                get_peft_model(host, graft_config(), adapter_name=name)
            assert_same_state(state_of(host), state_of(host_of()))

    def test_a_second_wrapping_warns(self):
        model = grafted()
        with pytest.warns(UserWarning, match="for a second time"):
            again = get_peft_model(model.base_model.model, graft_config(layers_to_transform=[2]), adapter_name="more")
        assert torch.equal(logits_of(again.eval()), logits_of(host_of()))

    def test_unloading_leaves_the_host(self):
        host = host_of()
        before = state_of(host)
        unloaded = trained(grafted(host)).unload()
        assert unloaded is host
        after = state_of(unloaded)
        assert_same_state((*after[:2], before[2], *after[3:]), before)

    def test_a_copy_lives_on_its_own(self):
        model = trained(grafted(query_norm="batch"))
        other = copy.deepcopy(model)
        logits = logits_of(model)
        trained(other)
        assert torch.equal(logits_of(model), logits)
        assert [grafts_of(m)[0].router.query_norm.num_batches_tracked.item() for m in (model, other)] == [3, 6]

    def test_merging_in_weights_is_refused(self):
        model = trained(grafted())
        logits = logits_of(model)
        with pytest.raises(ValueError, match=r"cannot be merged into the weights of its host. `merge_and_unload\(\)`"):
            model.merge_adapter()
        with pytest.raises(ValueError, match="A graft is never merged into the weights of its host"):
            model.unmerge_adapter()
        with pytest.raises(ValueError, match="Grafts cannot be averaged. `set_adapter`"):
            model.add_weighted_adapter(["default"], [1.0], "mean")
        assert torch.equal(logits_of(model), logits)

    def test_adapters_of_rows_are_refused(self):
        model = grafted()
        for call in (model, model.generate):
            with pytest.raises(ValueError, match="`adapter_names` of a batch's rows is not for grafts"):
                call(input_ids=random_tokens(2, 5), adapter_names=["default", "default"])


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"layers_to_transform": [3]},
                r"`layers_to_transform` must be numbers of layers, 0 to 2 in this host, got \[3\]",
            ),
            ({"layers_to_transform": -1}, "`layers_to_transform` must be numbers of layers"),
            ({"layers_to_transform": []}, "`layers_to_transform` must be numbers of layers"),
            ({"target_modules": ["nothing"]}, "`target_modules` names no module"),
            ({"target_modules": ["self_attn"]}, r"`target_modules` names model.layers.1.self_attn, a LlamaAttention"),
            ({"target_modules": ["up_proj"]}, r"`target_modules` names model.layers.1.mlp.up_proj, a Linear"),
        ],
    )
    def test_of_layers(self, fields, message):
        assert_refused(host_of(), graft_config(**fields), message)

    def test_of_other_modules_than_models(self):
        with pytest.raises(ValueError, match="needs a model of the library as its host, got Sequential"):
            get_peft_model(nn.Sequential(nn.Linear(2, 2)), PeerGraftConfig())

    def test_of_a_mixture_of_experts(self):
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        host = MixtralForCausalLM(MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, **sizes))
        assert_refused(host, graft_config(), "layer 0, where 0 feed-forwards were recognized")
        assert_refused(host, graft_config(target_modules=["mlp"]), "a MixtralSparseMoeBlock that is not recognized")

    def test_of_a_feed_forward_without_a_module(self):
        host = OPTForCausalLM(
            OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2)
        )
        assert_refused(host, graft_config(), "layer 0, where 0 feed-forwards were recognized")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"num_experts": 60}, "`num_experts` must be a perfect square"),
            ({"num_experts_per_head": 9}, "`num_experts_per_head` must be at most √num_experts = 8"),
            ({"query_size": 7}, "`query_size` must be even"),
            ({"num_retrieval_heads": 0}, "`num_retrieval_heads` must be at least 1"),
            ({"query_norm": "layer"}, "query_norm"),
            ({"expert_act": "none"}, "`expert_act` is 'none'"),
            ({"expert_kernels": "fast"}, "`expert_kernels` is 'fast'"),
            ({"placement": "after"}, "`placement` must be one of"),
            ({"init_from_ffn": True}, '`init_from_ffn` is for `placement="in_place"`'),
            ({"target_modules": "mlp", "layers_to_transform": 1}, "`layers_to_transform` cannot be used"),
            ({"layers_pattern": "h"}, "`layers_pattern` needs `layers_to_transform`"),
            ({"layers_to_transform": ["1"]}, r"`layers_to_transform` must be a number .* got \['1'\]"),
            ({"layers_to_transform": True}, "`layers_to_transform` must be a number .* got True"),
        ],
    )
    def test_of_values_when_the_configuration_is_made_or_used(self, fields, message):
        with pytest.raises(ValueError, match=message):
            graft_config(**fields)
        config = graft_config()
        for name, value in fields.items():
            setattr(config, name, value)
        assert_refused(host_of(), config, message)

    @pytest.mark.parametrize(
        ("family", "fields", "message"),
        [
            ("qwen3", {}, "`host_model_type` = 'llama', this one has 'qwen3'"),
            ("llama", {"num_hidden_layers": 4}, "`host_num_layers` = 3, this one has 4"),
            ("llama", {"hidden_size": 32}, "`host_hidden_size` = 24, this one has 32"),
            ("llama", {"intermediate_size": 40}, "`host_intermediate_size` = 32, this one has 40"),
            ("llama", {"mlp_bias": True}, "`host_has_biases` = False, this one has True"),
        ],
    )
    @pytest.mark.parametrize("added", [False, True], ids=["first", "added"])
    def test_of_adapters_of_another_host(self, tmp_path, family, fields, message, added):
        trained(grafted()).save_pretrained(tmp_path)
        host = host_of(family, **fields)
        if added:
            host = grafted(host, adapter_name="present")
        before = state_of(host)
        with pytest.raises(ValueError, match=message):
            host.load_adapter(tmp_path, "other") if added else PeftModel.from_pretrained(host, tmp_path)
        assert_same_state(state_of(host), before)

    def test_leaves_the_name_of_an_adapter_free(self, tmp_path):
        """Also where the library's own `load_adapter` injects it, which does not look after it."""
        for name, fields in (("fits", {}), ("other", {"hidden_size": 32})):
            trained(grafted(host_of(**fields))).save_pretrained(tmp_path / name)
        host = host_of()
        host.load_adapter(str(tmp_path / "fits"), adapter_name="one")
        with pytest.raises(ValueError, match="`host_hidden_size` = 32"):
            host.load_adapter(str(tmp_path / "other"), adapter_name="two")
        assert list(host.peft_config) == ["one"]
        expected = logits_of(PeftModel.from_pretrained(host_of(), tmp_path / "fits"))
        assert torch.equal(logits_of(host), expected)
        host.load_adapter(str(tmp_path / "fits"), adapter_name="two")

    @pytest.mark.parametrize("added", [False, True], ids=["first", "added"])
    def test_of_what_fails_on_the_way(self, added, monkeypatch):
        host = grafted(adapter_name="present", layers_to_transform=[0, 2]) if added else host_of()
        before, logits = state_of(host), logits_of(host)
        add_graft, calls = PeerGraftLayer.add_graft, []

        def fails_at_the_second(*args):
            calls.append(args)
            if len(calls) == 2:
                raise RuntimeError("out of memory")
            add_graft(*args)

        monkeypatch.setattr(PeerGraftLayer, "add_graft", fails_at_the_second)
        config = graft_config(layers_to_transform=[1, 2])
        with pytest.raises(RuntimeError, match="out of memory"):
            host.add_adapter("other", config) if added else get_peft_model(host, config)
        assert_same_state(state_of(host), before)
        assert torch.equal(logits_of(host), logits)

    def test_of_a_host_with_several_lists_of_layers(self):
        host = host_of()
        host.model.others = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
        assert_refused(host, graft_config(), r"has 2 lists .* = 3 layers, \['model.layers', 'model.others'\]")

    def test_of_adapters_of_another_method(self):
        model = grafted()
        with pytest.raises(ValueError, match="different peft types"):
            model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))


class TestConfiguration:
    def test_comes_back_from_its_file(self, tmp_path):
        config = graft_config(layers_to_transform=[1, 2], target_modules=["mlp"], query_norm=None, expert_act=None)
        config.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PEER_GRAFT"
        found = PeftConfig.from_pretrained(tmp_path)
        assert type(found) is PeerGraftConfig and found == config

    def test_says_what_was_found_in_the_host(self):
        config = grafted("gpt2", placement="in_place", init_from_ffn=True, num_experts=100).peft_config["default"]
        assert config.target_modules == {"transformer.h.1.mlp"}
        assert (config.expert_act, config.gated_experts) == ("gelu_new", False)
        assert (config.host_model_type, config.host_hidden_size, config.host_num_layers) == ("gpt2", 24, 3)
        assert (config.host_intermediate_size, config.host_has_biases) == (96, True)


class TestRegistration:
    """In processes of their own, as it is once for all."""

    def run(self, script):
        completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        assert completed.returncode == 0, completed.stderr
        return completed.stdout

    def test_is_done_once(self):
        script = """
import copy, pickle
import modeling_peer.graft.model as grafts
from modeling_peer.graft.registration import register_peer_graft
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
number = len(PeftType)
register_peer_graft(grafts.PeerGraftConfig, grafts.PeerGraftModel)
member = PeftType("PEER_GRAFT")
assert number == len(PeftType) and member is PeftType.PEER_GRAFT is PeftType["PEER_GRAFT"]
assert copy.deepcopy(member) is member is pickle.loads(pickle.dumps(member)) and member == "PEER_GRAFT"
assert PEFT_TYPE_TO_TUNER_MAPPING["PEER_GRAFT"] is grafts.PeerGraftModel
try:
    register_peer_graft(type("Other", (), {}), grafts.PeerGraftModel)
except ImportError as error:
    assert "has a method `PEER_GRAFT` already" in str(error)
    print("refused")
"""
        assert "refused" in self.run(script)

    BREAKAGES = {
        "old_release": "import importlib.metadata as m; m.version = lambda name: '0.20.1'",
        "other_enumeration": "type.__setattr__(PeftType, '_member_names_', tuple(PeftType._member_names_))",
        "other_registry": "import peft.utils; peft.utils.register_peft_method = lambda **k: None",
        "lost_field": "peft.config.PeftConfigMixin.to_dict = lambda self: {'peft_type': 'PEER_GRAFT', 'task_type': None}",
    }

    @pytest.mark.parametrize("breakage", BREAKAGES.values(), ids=BREAKAGES)
    def test_of_releases_where_it_does_not_work_is_refused(self, breakage):
        script = f"""
import peft, peft.mapping, peft.config, transformers
from peft import PeftType
before = dict(PeftType.__members__), [dict(r) for r in (peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING, peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING)]
{breakage}
try:
    import modeling_peer.graft.model
except ImportError as error:
    print("refused:", error)
after = dict(PeftType.__members__), [dict(r) for r in (peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING, peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING)]
assert before == after and not hasattr(PeftType, "PEER_GRAFT")
"""
        output = self.run(script)
        assert "refused:" in output and "0.21" in output

    def test_the_package_works_without_peft(self):
        script = """
import sys
sys.modules["peft"] = None
import modeling_peer, modeling_peer.graft_merged
del sys.modules["peft"]
sys.modules["accelerate"] = None
try:
    import modeling_peer.graft.model
except ImportError as error:
    assert error.name == "accelerate" and "not installed" not in str(error)  # of one that is broken
    print("broken")
sys.modules["peft"] = None
try:
    import modeling_peer.graft.model
except ImportError as error:
    assert "pip install modeling-peer[" in str(error)
    print("asked for")
"""
        assert self.run(script) == "broken\nasked for\n"


def test_recognises_feed_forwards_by_their_linear_layers():
    for family in HOSTS:
        parts = recognize_feed_forward(host_of(family).base_model.get_submodule(middle_feed_forward(family)))
        assert (parts.hidden_size, parts.intermediate_size) == (24, 96 if family == "gpt2" else 32)
        assert (parts.gate is None) == parts.has_biases == (family == "gpt2")
    assert recognize_feed_forward(nn.Linear(3, 3)) is None
    attention = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2)).transformer.h[0].attn
    assert recognize_feed_forward(attention) is None
    assert recognize_feed_forward(GraftedFeedForward(None, [])) is None
    # It is called with the residual too, which it adds.
    bloom = BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=2))
    assert recognize_feed_forward(bloom.transformer.h[0].mlp) is None
