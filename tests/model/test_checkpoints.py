# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints on disk: saved and loaded whole, in parts and in other dtypes, and offloaded. And expert tables in host
memory, beside a model on another device.
"""

import copy

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors import safe_open
from tiny_models import EXPERTS, GROWN, ROUTERS, VARIANTS, random_tokens, tiny_config, tiny_model
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig

from modeling_peer import PeerForCausalLM, PeerModel
from modeling_peer.experts import expert_tables, plain_weight
from modeling_peer.memory.host_tables import host_table_device_map, keep_in_host_memory


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
    assert type(AutoModel.from_pretrained(tmp_path)) is PeerModel


def test_in_bfloat16_but_for_the_running_statistics(tmp_path):
    """Saved again, it is in several files."""
    model = tiny_model(VARIANTS["all_in_one"])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for key, buffer in model.named_buffers():
        if "running" in key:
            assert same(loaded.get_buffer(key), buffer)
    expected = logits_of(loaded)
    assert loaded.config.dtype == torch.bfloat16
    loaded.save_pretrained(tmp_path / "again", max_shard_size="10KB")
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 2
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
        GROWN["grown"],
    ],
    ids=["all_in_one", "shared_pool", "kernels_by_name", "grown"],
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


def test_attentions_are_returned_by_a_configuration_that_says_so(tmp_path):
    tiny_model(tiny_config("peer", output_attentions=True)).save_pretrained(tmp_path)
    (attentions,) = AutoModelForCausalLM.from_pretrained(tmp_path)(random_tokens(1, 4)).attentions
    assert_close(attentions.sum(-1), torch.ones(1, 4, 4))


def test_an_invalid_configuration_is_not_saved(tmp_path):
    model = tiny_model(VARIANTS["peer"])
    model.config.num_experts_per_head = 7  # of √36 = 6
    with pytest.raises(StrictDataclassClassValidationError, match="`num_experts_per_head`"):
        model.save_pretrained(tmp_path)
    assert not [file for file in tmp_path.iterdir() if file.suffix != ".py"]


WITH_TABLES = {
    "all_in_one": VARIANTS["all_in_one"],
    "gated, shared": tiny_config("peer", "peer", share_experts_across_layers=True, gated_experts=True),
    "pkm": tiny_config("dense", "pkm"),
}


@pytest.mark.parametrize("name", WITH_TABLES)
def test_tables_stay_where_they_are(name, monkeypatch):
    model = tiny_model(WITH_TABLES[name])
    logits, tables = logits_of(model), {name: each.weight.detach() for name, each in expert_tables(model).items()}
    generated = model.generate(random_tokens(1, 4), max_new_tokens=4, do_sample=False)
    cpu_offload(model, execution_device=torch.device("cpu"))
    keep_in_host_memory(model)
    copied, copy_to_device = [], AlignDevicesHook.pre_forward

    def noted(hook, module, *args, **kwargs):
        copied.append(type(module))
        return copy_to_device(hook, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", noted)
    assert_close(logits_of(model), logits)
    assert torch.equal(model.generate(random_tokens(1, 4), max_new_tokens=4, do_sample=False), generated)
    assert torch.nn.Linear in copied, "the rest is offloaded as before"
    for name, table in expert_tables(model).items():
        assert table.weight.data_ptr() == tables[name].data_ptr(), "not even one copy of it was made"
        assert plain_weight(table) is not None


@pytest.mark.parametrize("name", WITH_TABLES)
def test_a_device_map_leaves_tables_in_host_memory(name, tmp_path):
    model = tiny_model(WITH_TABLES[name])
    model.save_pretrained(tmp_path)
    # The one device that every machine has beside its CPU is that without memory.
    device_map = host_table_device_map(PeerForCausalLM, model.config, device="meta")
    loaded = PeerForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    keep_in_host_memory(loaded)
    tables = expert_tables(loaded)
    assert {name for name, place in device_map.items() if place == "cpu"} == tables.keys()
    for name, table in tables.items():
        assert torch.equal(table.weight, expert_tables(model)[name].weight)
        assert not hasattr(table, "_hf_hook")
    pools = [module for module in loaded.modules() if hasattr(type(module), "expert_table_names")]
    assert not any(hasattr(pool.act_fn, "_hf_hook") for pool in pools if hasattr(pool, "act_fn"))
    weights = {f"{name}.weight" for name in tables}
    assert all(parameter.is_meta for name, parameter in loaded.named_parameters() if name not in weights)


class OnAnotherDevice(torch.Tensor):
    """A tensor on the CPU that says it is on another device, and notes which ones leave it."""

    moved: list[torch.Size] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function == torch.Tensor.is_cpu.__get__:
            return False
        if function is torch.Tensor.to:
            cls.moved.append(args[0].shape)
            return args[0].as_subclass(torch.Tensor)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("name", WITH_TABLES)
@pytest.mark.parametrize("copies", [False, True], ids=["model", "copy"])
def test_only_tokens_and_their_sums_change_places(name, copies):
    model = tiny_model(WITH_TABLES[name])
    model.lm_head.to("meta")
    keep_in_host_memory(model)
    model = copy.deepcopy(model) if copies else model
    pools = [module for module in model.modules() if hasattr(type(module), "expert_table_names")]
    assert pools
    for pool in pools:
        run = getattr(pool, "sum_values", pool)
        table = pool.values if hasattr(pool, "sum_values") else pool.down_proj
        arguments = torch.randn(5, 24), torch.randint(table.num_embeddings, (5, 3)), torch.rand(5, 3)
        OnAnotherDevice.moved.clear()
        with torch.no_grad():
            found = run(*(each.as_subclass(OnAnotherDevice) for each in arguments))
            table.weight.mul_(2)  # of this model, not of the one that it was copied from
            assert OnAnotherDevice.moved == [each.shape for each in arguments]
            assert_close(run(*arguments), 2 * found)
