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
"""Saved and loaded again, in every way a checkpoint travels on disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from kernels_used import INFERENCE
from safetensors import safe_open
from slow_tests import slow
from tiny_models import ALL_CONFIGS, VARIANTS, random_tokens, tiny_config, tiny_model
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    QuantoConfig,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from modeling_peer import PeerConfig, PeerForCausalLM, PeerForSequenceClassification
from modeling_peer.checkpoint_conversion import PER_HEAD_TENSORS


PACKAGE_ROOT = Path(__file__).parents[2]


def same(a, b):
    return torch.equal(a, b) and a.dtype == b.dtype


@torch.no_grad()
def logits_of(model):
    return model.eval()(random_tokens(2, 9)).logits


@pytest.mark.parametrize("config", ALL_CONFIGS.values(), ids=ALL_CONFIGS)
def test_a_saved_model_loads_with_bit_equal_logits(config, tmp_path):
    model = tiny_model(config)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is PeerForCausalLM
    assert not any(report.values())
    assert same(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("name", ["peer", "pkm", "moe", "all_in_one"])
def test_sharded(name, tmp_path):
    model = tiny_model(VARIANTS[name])
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert same(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(model))


@pytest.mark.parametrize("name", ["peer", "pkm", "moe", "all_in_one"])
def test_in_bfloat16_but_for_the_running_statistics(name, tmp_path):
    model = tiny_model(VARIANTS[name])
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


@pytest.mark.parametrize("heads", [1, 2])
def test_quantized_at_load(heads, tmp_path):
    tiny_model(VARIANTS["peer"]).save_pretrained(tmp_path)
    expected = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path, num_retrieval_heads=heads))
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, num_retrieval_heads=heads, quantization_config=QuantoConfig(weights="int8")
    )
    assert type(loaded.model.layers[0].mlp.router.query_proj).__name__ == "QLinear"
    assert 0 < (logits_of(loaded) - expected).abs().median() < 0.1 * expected.std()


def test_tensors_are_converted_only_where_heads_are_dropped(tmp_path):
    """Elsewhere a conversion would take the place of those by which quantizers read what they have saved."""
    tiny_model(VARIANTS["peer"]).save_pretrained(tmp_path)

    def converted(**arguments):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, **arguments)
        applied = [each for each in model._weight_conversions if isinstance(each, WeightConverter)]
        registered = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightConverter)]
        assert not registered  # for whatever is loaded next
        return model.config.num_retrieval_heads, len(applied)

    fewer = AutoConfig.from_pretrained(tmp_path)
    fewer.num_retrieval_heads = 1
    assert converted() == converted(num_retrieval_heads=2) == converted(config=PeerConfig.from_pretrained(tmp_path))
    assert converted() == (2, 0)
    assert converted(num_retrieval_heads=1) == converted(config=fewer) == (1, len(PER_HEAD_TENSORS))
    assert converted() == (2, 0)


def test_heads_of_a_quantized_checkpoint_are_not_dropped(tmp_path):
    tiny_model(VARIANTS["peer"]).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "quanto", "weights": "int8"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="of a quantized checkpoint cannot be lowered at load: it has 2 heads, got 1"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_retrieval_heads=1)


def test_saved_quantized(tmp_path):
    """By bitsandbytes, where it is: it computes the same when it is loaded again."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is in no extra: it is large, and little of it is tested")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "query_size": 32}  # multiples of its blocks
    tiny_model(tiny_config("peer", "dense", **sizes)).save_pretrained(tmp_path / "full")
    for options in ({"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}):
        quantized = AutoModelForCausalLM.from_pretrained(
            tmp_path / "full", quantization_config=BitsAndBytesConfig(**options), device_map="cpu"
        )
        assert type(quantized.model.layers[0].mlp.router.query_proj).__name__.startswith("Linear")
        assert type(quantized.model.layers[0].mlp.router.query_proj) is not torch.nn.Linear
        quantized.save_pretrained(tmp_path / "quantized")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", device_map="cpu")
        assert same(logits_of(loaded), logits_of(quantized))


def test_shared_pool_is_stored_once(tmp_path):
    model = tiny_model(tiny_config("peer", "peer", share_experts_across_layers=True))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = file.keys()  # a file itself cannot be iterated over
    tables = [key for key in keys if "expert_pool" in key]
    assert tables == ["model.expert_pool.down_proj.weight", "model.expert_pool.up_proj.weight"]


@pytest.mark.parametrize(
    "config",
    [
        VARIANTS["all_in_one"],
        tiny_config("peer", "peer", share_experts_across_layers=True, gated_experts=True),
        tiny_config("dense", "peer", tie_word_embeddings=True),
    ],
)
def test_disk_offload(config, tmp_path, used_kernels):
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
    assert same(logits_of(loaded), logits_of(model))
    generated = loaded.generate(random_tokens(1, 4), max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(random_tokens(1, 4), max_new_tokens=4, do_sample=False))
    assert used_kernels == INFERENCE


def test_disk_offload_with_kernels_by_name_and_gradients(tmp_path):
    """Where the experts are is known once the hook of a table has loaded it."""
    model = tiny_model(tiny_config("peer", "dense", expert_kernels="cpu"))
    model.save_pretrained(tmp_path / "checkpoint")
    device_map = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    device_map |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(loaded(random_tokens(1, 4)).logits, model(random_tokens(1, 4)).logits)


def test_automatic_device_map_offloads_what_does_not_fit(tmp_path):
    model = tiny_model(tiny_config("dense", "peer", "dense"))
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint", device_map="auto", max_memory={"cpu": 40_000}, offload_folder=tmp_path / "offload"
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert same(logits_of(loaded), logits_of(model))


def test_initialisation_from_the_meta_device_equals_that_on_the_cpu(tmp_path):
    config = VARIANTS["all_in_one"]
    tiny_model(config).save_pretrained(tmp_path)
    # Without its weights, every parameter is initialized after it left the meta device.
    torch.manual_seed(0)
    loaded = PeerForCausalLM.from_pretrained(None, config=config, state_dict={})
    fresh = PeerForCausalLM(config)
    for (name, ours), theirs in zip(loaded.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert ours.isfinite().all()
        if ours.is_floating_point() and theirs.numel() > 300:
            assert 0.8 < ours.std() / theirs.std() < 1.25, name


class TestHeadsAndExpertsPerHead:
    """A trained layer's cost can be set at load: k raised or lowered, h lowered."""

    @pytest.mark.parametrize("options", [{}, {"sub_keys_per_head": True}, {"query_norm": "rms"}, {"query_norm": None}])
    def test_fewer_heads_are_the_first_ones(self, options, tmp_path):
        model = tiny_model(tiny_config("dense", "peer", num_retrieval_heads=4, **options))
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, num_retrieval_heads=2)
        hidden_states = torch.randn(2, 5, 24)
        indices, weights = model.model.layers[1].mlp.router(hidden_states)
        fewer_indices, fewer_weights = loaded.eval().model.layers[1].mlp.router(hidden_states)
        assert torch.equal(fewer_indices, indices[:, :, :2])
        assert torch.allclose(fewer_weights, weights[:, :, :2])
        assert loaded.config.num_experts_per_tok == 6

        loaded.save_pretrained(tmp_path / "fewer")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "fewer")
        assert again.config.num_retrieval_heads == 2
        assert same(logits_of(again), logits_of(loaded))

    @pytest.mark.parametrize("k", [1, 2, 6])
    def test_more_or_fewer_experts_per_head(self, k, tmp_path):
        model = tiny_model(tiny_config("dense", "peer", num_experts_per_head=3))
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, num_experts_per_head=k).eval()
        hidden_states = torch.randn(2, 5, 24)
        indices, _ = model.model.layers[1].mlp.router(hidden_states)
        other_indices, other_weights = loaded.model.layers[1].mlp.router(hidden_states)
        assert other_indices.shape[-1] == k
        assert torch.equal(other_indices[..., :3], indices[..., :k])
        assert torch.allclose(other_weights.sum(-1), torch.ones(2, 5, 2))

    def test_fewer_heads_of_weights_alone(self, tmp_path):
        """A state dict has no configuration that says how many heads it has."""
        model = tiny_model(tiny_config("dense", "peer", num_retrieval_heads=4))
        model.save_pretrained(tmp_path)
        expected = PeerForCausalLM.from_pretrained(tmp_path, num_retrieval_heads=2)
        weights = model.state_dict()
        loaded = PeerForCausalLM.from_pretrained(None, config=expected.config, state_dict=weights)
        assert torch.equal(logits_of(loaded.eval()), logits_of(expected.eval()))

    def test_heads_that_are_no_integer_are_refused_by_their_field(self, tmp_path):
        tiny_model(tiny_config("dense", "peer")).save_pretrained(tmp_path)
        with pytest.raises(Exception, match="field 'num_retrieval_heads'"):
            PeerForCausalLM.from_pretrained(tmp_path, num_retrieval_heads="1")

    def test_more_heads_than_were_trained_are_refused(self, tmp_path):
        tiny_model(tiny_config()).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="`num_retrieval_heads` can be lowered at load, not raised.*has 2.*got 4"):
            AutoModelForCausalLM.from_pretrained(tmp_path, num_retrieval_heads=4)


