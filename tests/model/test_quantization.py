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
"""Models whose expert tables are quantized: at load, on the fly, saved, loaded again, trained elsewhere."""

import copy
import json

import pytest
import torch
from literal_algorithm import literal_peer
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tiny_models import EXPERTS, GROWN, VARIANTS, random_tokens, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, QuantoConfig
from transformers.distributed import DistributedConfig
from transformers.trainer_utils import validate_quantization_for_training

from modeling_peer import (
    PeerForCausalLM,
    PeerQuantizationConfig,
    RowAdamW,
    add_experts,
    dequantize_experts,
    expert_parameter_groups,
    freeze_experts,
    host_table_device_map,
    masked_experts,
    quantize_experts,
    train_added_experts_only,
)
from modeling_peer.expert_table import ExpertTable
from modeling_peer.quantized_table import QuantizedExpertTable
from modeling_peer.tensor_parallel import shard_columns


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


def tables_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertTable)}


def logits_of(model):
    with torch.no_grad():
        return model(random_tokens(2, 9)).logits


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
    quantized = quantize_experts(model, bits, group_size)
    assert quantized is model
    tables = tables_of(model)
    assert tables and all(isinstance(each, QuantizedExpertTable) for each in tables.values())
    expected = logits_of(model)
    assert torch.equal(logits_of(loaded), expected)

    for number, each in enumerate((model, loaded)):
        folder = tmp_path / str(number)
        each.save_pretrained(folder)
        written = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert written == {"quant_method": "peer", "bits": bits, "group_size": group_size}
        with safe_open(folder / "model.safetensors", "pt") as file:
            keys = set(file.keys())
            for table in tables:
                assert file.get_tensor(f"{table}.weight").dtype == (torch.int8 if bits == 8 else torch.uint8)
                assert file.get_tensor(f"{table}.scales").dtype == torch.bfloat16
        assert keys == set(model.state_dict())
        again, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values())
        assert torch.equal(logits_of(again), expected)
        for table in tables_of(again).values():
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


@each_format
@pytest.mark.parametrize("name", ["pkm", *GROWN])
def test_a_model_is_the_eager_one_of_the_dequantized_tables(name, bits, group_size):
    model = quantize_experts(tiny_model(CONFIGS[name]), bits, group_size)
    assert {table.kernels for table in tables_of(model).values()} == {"cpu"}
    exact = dequantize_experts(copy.deepcopy(model)).double()
    exact.config.expert_kernels = "eager"
    torch.testing.assert_close(logits_of(model).double(), logits_of(exact), rtol=1e-4, atol=1e-4)


class TestTraining:
    """All but the tables, with gradients through them."""

    @each_format
    @pytest.mark.parametrize("name", ["peer", "pkm", "grown"])
    def test_gradients_of_the_rest(self, name, bits, group_size):
        model = quantize_experts(tiny_model(CONFIGS[name]), bits, group_size)
        exact = dequantize_experts(copy.deepcopy(model)).double()
        exact.config.expert_kernels = "eager"
        tokens = random_tokens(2, 9)
        for each in (model, exact):
            each(tokens, labels=tokens).loss.backward()
        gradients = {key: parameter.grad for key, parameter in exact.named_parameters()}
        trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert set(trained) == {key for key in gradients if key.rpartition(".")[0] not in tables_of(model)}
        for key, parameter in trained.items():
            torch.testing.assert_close(parameter.grad.double(), gradients[key], rtol=1e-3, atol=1e-5)

    def test_with_an_optimizer_for_rows_and_as_trainer_asks(self):
        model = quantize_experts(tiny_model(VARIANTS["peer"])).train()
        validate_quantization_for_training(model)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer = RowAdamW(expert_parameter_groups(model, 1e-2))
        model(random_tokens(2, 9), labels=random_tokens(2, 9)).loss.backward()
        optimizer.step()
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert "model.layers.0.mlp.router.query_proj.weight" in changed
        assert not any("expert_pool" in key for key in changed)

    @pytest.mark.parametrize("variant", ["peer", "pkm"])
    def test_lora_elsewhere(self, variant):
        model = quantize_experts(tiny_model(VARIANTS[variant]))
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "query_proj"], init_lora_weights=False))
        adapted(random_tokens(2, 9), labels=random_tokens(2, 9)).loss.backward()
        gradients = [each.grad for name, each in adapted.named_parameters() if "lora" in name]
        assert gradients and all(each.abs().sum() > 0 for each in gradients)


def test_compiled():
    model = quantize_experts(tiny_model(VARIANTS["peer"]), bits=4)
    layer, hidden_states = model.model.layers[0].mlp, torch.randn(1, 4, 24)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden_states), layer(hidden_states))


