# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
New grafts on six families of base models: where they go, and what they compute at first. What does not fit is refused,
and leaves the base model as it was.
"""

import copy

import pytest
import torch
from graft_models import (
    BASE_MODELS,
    PLACEMENTS,
    SIZES,
    assert_refused,
    assert_same_state,
    base_model_of,
    graft_config,
    grafted,
    grafts_of,
    logits_of,
    middle_feed_forward,
    state_of,
    trained,
)
from literal_algorithm import literal_peer
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
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
)

from modeling_peer.graft import initialization as graft_initialization
from modeling_peer.graft import model as graft_model
from modeling_peer.graft.base_feed_forward import recognize_feed_forward, weight_matrix
from modeling_peer.graft.initialization import neuron_cells
from modeling_peer.graft.model import PeerGraftConfig, PeerGraftLayer
from modeling_peer.graft_layer import GraftedFeedForward


class TestStart:
    @pytest.mark.parametrize("family", BASE_MODELS)
    @pytest.mark.parametrize("query_norm", ["rms", "batch"])
    def test_beside_it_is_nothing(self, family, query_norm):
        base_model = base_model_of(family)
        before = logits_of(base_model)
        model = grafted(base_model, query_norm=query_norm)
        assert isinstance(base_model.base_model.get_submodule(middle_feed_forward(family)), PeerGraftLayer)
        assert len(grafts_of(model)) == 1
        assert torch.equal(logits_of(model), before)
        assert torch.equal(logits_of(model.train()), before)

    @pytest.mark.parametrize(
        ("fields", "layers"),
        [
            ({"layers_to_transform": [0, 2]}, "02"),
            ({"layers_to_transform": 2}, "2"),
            ({"layers_to_transform": [1, 1]}, "1"),
            ({"target_modules": ["mlp"], "layers_to_transform": [0, 2]}, "02"),
            ({"target_modules": r".*\.[12]\.mlp"}, "12"),
            ({"target_modules": ["model.layers.2.mlp"]}, "2"),
            ({"target_modules": ["mlp"], "layers_to_transform": [2], "layers_pattern": "layers"}, "2"),
        ],
    )
    def test_on_chosen_layers(self, fields, layers):
        model = grafted(**fields)
        names = {
            name.split("layers.")[1][0] for name, module in model.named_modules() if type(module) is PeerGraftLayer
        }
        assert names == set(layers)

    @pytest.mark.parametrize("fields", PLACEMENTS.values(), ids=PLACEMENTS)
    def test_equals_algorithm_1(self, fields):
        base_model = base_model_of(dtype=torch.float64)
        feed_forward = copy.deepcopy(base_model.model.layers[1].mlp)
        model = grafted(base_model, sub_keys_per_head=True, **fields)
        graft = grafts_of(model)[0]
        assert graft.router.sub_keys.dtype == torch.float64
        graft.double()  # running statistics too
        for name, tensor in graft.named_parameters():
            nn.init.uniform_(tensor, 0.5, 1.5) if "norm" in name else nn.init.normal_(tensor)
        hidden_states = torch.randn(2, 3, 24, dtype=torch.float64)
        with torch.no_grad():
            output = base_model.model.layers[1].mlp(hidden_states)
            expected = literal_peer(graft.config, graft, hidden_states)
            if fields.get("placement") != "in_place":
                expected = expected + feed_forward(hidden_states)
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)

    def test_again_with_a_configuration_that_was_filled_in(self):
        """Neurons anew; only what was read from a file waits for weights."""
        config = graft_config(**PLACEMENTS["neurons"])
        for _ in range(2):
            down = grafts_of(get_peft_model(base_model_of(), config))[0].expert_pool.down_proj.weight
            assert down.any(1).sum() == 32
        assert_refused(base_model_of("gpt2"), config, "`host_model_type`")

    @pytest.mark.parametrize("kind", ["llava", "gemma3"])
    def test_in_the_decoder_of_text(self, kind):
        """Not in the tower of images, of as many layers."""
        text = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
        text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
        vision = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2}
        vision |= {"image_size": 28, "patch_size": 14}
        if kind == "gemma3":
            base_model = Gemma3ForConditionalGeneration(Gemma3Config(vision_config=vision, text_config=text))
        else:
            configs = {"vision_config": {**vision, "model_type": "siglip_vision_model"}}
            configs["text_config"] = {**text, "model_type": "llama"}
            base_model = LlavaForConditionalGeneration(LlavaConfig(**configs))
        model = get_peft_model(base_model.eval(), graft_config(layers_to_transform=[0]))
        assert model.peft_config["default"].target_modules == {"model.language_model.layers.0.mlp"}
        before = logits_of(model)
        nn.init.normal_(grafts_of(model)[0].expert_pool.down_proj.weight)
        assert not torch.equal(logits_of(model), before)


class TestNeurons:
    """In place of a feed-forward, from its own neurons: all at a softmax's mean weight are the feed-forward."""

    @pytest.mark.parametrize("num_experts", [10**2, 48**2], ids=["as_they_are", "found_by_the_router"])
    @pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
    def test_are_experts(self, family, num_experts):
        base_model = base_model_of(family, dtype=torch.float64)
        feed_forward = copy.deepcopy(base_model.base_model.get_submodule(middle_feed_forward(family)))
        graft = grafts_of(grafted(base_model, **{**PLACEMENTS["neurons"], "num_experts": num_experts}))[0]
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
        """With as many features as neurons of a head, every head retrieves the largest of its share."""
        base_model = base_model_of(family)
        fields = {**PLACEMENTS["neurons"], "num_experts": 48**2, "query_size": 128, "query_norm": query_norm}
        feed_forward = copy.deepcopy(base_model.base_model.get_submodule(middle_feed_forward(family)))
        graft, parts = grafts_of(grafted(base_model, **fields))[0], recognize_feed_forward(feed_forward)
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
            ({"num_experts": 5**2}, "`num_experts` must be at least 32"),
            ({"expert_act": "relu"}, "`expert_act`"),
            ({"gated_experts": False}, "`gated_experts`"),
        ],
    )
    def test_that_do_not_fit_are_refused(self, fields, message):
        assert_refused(base_model_of(), graft_config(**{**PLACEMENTS["neurons"], **fields}), message)

    @pytest.mark.parametrize("num_experts", [10**2, 48**2], ids=["as_they_are", "found_by_the_router"])
    def test_on_the_device_of_the_host(self, num_experts):
        """A graft is made on the CPU; the base model may be elsewhere, here on a device that every machine has."""
        model = grafted(base_model_of("gpt2").to("meta"), **{**PLACEMENTS["neurons"], "num_experts": num_experts})
        assert {tensor.device.type for tensor in grafts_of(model)[0].state_dict().values()} == {"meta"}

    def test_are_not_looked_for_when_weights_are_loaded(self, tmp_path, monkeypatch):
        """They may be quantized by then."""
        model = trained(grafted("gpt2", **PLACEMENTS["neurons"]))
        model.save_pretrained(tmp_path)
        base_model = base_model_of("gpt2")
        for module, name in ((graft_model, "_check_neurons"), (graft_initialization, "_copy_neurons")):
            monkeypatch.setattr(module, name, lambda *_: pytest.fail("looked for"))
        loaded = PeftModel.from_pretrained(base_model, tmp_path)
        assert torch.equal(logits_of(loaded.eval()), logits_of(model))
        base_model = base_model_of("gpt2")
        for parameter in base_model.transformer.h[1].mlp.parameters():
            parameter.requires_grad_(False).data = parameter.data.to(torch.int8)
        graft = grafts_of(PeftModel.from_pretrained(base_model, tmp_path))[0]
        assert torch.equal(graft.output_bias, grafts_of(model)[0].output_bias)


