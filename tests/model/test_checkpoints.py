# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk: saved and loaded whole, in parts and in other dtypes, offloaded, and broken."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors import safe_open
from tiny_models import EXPERTS, GROWN, ROUTERS, VARIANTS, random_tokens, tiny_config, tiny_model
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    QuantoConfig,
)

from modeling_peer import PeerConfig, PeerForCausalLM, PeerForSequenceClassification


CONFIGS = VARIANTS | GROWN
CONFIGS |= {name: ROUTERS[name] for name in ("rms-sigmoid-own_keys", "None-relu-shared_keys")}
CONFIGS |= {name: EXPERTS[name] for name in ("gelu-gated-branch-one_pool", "None-plain-branch-own_pool")}


def same(a, b):
    return torch.equal(a, b) and a.dtype == b.dtype


@torch.no_grad()
def logits_of(model):
    return model.eval()(random_tokens(2, 9)).logits


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_saved_model_loads_with_bit_equal_logits(config, tmp_path):
    model = tiny_model(config)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is PeerForCausalLM
    assert not any(report.values())
    assert same(logits_of(loaded), logits_of(model))


def test_sharded(tmp_path):
    model = tiny_model(VARIANTS["all_in_one"])
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert same(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(model))


def test_in_bfloat16_but_for_the_running_statistics(tmp_path):
    model = tiny_model(VARIANTS["all_in_one"])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for key, buffer in model.named_buffers():
        if "running" in key:
            assert same(loaded.get_buffer(key), buffer)
    expected = logits_of(PeerForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))
    assert same(logits_of(loaded), expected)
    assert loaded.config.dtype == torch.bfloat16
    loaded.save_pretrained(tmp_path / "again")
    assert same(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)


def test_quantized_at_load(tmp_path):
    model = tiny_model(VARIANTS["peer"])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QuantoConfig(weights="int8"))
    assert type(loaded.model.layers[0].mlp.router.query_proj).__name__ == "QLinear"
    expected = logits_of(model)
    assert 0 < (logits_of(loaded) - expected).abs().median() < 0.1 * expected.std()


