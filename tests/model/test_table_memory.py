# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Expert tables in host memory, beside a model on another device."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook
from tiny_models import VARIANTS, random_tokens, tiny_config, tiny_model

from modeling_peer import PeerForCausalLM
from modeling_peer.experts import expert_tables, plain_weight
from modeling_peer.memory.host_tables import host_table_device_map, keep_in_host_memory


CONFIGS = {
    "all_in_one": VARIANTS["all_in_one"],
    "gated, shared": tiny_config("peer", "peer", share_experts_across_layers=True, gated_experts=True),
    "pkm": tiny_config("dense", "pkm"),
}


@torch.no_grad()
def logits_of(model):
    return model(random_tokens(2, 9)).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_tables_stay_where_they_are(name, monkeypatch):
    model = tiny_model(CONFIGS[name])
    logits, tables = logits_of(model), {name: each.weight.detach() for name, each in expert_tables(model).items()}
    generated = model.generate(random_tokens(1, 4), max_new_tokens=4, do_sample=False)
    cpu_offload(model, execution_device=torch.device("cpu"))
    keep_in_host_memory(model)
    copied, copy_to_device = [], AlignDevicesHook.pre_forward

    def noted(hook, module, *args, **kwargs):
        copied.append(type(module))
        return copy_to_device(hook, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", noted)
    torch.testing.assert_close(logits_of(model), logits)
    assert torch.equal(model.generate(random_tokens(1, 4), max_new_tokens=4, do_sample=False), generated)
    assert torch.nn.Linear in copied, "the rest is offloaded as before"
    for name, table in expert_tables(model).items():
        assert table.weight.data_ptr() == tables[name].data_ptr(), "not even one copy of it was made"
        assert plain_weight(table) is not None


@pytest.mark.parametrize("name", CONFIGS)
def test_a_device_map_leaves_tables_in_host_memory(name, tmp_path):
    model = tiny_model(CONFIGS[name])
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


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("copies", [False, True], ids=["model", "copy"])
def test_only_tokens_and_their_sums_change_places(name, copies):
    model = tiny_model(CONFIGS[name])
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
            torch.testing.assert_close(run(*arguments), 2 * found)