def test_generates_and_masks():
    model = quantize_experts(tiny_model(tiny_config("peer", "pkm", "dense")), bits=4)
    tokens = random_tokens(1, 4)
    generated = model.generate(tokens, max_new_tokens=6, do_sample=False)
    for length in range(4, 10):
        assert model(generated[:, :length]).logits[0, -1].argmax() == generated[0, length]
    grown = quantize_experts(tiny_model(GROWN["grown"]))
    with masked_experts(grown):
        masked = logits_of(grown)
    assert not torch.equal(masked, logits_of(grown))


class TestLoading:
    def test_fewer_heads(self, checkpoint, tmp_path):
        model = PeerForCausalLM.from_pretrained(checkpoint, num_retrieval_heads=1)
        expected = logits_of(quantize_experts(model))
        config = PeerQuantizationConfig()
        at_load = PeerForCausalLM.from_pretrained(checkpoint, num_retrieval_heads=1, quantization_config=config)
        assert torch.equal(logits_of(at_load), expected)
        quantize_experts(PeerForCausalLM.from_pretrained(checkpoint)).save_pretrained(tmp_path / "two")
        assert torch.equal(
            logits_of(PeerForCausalLM.from_pretrained(tmp_path / "two", num_retrieval_heads=1)), expected
        )

    @each_format
    def test_from_and_in_other_dtypes(self, checkpoint, tmp_path, bits, group_size):
        """A table is quantized in the dtype it is loaded in. Integers and scales stay what they are from then on."""
        loaded = PeerForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
        expected = tables_of(quantize_experts(loaded, bits, group_size))
        model = PeerForCausalLM.from_pretrained(
            checkpoint, dtype=torch.bfloat16, quantization_config=PeerQuantizationConfig(bits, group_size)
        )
        model.save_pretrained(tmp_path / "half")
        again = PeerForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32).to(torch.float16)
        assert model.dtype == torch.bfloat16 and again.dtype == torch.float16
        for name, table in tables_of(again).items():
            assert table.scales.dtype == torch.bfloat16
            for same in (tables_of(model)[name], expected[name]):
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
        assert all(table.weight.is_meta for table in tables_of(offloaded).values())
        assert torch.equal(logits_of(offloaded), expected)
        device_map = host_table_device_map(PeerForCausalLM, offloaded.config, "cpu")
        hosted = PeerForCausalLM.from_pretrained(tmp_path / "quantized", device_map=device_map)
        assert torch.equal(logits_of(hosted), expected)

    def test_on_the_fly_onto_a_device_map(self, checkpoint):
        quantization = PeerQuantizationConfig(bits=4)
        model = PeerForCausalLM.from_pretrained(checkpoint, quantization_config=quantization, device_map={"": "cpu"})
        expected = quantize_experts(PeerForCausalLM.from_pretrained(checkpoint), bits=4)
        assert torch.equal(logits_of(model), logits_of(expected))

    def test_dequantized(self, checkpoint):
        model = quantize_experts(PeerForCausalLM.from_pretrained(checkpoint))
        expected = logits_of(model)
        assert dequantize_experts(model) is model
        assert all(table.weight.requires_grad and not table.is_quantized for table in tables_of(model).values())
        torch.testing.assert_close(logits_of(model), expected)
        assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")
        quantize_experts(model)
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-2, atol=1e-1)

    def test_dequantized_in_the_dtype_of_the_model_or_in_another(self):
        model = dequantize_experts(quantize_experts(tiny_model(VARIANTS["peer"]).bfloat16()))
        assert {table.weight.dtype for table in tables_of(model).values()} == {torch.bfloat16}
        model = dequantize_experts(quantize_experts(tiny_model(VARIANTS["peer"])), torch.float64)
        assert {table.weight.dtype for table in tables_of(model).values()} == {torch.float64}
        assert model.model.norm.weight.dtype == torch.float32

    def test_a_device_map_counts_the_bytes_of_integers(self):
        model = quantize_experts(tiny_model(VARIANTS["peer"]), bits=4)
        for name, size in (("layers.0.mlp.expert_pool.up_proj", 0.5), ("norm", 4)):
            found = model.hf_quantizer.param_element_size(model, f"model.{name}.weight", torch.empty(1))
            assert found == size