def test_saved_quantized(tmp_path):
    """By bitsandbytes, where it is: it computes the same when it is loaded again."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is in no extra: it is large, and little of it is tested")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "query_size": 32}  # multiples of its blocks
    tiny_model(tiny_config("peer", "dense", **sizes)).save_pretrained(tmp_path / "full")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=options, device_map="cpu")
    assert type(quantized.model.layers[0].mlp.router.query_proj) is not torch.nn.Linear
    quantized.save_pretrained(tmp_path / "quantized")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", device_map="cpu")
    assert same(logits_of(loaded), logits_of(quantized))


def test_shared_pool_is_stored_once(tmp_path):
    tiny_model(tiny_config("peer", "peer", share_experts_across_layers=True)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = file.keys()  # a file itself cannot be iterated over
    tables = [key for key in keys if "expert_pool" in key]
    assert tables == ["model.expert_pool.down_proj.weight", "model.expert_pool.up_proj.weight"]


@pytest.mark.parametrize(
    "config",
    [
        VARIANTS["all_in_one"],
        tiny_config("peer", "peer", share_experts_across_layers=True, gated_experts=True),
        tiny_config("dense", "peer", tie_word_embeddings=True, expert_kernels="cpu"),
    ],
    ids=["all_in_one", "shared_pool", "kernels_by_name"],
)
def test_disk_offload(config, tmp_path):
    """With and without gradients: where the experts are is known once the hook of a table has loaded it."""
    model = tiny_model(config)
    model.save_pretrained(tmp_path / "checkpoint")
    device_map = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    device_map |= {f"model.layers.{layer}": "disk" for layer in range(config.num_hidden_layers)}
    if config.share_experts_across_layers:
        device_map["model.expert_pool"] = "disk"
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert all(p.device.type == "meta" for name, p in loaded.named_parameters() if "mlp" in name or "pool" in name)
    assert_close(logits_of(loaded), logits_of(model))
    generated = loaded.generate(random_tokens(1, 4), max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(random_tokens(1, 4), max_new_tokens=4, do_sample=False))
    assert_close(loaded(random_tokens(1, 4)).logits, model(random_tokens(1, 4)).logits)


def test_automatic_device_map_offloads_what_does_not_fit(tmp_path):
    model = tiny_model(tiny_config("dense", "peer", "dense"))
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint", device_map="auto", max_memory={"cpu": 40_000}, offload_folder=tmp_path / "offload"
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert_close(logits_of(loaded), logits_of(model))


def test_initialization_from_the_meta_device_equals_that_on_the_cpu():
    config = VARIANTS["all_in_one"]
    torch.manual_seed(0)
    loaded = PeerForCausalLM.from_pretrained(None, config=config, state_dict={})
    fresh = PeerForCausalLM(config)
    for (name, ours), theirs in zip(loaded.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert ours.isfinite().all()
        if ours.is_floating_point() and theirs.numel() > 300:
            assert 0.8 < ours.std() / theirs.std() < 1.25, name


@pytest.mark.parametrize("k", [1, 6])
def test_more_or_fewer_experts_per_head_at_load(k, tmp_path):
    model = tiny_model(tiny_config("dense", "peer", num_experts_per_head=3))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, num_experts_per_head=k).eval()
    hidden_states = torch.randn(2, 5, 24)
    indices, _ = model.model.layers[1].mlp.router(hidden_states)
    other_indices, other_weights = loaded.model.layers[1].mlp.router(hidden_states)
    assert other_indices.shape[-1] == k
    assert torch.equal(other_indices[..., :3], indices[..., :k])
    assert torch.allclose(other_weights.sum(-1), torch.ones(2, 5, 2))


class TestBrokenCheckpoints:
    """Refused with what is wrong, and nothing half-written stays."""

    def checkpoint(self, folder, **fields):
        """A saved model, the file of its weights, and other fields in its configuration."""
        tiny_model(VARIANTS["peer"]).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))
        return folder / "model.safetensors"

    @pytest.mark.parametrize("damage", [lambda data: data[:-1000], lambda data: b"\xff" * 8 + data[8:]])
    def test_damaged_file(self, damage, tmp_path):
        file = self.checkpoint(tmp_path)
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(Exception, match="(?i)incomplete|buffer|header|truncated"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_other_shapes(self, tmp_path):
        self.checkpoint(tmp_path, num_experts=64)
        with pytest.raises(RuntimeError, match="mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_missing_and_extra_keys_are_reported(self, tmp_path):
        model = tiny_model(VARIANTS["peer"])
        state = model.state_dict()
        state["model.layers.0.mlp.something"] = state.pop("model.layers.0.mlp.expert_pool.up_proj.weight")
        model.save_pretrained(tmp_path, state_dict=state)
        _, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert report["missing_keys"] == {"model.layers.0.mlp.expert_pool.up_proj.weight"}
        assert report["unexpected_keys"] == {"model.layers.0.mlp.something"}

    def test_a_later_format_is_refused(self, tmp_path):
        self.checkpoint(tmp_path, format_version=2)
        with pytest.raises(StrictDataclassClassValidationError, match="`format_version`"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_an_invalid_configuration_is_not_saved(self, tmp_path):
        model = tiny_model(VARIANTS["peer"])
        model.config.num_experts_per_head = 7  # of √36 = 6
        with pytest.raises(StrictDataclassClassValidationError, match="`num_experts_per_head`"):
            model.save_pretrained(tmp_path / "checkpoint")
        assert not [file for file in (tmp_path / "checkpoint").iterdir() if file.suffix != ".py"]


def test_auto_classes_know_every_head(tmp_path):
    config = tiny_config("peer", num_labels=3)
    assert type(AutoModel.from_config(config)).__name__ == "PeerModel"
    model = AutoModelForSequenceClassification.from_config(config)
    assert type(model) is PeerForSequenceClassification
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is PeerConfig
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert same(logits_of(loaded), logits_of(model))
    # A base model in a head's checkpoint, and a head on a base model's.
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base.embed_tokens.weight, model.model.embed_tokens.weight)