class TestRemoteCode:
    """A checkpoint carries the code it needs."""

    def save(self, folder):
        model = tiny_model(VARIANTS["all_in_one"])
        model.save_pretrained(folder)
        torch.save((random_tokens(2, 9), logits_of(model)), folder / "expected.pt")
        return model

    def run(self, script, folder, tmp_path, **environment):
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", **environment}
        result = subprocess.run(
            [sys.executable, "-I" if "PYTHONPATH" not in environment else "-B", "-c", script, str(folder)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    def test_all_classes_are_named(self, tmp_path):
        self.save(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert set(config["auto_map"]) == {
            "AutoConfig",
            "AutoModel",
            "AutoModelForCausalLM",
            "AutoModelForQuestionAnswering",
            "AutoModelForSequenceClassification",
            "AutoModelForTokenClassification",
        }

    def test_it_loads_where_the_package_is_not(self, tmp_path):
        folder = tmp_path / "checkpoint"
        self.save(folder)
        script = """
import sys, torch
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_peer":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForQuestionAnswering,
                          AutoModelForSequenceClassification, AutoModelForTokenClassification)
folder = sys.argv[1]
tokens, expected = torch.load(folder + "/expected.pt")
for auto_class in (AutoModelForSequenceClassification, AutoModelForQuestionAnswering, AutoModelForTokenClassification,
                   AutoModel):  # heads first: nothing else has made the base model known
    assert auto_class.from_pretrained(folder, trust_remote_code=True).config.model_type == "peer"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert torch.equal(model(tokens).logits, expected)
model.generate(tokens, max_new_tokens=2)
model.save_pretrained(folder + "/again")  # the code travels on
again = AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True)
assert torch.equal(again(tokens).logits, expected)
fewer = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, num_retrieval_heads=1)
assert fewer.config.num_experts_per_tok == 3
quantization = sys.modules[type(model).__module__.rpartition(".")[0] + ".quantization"]
quantization.quantize_experts(model, bits=4).save_pretrained(folder + "/quantized")
quantized = AutoModelForCausalLM.from_pretrained(folder + "/quantized", trust_remote_code=True)
assert torch.equal(quantized(tokens).logits, model(tokens).logits)
assert "modeling_peer" not in sys.modules
print("loaded", type(model).__module__)
"""
        assert "loaded transformers_modules" in self.run(script, folder, tmp_path)

    @slow
    def test_the_package_and_a_copy_live_in_one_process(self, tmp_path):
        folder = tmp_path / "checkpoint"
        self.save(folder)
        script = """
import sys, torch
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
tokens, expected = torch.load(folder + "/expected.pt")
copy = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
import modeling_peer
package = AutoModelForCausalLM.from_pretrained(folder)
assert type(package) is modeling_peer.PeerForCausalLM and type(copy) is not type(package)
copy_again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, num_retrieval_heads=1)
# Each quantizes tables of its own, whichever was loaded last.
config = modeling_peer.PeerQuantizationConfig(bits=4)
quantized = [type(each).from_pretrained(folder, quantization_config=config) for each in (copy, package, copy)]
quantized[1].save_pretrained(folder + "/quantized")
quantized.append(type(copy).from_pretrained(folder + "/quantized"))
assert all(torch.equal(each(tokens).logits, quantized[0](tokens).logits) for each in quantized)
for model in (copy, package):
    assert torch.equal(model(tokens).logits, expected)
    loss = model(tokens, labels=tokens, output_router_indices=True)
    assert len(loss.router_indices) == 3
    model.train()(tokens, labels=tokens).loss.backward()
# Neither has written over the other's operators.
kernels = [sys.modules[type(m).__module__.rpartition(".")[0] + ".expert_operators"] for m in (copy, package)]
assert kernels[0].expert_up is not kernels[1].expert_up and kernels[0].NAMESPACE != kernels[1].NAMESPACE
for module in kernels:
    module.ALL_EXPERT_KERNELS["cpu"].up = lambda *args, module=module: torch.full(args[1].shape, float(id(module)))
    up = getattr(torch.ops, module.NAMESPACE).expert_up
    output = up(torch.ones(2, 4), torch.zeros(2, 3, dtype=torch.int64), torch.ones(5, 4), "cpu", False)
    assert (output == torch.tensor(float(id(module)))).all()
print("both")
"""
        assert "both" in self.run(script, folder, tmp_path, PYTHONPATH=str(PACKAGE_ROOT))


class TestBrokenCheckpoints:
    """Refused with what is wrong, and nothing half-written stays."""

    def checkpoint(self, folder):
        tiny_model(VARIANTS["peer"]).save_pretrained(folder)
        return folder / "model.safetensors"

    def test_truncated_file(self, tmp_path):
        file = self.checkpoint(tmp_path)
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(Exception, match="(?i)incomplete|buffer|header|truncated"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_broken_header(self, tmp_path):
        file = self.checkpoint(tmp_path)
        file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
        with pytest.raises(Exception, match="(?i)header"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_other_shapes(self, tmp_path):
        self.checkpoint(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts": 64}))
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
        self.checkpoint(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["format_version"] == 1
        (tmp_path / "config.json").write_text(json.dumps(config | {"format_version": 2}))
        with pytest.raises(StrictDataclassClassValidationError, match="`format_version` is 2.*reads versions 1 to 1"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_saving_an_invalid_configuration_writes_nothing(self, tmp_path):
        model = tiny_model(VARIANTS["peer"])
        model.config.num_experts_per_head = 7  # of √36 = 6
        with pytest.raises(StrictDataclassClassValidationError, match="`num_experts_per_head` must be at most"):
            model.save_pretrained(tmp_path / "checkpoint")
        assert not list((tmp_path / "checkpoint").glob("*"))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("num_retrieval_heads", 1),
            ("num_experts", 49),
            ("query_size", 4),
            ("query_norm", None),
            ("scoring_func", "sigmoid"),
            ("gated_experts", True),
            ("expert_act", "relu"),
            ("rms_norm_eps", 0.1),
            ("rope_parameters", {"rope_type": "default", "rope_theta": 7.0}),
            ("feed_forward_types", ["dense"] * tiny_config().num_hidden_layers),
            ("expert_additions", [{"layers": [0], "mode": "open", "num_experts": 13}]),
        ],
    )
    def test_a_field_that_the_model_does_not_follow_is_refused(self, name, value, tmp_path):
        model = tiny_model(VARIANTS["peer"])
        had = getattr(model.config, name)
        setattr(model.config, name, value)
        with pytest.raises(ValueError, match=f"`{name}`.*the model has .* the configuration says"):
            model.save_pretrained(tmp_path / "checkpoint")
        assert not list((tmp_path / "checkpoint").glob("*"))
        setattr(model.config, name, had)
        model.save_pretrained(tmp_path / "checkpoint")

    def test_fields_that_the_model_follows_may_change(self, tmp_path):
        model = tiny_model(VARIANTS["peer"])
        model.config.num_experts_per_head -= 1
        model.config.expert_kernels = "torch"
        model.save_pretrained(tmp_path)
        assert same(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(model))

    def test_a_model_runs_as_many_layers_as_its_configuration_says(self, tmp_path):
        model = tiny_model(VARIANTS["peer"])
        model.config.num_hidden_layers = 1
        model.config.feed_forward_types = model.config.feed_forward_types[:1]
        model.save_pretrained(tmp_path)
        assert same(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(model))


def test_a_sharded_model_saves_the_code_of_its_own_class(tmp_path, monkeypatch):
    """FSDP2 puts a class of its own before the model's. It stays there while the model is saved."""
    model = PeerForCausalLM(tiny_config())
    model.save_pretrained(tmp_path / "whole")
    sharded_class = type("FSDPPeerForCausalLM", (FSDPModule, PeerForCausalLM), {})
    model.__class__ = sharded_class
    classes = []
    monkeypatch.setattr(
        "modeling_peer.modeling_peer.advise_whole_access", lambda weight: classes.append(type(model)), raising=True
    )
    saved = PreTrainedModel.save_pretrained

    def save(self, *args, **kwargs):
        classes.append(type(model))
        assert type(self) is PeerForCausalLM and self.config is model.config
        saved(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    model.save_pretrained(tmp_path / "sharded")
    assert set(classes) == {sharded_class} and type(model) is sharded_class
    whole, sharded = (sorted((tmp_path / name).iterdir()) for name in ("whole", "sharded"))
    assert [file.name for file in sharded] == [file.name for file in whole]
    for file, other in zip(whole, sharded, strict=True):
        assert file.read_bytes() == other.read_bytes(), file.name


def test_a_new_model_leaves_progress_bars_as_they_are(capfd):
    are_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        AutoModel.from_config(tiny_config("peer"))
        assert are_progress_bars_disabled()
    finally:
        if not are_disabled:
            enable_progress_bars()
    assert "Loading weights" not in capfd.readouterr().err


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
