# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Models whose expert tables are quantized: at load, on the fly, saved, loaded again, trained elsewhere."""

import copy
import json

import pytest
import torch
from grown_models import logits_of
from literal_algorithm import literal_peer
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from script_runs import run_script
from tiny_models import EXPERTS, GROWN, VARIANTS, random_tokens, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, QuantoConfig
from transformers.trainer_utils import validate_quantization_for_training

from modeling_peer import (
    ExpertBackground,
    PeerForCausalLM,
    PeerQuantizationConfig,
    SparseFinetuningCallback,
    add_experts,
    dequantize_experts,
    freeze_experts,
    host_table_device_map,
    quantize_experts,
    train_added_experts_only,
)
from modeling_peer.experts import expert_tables
from modeling_peer.quantization.table import QuantizedTable


CONFIGS = {
    "peer": VARIANTS["peer"],
    "gated": EXPERTS["gelu-gated-branch-own_pool"],
    "one pool": EXPERTS["gelu-plain-alone-one_pool"],
    "pkm": VARIANTS["pkm"],
    "all in one": VARIANTS["all_in_one"],
    **GROWN,
}
FORMATS = [(8, None), (4, 16)]

each_format = pytest.mark.parametrize("bits, group_size", FORMATS)


@pytest.fixture
def checkpoint(tmp_path):
    tiny_model(VARIANTS["peer"]).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@each_format
@pytest.mark.parametrize("name", CONFIGS)
def test_at_load_on_the_fly_and_saved(name, bits, group_size, tmp_path):
    """The same integers whichever way, in a checkpoint that loads with no argument."""
    model = tiny_model(CONFIGS[name])
    model.save_pretrained(tmp_path / "whole")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", quantization_config=PeerQuantizationConfig(bits, group_size)
    )
    other = copy.deepcopy(model)
    other.config = model.config
    assert quantize_experts(model, bits, group_size) is model and not hasattr(other.config, "quantization_config")
    tables = expert_tables(model)
    assert tables and all(isinstance(each, QuantizedTable) for each in tables.values())
    expected = logits_of(model)
    assert torch.equal(logits_of(loaded), expected)

    for number, each in enumerate((model, loaded)):
        folder = tmp_path / str(number)
        each.save_pretrained(folder)
        written = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert written == {"quant_method": "peer", "bits": bits, "group_size": group_size}
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert set(file.keys()) == set(model.state_dict())
            for table in tables:
                assert file.get_tensor(f"{table}.weight").dtype == (torch.int8 if bits == 8 else torch.uint8)
                assert file.get_tensor(f"{table}.scales").dtype == torch.bfloat16
        again, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values())
        assert torch.equal(logits_of(again), expected)
        for table in expert_tables(again).values():
            assert not any(parameter.requires_grad for parameter in table.parameters())


@each_format
@pytest.mark.parametrize("kernels", ["auto", "torch", "eager"])
@pytest.mark.parametrize("name", ["peer", "gated", "one pool"])
def test_a_layer_is_the_literal_one_of_the_dequantized_tables(name, kernels, bits, group_size):
    model = quantize_experts(tiny_model(CONFIGS[name]), bits, group_size)
    model.config.expert_kernels = kernels
    exact = dequantize_experts(copy.deepcopy(model)).double()
    layer, reference = model.model.layers[0].mlp, exact.model.layers[0].mlp
    hidden_states = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0))
    expected = literal_peer(model.config, reference, hidden_states.double(), exact.model.expert_pool)
    with torch.no_grad():
        output = layer(hidden_states, expert_pool=model.model.expert_pool)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


class TestTraining:
    """All but the tables, with gradients through them."""

    @each_format
    @pytest.mark.parametrize("name", ["peer", "pkm", *GROWN])
    def test_outputs_and_gradients_of_the_rest(self, name, bits, group_size):
        model = quantize_experts(tiny_model(CONFIGS[name]), bits, group_size)
        validate_quantization_for_training(model)
        exact = dequantize_experts(copy.deepcopy(model)).double()
        exact.config.expert_kernels = "eager"
        torch.testing.assert_close(logits_of(model).double(), logits_of(exact), rtol=1e-4, atol=1e-4)
        tokens = random_tokens(2, 9)
        for each in (model, exact):
            each(tokens, labels=tokens).loss.backward()
        gradients = {key: parameter.grad for key, parameter in exact.named_parameters()}
        trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert set(trained) == {key for key in gradients if key.rpartition(".")[0] not in expert_tables(model)}
        found = {key: parameter.grad.double() for key, parameter in trained.items()}
        torch.testing.assert_close(found, {key: gradients[key] for key in found}, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("variant", ["peer", "pkm"])
    def test_lora_elsewhere(self, variant):
        model = quantize_experts(tiny_model(VARIANTS[variant]))
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "query_proj"], init_lora_weights=False))
        adapted(random_tokens(2, 9), labels=random_tokens(2, 9)).loss.backward()
        gradients = [each.grad for name, each in adapted.named_parameters() if "lora" in name]
        assert gradients and all(each.abs().sum() > 0 for each in gradients)