def test_recognises_feed_forwards_by_their_linear_layers():
    for family in BASE_MODELS:
        parts = recognize_feed_forward(base_model_of(family).base_model.get_submodule(middle_feed_forward(family)))
        assert (parts.hidden_size, parts.intermediate_size) == (24, 96 if family == "gpt2" else 32)
        assert (parts.gate is None) == parts.has_biases == (family == "gpt2")
    assert recognize_feed_forward(nn.Linear(3, 3)) is None
    attention = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2)).transformer.h[0].attn
    assert recognize_feed_forward(attention) is None
    assert recognize_feed_forward(GraftedFeedForward(None, [])) is None
    # It is called with the residual too, which it adds.
    bloom = BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=2))
    assert recognize_feed_forward(bloom.transformer.h[0].mlp) is None


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"layers_to_transform": [3]}, "`layers_to_transform`"),
            ({"layers_to_transform": -1}, "`layers_to_transform`"),
            ({"layers_to_transform": []}, "`layers_to_transform`"),
            ({"target_modules": ["nothing"]}, "`target_modules`"),
            ({"target_modules": ["self_attn"]}, "`target_modules`"),
            ({"target_modules": ["up_proj"]}, "`target_modules`"),
        ],
    )
    def test_of_layers(self, fields, message):
        assert_refused(base_model_of(), graft_config(**fields), message)

    def test_of_other_modules_than_models(self):
        with pytest.raises(ValueError, match="got Sequential"):
            get_peft_model(nn.Sequential(nn.Linear(2, 2)), PeerGraftConfig())

    def test_of_a_mixture_of_experts(self):
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        base_model = MixtralForCausalLM(
            MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, **sizes)
        )
        assert_refused(base_model, graft_config(), "`layers_to_transform`")
        assert_refused(base_model, graft_config(target_modules=["mlp"]), "a MixtralSparseMoeBlock")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"num_experts": 60}, "`num_experts`"),
            ({"expert_act": "none"}, "`expert_act`"),
            ({"placement": "after"}, "`placement`"),
            ({"init_from_ffn": True}, "`init_from_ffn`"),
        ],
    )
    def test_of_values_when_the_configuration_is_made_or_used(self, fields, message):
        with pytest.raises(ValueError, match=message):
            graft_config(**fields)
        config = graft_config()
        for name, value in fields.items():
            setattr(config, name, value)
        assert_refused(base_model_of(), config, message)

    @pytest.mark.parametrize(
        ("family", "fields", "message"),
        [
            ("qwen3", {}, "host_model_type"),
            ("llama", {"num_hidden_layers": 4}, "host_num_layers"),
            ("llama", {"hidden_size": 32}, "host_hidden_size"),
            ("llama", {"intermediate_size": 40}, "host_intermediate_size"),
            ("llama", {"mlp_bias": True}, "host_has_biases"),
        ],
    )
    @pytest.mark.parametrize("added", [False, True], ids=["first", "added"])
    def test_of_adapters_of_another_host(self, tmp_path, family, fields, message, added):
        trained(grafted()).save_pretrained(tmp_path)
        base_model = base_model_of(family, **fields)
        if added:
            base_model = grafted(base_model, adapter_name="present")
        before = state_of(base_model)
        with pytest.raises(ValueError, match=message):
            base_model.load_adapter(tmp_path, "other") if added else PeftModel.from_pretrained(base_model, tmp_path)
        assert_same_state(state_of(base_model), before)

    def test_of_a_base_model_with_several_lists_of_layers(self):
        base_model = base_model_of()
        base_model.model.others = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
        assert_refused(base_model, graft_config(), "has 2 lists")