class TestRefusals:
    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"bits": 5}, r"`bits` must be one of \[8, 4\], got 5"),
            ({"bits": "8"}, r"`bits` must be one of \[8, 4\], got '8'"),
            ({"bits": True}, "`bits` must be"),
            ({"group_size": 0}, "`group_size` must be a positive integer or None, got 0"),
            ({"group_size": 32.0}, "`group_size` must be a positive integer or None, got 32.0"),
            ({"bits": 4, "group_size": 33}, "`group_size` must be a positive even integer.*got 33"),
            ({"quant_method": "gptq"}, "`quant_method` must be 'peer', got 'gptq'"),
        ],
    )
    def test_of_configurations(self, fields, message):
        with pytest.raises(ValueError, match=message):
            PeerQuantizationConfig(**fields)

    def test_of_models_without_tables(self):
        with pytest.raises(ValueError, match="LlamaForCausalLM has no expert tables"):
            quantize_experts(LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)))

    def test_of_a_second_time(self, checkpoint):
        model = quantize_experts(PeerForCausalLM.from_pretrained(checkpoint))
        with pytest.raises(ValueError, match="quantized with peer"):
            quantize_experts(model)
        model = PeerForCausalLM.from_pretrained(checkpoint, quantization_config=QuantoConfig(weights="int8"))
        with pytest.raises(ValueError, match="quantized with quanto"):
            quantize_experts(model)

    def test_of_tables_that_are_not_plain(self):
        model = tiny_model(VARIANTS["peer"])
        table = model.model.layers[0].mlp.expert_pool.down_proj
        handle = table.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="expert_pool.down_proj cannot be quantized.*hooks"):
            quantize_experts(model)
        handle.remove()
        assert not any(each.is_quantized for each in tables_of(model).values())
        model.to("meta")
        with pytest.raises(ValueError, match="expert_pool.up_proj has no memory"):
            quantize_experts(model)

    def test_of_growth_and_of_splitting(self):
        model = quantize_experts(tiny_model(VARIANTS["peer"]))
        with pytest.raises(ValueError, match="`add_experts` needs expert tables in floating point.*is quantized"):
            add_experts(model, 25)
        with pytest.raises(ValueError, match="`freeze_experts` needs expert tables in floating point"):
            freeze_experts(model, [1])
        with pytest.raises(ValueError, match="`train_added_experts_only` needs expert tables in floating point"):
            train_added_experts_only(model)
        assert any(parameter.requires_grad for parameter in model.parameters())
        with pytest.raises(ValueError, match="`distributed_config` needs expert tables in floating point"):
            PeerForCausalLM.maybe_distribute_model(model, DistributedConfig(), None)
        with pytest.raises(ValueError, match="Tensor parallelism needs"):
            shard_columns(model.model.layers[0].mlp.expert_pool.up_proj, "weight", None)


class Integers(torch.Tensor):
    """A table that another library has quantized: int8 with a scale for each row, and what `F.embedding` needs."""

    @staticmethod
    def __new__(cls, integers, scales):
        return torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scales.dtype)

    def __init__(self, integers, scales):
        self.integers, self.scales = integers, scales

    def __tensor_flatten__(self):
        return ["integers", "scales"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, context, size, stride):
        return cls(tensors["integers"], tensors["scales"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].integers, args[0].scales)
        if function is torch.ops.aten.embedding.default:
            return args[0].integers[args[1]] * args[0].scales[args[1]]
        raise NotImplementedError(f"{cls.__name__} has no {function}")


class TestTensorSubclasses:
    """What torchao's `quantize_` makes of the weight of a table."""

    @staticmethod
    def of_another_library(model):
        expected = copy.deepcopy(model)
        for name, table in tables_of(model).items():
            scales = table.weight.detach().abs().amax(1, keepdim=True) / 127
            integers = (table.weight.detach() / scales).round().to(torch.int8)
            table.weight = torch.nn.Parameter(Integers(integers, scales), requires_grad=False)
            tables_of(expected)[name].weight.data = integers * scales
        return model, expected

    @pytest.mark.parametrize("name", ["peer", "gated", "pkm"])
    @pytest.mark.parametrize("grad", [False, True])
    def test_run_on_the_literal_algorithm(self, name, grad, monkeypatch):
        notices = []
        monkeypatch.setattr("modeling_peer.expert_table.logger.warning_once", notices.append)
        model, expected = self.of_another_library(tiny_model(CONFIGS[name]))
        assert {table.kernels for table in tables_of(model).values()} == {"eager"}
        with torch.set_grad_enabled(grad):
            logits = model(random_tokens(2, 9)).logits
        assert logits.requires_grad == grad
        torch.testing.assert_close(logits, expected(random_tokens(2, 9)).logits)
        assert any("Integers" in each and "quantize_experts" in each for each in notices)

    def test_what_is_asked_for_by_name_is_not_replaced(self):
        model, _ = self.of_another_library(tiny_model(tiny_config(expert_kernels="cpu")))
        with pytest.raises((TypeError, NotImplementedError), match="Integers"):
            model(random_tokens(2, 9))