def test_compiles_and_generates():
    model = quantize_experts(tiny_model(tiny_config("peer", "pkm", "dense")), bits=4)
    layer, hidden_states = model.model.layers[0].mlp, torch.randn(1, 4, 24)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden_states), layer(hidden_states))
    generated = model.generate(random_tokens(1, 4), max_new_tokens=6, do_sample=False)
    for length in range(4, 10):
        assert model(generated[:, :length]).logits[0, -1].argmax() == generated[0, length]


class TestLoading:
    @each_format
    def test_from_and_in_other_dtypes(self, checkpoint, tmp_path, bits, group_size):
        """A table is quantized in the dtype it is loaded in, here on a device. Integers and scales stay what they are."""
        loaded = PeerForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
        expected = expert_tables(quantize_experts(loaded, bits, group_size))
        quantization = PeerQuantizationConfig(bits, group_size)
        model = PeerForCausalLM.from_pretrained(
            checkpoint, dtype=torch.bfloat16, quantization_config=quantization, device_map={"": "cpu"}
        )
        model.save_pretrained(tmp_path / "half")
        again = PeerForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32).to(torch.float16)
        assert model.dtype == torch.bfloat16 and again.dtype == torch.float16
        for name, table in expert_tables(again).items():
            assert table.scales.dtype == torch.bfloat16
            for same in (expert_tables(model)[name], expected[name]):
                assert torch.equal(table.weight, same.weight) and torch.equal(table.scales, same.scales)
        assert logits_of(model).isfinite().all() and logits_of(again).isfinite().all()

    def test_offloaded_and_in_host_memory(self, checkpoint, tmp_path):
        quantize_experts(PeerForCausalLM.from_pretrained(checkpoint)).save_pretrained(tmp_path / "quantized")
        expected = logits_of(PeerForCausalLM.from_pretrained(tmp_path / "quantized"))
        on_disk = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
        on_disk |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
        offloaded = PeerForCausalLM.from_pretrained(
            tmp_path / "quantized", device_map=on_disk, offload_folder=tmp_path / "offload"
        )
        assert all(table.weight.is_meta for table in expert_tables(offloaded).values())
        torch.testing.assert_close(logits_of(offloaded), expected)
        device_map = host_table_device_map(PeerForCausalLM, offloaded.config, "cpu")
        hosted = PeerForCausalLM.from_pretrained(tmp_path / "quantized", device_map=device_map)
        assert torch.equal(logits_of(hosted), expected)

    @pytest.mark.parametrize("dtype", [None, torch.float64])
    def test_dequantized(self, checkpoint, dtype):
        model = quantize_experts(PeerForCausalLM.from_pretrained(checkpoint))
        expected = logits_of(model)
        assert dequantize_experts(model, dtype) is model
        tables = expert_tables(model).values()
        assert all(table.weight.requires_grad and table.weight.dtype == (dtype or model.dtype) for table in tables)
        torch.testing.assert_close(logits_of(model), expected)
        assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")
        quantize_experts(model)
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-2, atol=1e-1)

    def test_dequantized_in_the_dtype_of_the_model(self):
        model = dequantize_experts(quantize_experts(tiny_model(VARIANTS["peer"]).to(torch.bfloat16)))
        assert {table.weight.dtype for table in expert_tables(model).values()} == {torch.bfloat16}

    def test_a_device_map_counts_the_bytes_of_integers(self):
        model = quantize_experts(tiny_model(VARIANTS["peer"]), bits=4)
        for name, size in (("layers.0.mlp.expert_pool.up_proj", 0.5), ("norm", 4)):
            found = model.hf_quantizer.param_element_size(model, f"model.{name}.weight", torch.empty(1))
            assert found == size


SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "transformers_modules" in type(model).__module__ and "modeling_peer" not in sys.modules
from modeling_peer.quantization.quantizer import quantize_experts
quantize_experts(model, bits=4)
torch.save(model(torch.arange(1, 9)[None]).logits, sys.argv[1] + "/logits.pt")
model.save_pretrained(sys.argv[1] + "/quantized")
"""


def test_with_the_code_of_the_checkpoint(checkpoint):
    """Classes that a checkpoint brings along are not those of the package."""
    run_script(SCRIPT, checkpoint)
    model = PeerForCausalLM.from_pretrained(checkpoint / "quantized")
    assert all(isinstance(each, QuantizedTable) for each in expert_tables(model).values())
    with torch.no_grad():
        logits = model(torch.arange(1, 9)[None]).logits
    torch.testing.assert_close(torch.load(checkpoint / "logits.pt"), logits)


class TestRefusals:
    @pytest.mark.parametrize("fields", [{"bits": 5}, {"group_size": 0}, {"group_size": 33, "bits": 4}])
    def test_of_configurations(self, fields):
        with pytest.raises(ValueError, match=f"`{next(iter(fields))}` must be"):
            PeerQuantizationConfig(**fields)

    def test_of_other_things_than_models_with_tables(self):
        with pytest.raises(ValueError, match="LlamaForCausalLM has no expert tables"):
            quantize_experts(LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)))

    @each_format
    def test_of_checkpoints_of_other_bits_or_without_scales(self, checkpoint, tmp_path, bits, group_size):
        quantize_experts(PeerForCausalLM.from_pretrained(checkpoint), bits, group_size).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        for edited in ({"bits": 12 - bits, "group_size": None}, {"bits": bits, "group_size": 4}):
            quantization = {"quantization_config": {"quant_method": "peer", **edited}}
            (tmp_path / "config.json").write_text(json.dumps({**config, **quantization}))
            for ignore in (False, True):
                with pytest.raises((ValueError, RuntimeError)):
                    PeerForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=ignore)
        (tmp_path / "config.json").write_text(json.dumps(config))
        tensors = load_file(tmp_path / "model.safetensors")
        for part in ("scales", "weight"):
            rest = {name: each for name, each in tensors.items() if not name.endswith(f"up_proj.{part}")}
            save_file(rest, tmp_path / "model.safetensors", {"format": "pt"})
            with pytest.raises(ValueError, match="scales"):
                PeerForCausalLM.from_pretrained(tmp_path)

    def test_of_a_second_time(self, checkpoint):
        model = quantize_experts(PeerForCausalLM.from_pretrained(checkpoint))
        with pytest.raises(ValueError, match="quantized with peer"):
            quantize_experts(model)
        model = PeerForCausalLM.from_pretrained(checkpoint, quantization_config=QuantoConfig(weights="int8"))
        with pytest.raises(ValueError, match="quantized with quanto"):
            quantize_experts(model)

    def test_of_tables_that_are_not_plain(self):
        model = tiny_model(VARIANTS["peer"])
        handle = model.model.layers[0].mlp.expert_pool.down_proj.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="expert_pool.down_proj"):
            quantize_experts(model)
        handle.remove()
        assert all(type(each) is torch.nn.Embedding for each in expert_tables(model).values())
        model.to("meta")
        with pytest.raises(RuntimeError, match="meta"):
            quantize_experts(model)

    @each_format
    def test_to_train_or_grow(self, bits, group_size):
        grown_before = tiny_model(VARIANTS["peer"])
        add_experts(grown_before, 16)
        with pytest.raises(ValueError, match="Quantized"):
            train_added_experts_only(quantize_experts(grown_before, bits, group_size))
        assert any(each.requires_grad for each in grown_before.parameters())
        model = quantize_experts(tiny_model(VARIANTS["peer"]), bits, group_size)
        background = ExpertBackground.measure(model, [{"input_ids": random_tokens(9)}], progress_bar=False)
        grown, trained = copy.deepcopy(model.config), [each.requires_grad for each in model.parameters()]
        for change in (
            lambda: freeze_experts(model),
            lambda: SparseFinetuningCallback(model, background),
            lambda: add_experts(model, 16),
            lambda: add_experts(model, 13, mode="open"),
        ):
            with pytest.raises(ValueError, match="[Qq]uantized"):
                change()
        assert model.config == grown and [each.requires_grad for each in model.parameters()] == trained
