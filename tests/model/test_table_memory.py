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
"""Expert tables in host memory, beside a model on another device."""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook

from modeling_peer import PeerForCausalLM, host_table_device_map
from modeling_peer.expert_table import ExpertTable
from modeling_peer.table_memory import keep_in_host_memory
from tests.tiny_models import VARIANTS, random_tokens, tiny_config, tiny_model


CONFIGS = {
    "all_in_one": VARIANTS["all_in_one"],
    "gated, shared": tiny_config("peer", "peer", share_experts_across_layers=True, gated_experts=True),
    "pkm": tiny_config("dense", "pkm"),
}


@torch.no_grad()
def logits_of(model):
    return model(random_tokens(2, 9)).logits


def tables_of(model):
    return {name: each for name, each in model.named_modules() if isinstance(each, ExpertTable)}


@pytest.mark.parametrize("name", CONFIGS)
def test_tables_stay_where_they_are(name, monkeypatch):
    model = tiny_model(CONFIGS[name])
    logits, tables = logits_of(model), {name: each.weight.detach() for name, each in tables_of(model).items()}
    generated = model.generate(random_tokens(1, 4), max_new_tokens=4, do_sample=False)
    cpu_offload(model, execution_device=torch.device("cpu"))
    keep_in_host_memory(model)
    copied, copy = [], AlignDevicesHook.pre_forward

    def noted(hook, module, *args, **kwargs):
        copied.append(type(module))
        return copy(hook, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", noted)
    torch.testing.assert_close(logits_of(model), logits)
    assert torch.equal(model.generate(random_tokens(1, 4), max_new_tokens=4, do_sample=False), generated)
    assert torch.nn.Linear in copied, "the rest is offloaded as before"
    assert not any(issubclass(each, ExpertTable) for each in copied)
    for name, table in tables_of(model).items():
        assert table.weight.data_ptr() == tables[name].data_ptr(), "not even one copy of it was made"
        assert table.is_plain


@pytest.mark.parametrize("name", CONFIGS)
def test_a_device_map_leaves_tables_in_host_memory(name, tmp_path):
    model = tiny_model(CONFIGS[name])
    model.save_pretrained(tmp_path)
    # The one device that every machine has beside its CPU is that without memory.
    device_map = host_table_device_map(PeerForCausalLM, model.config, device="meta")
    loaded = PeerForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    tables = tables_of(loaded)
    assert {name for name, place in device_map.items() if place == "cpu"} == tables.keys()
    for name, table in tables.items():
        assert torch.equal(table.weight, tables_of(model)[name].weight)
        assert not hasattr(table, "_hf_hook")
    weights = {f"{name}.weight" for name in tables}
    assert all(parameter.is_meta for name, parameter in loaded.named_parameters() if name not in weights)


class OnAnotherDevice(torch.Tensor):
    """A tensor on the CPU that says it is on another device, and notes which ones leave it."""

    moved: list[torch.Size] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function == torch.Tensor.device.__get__:
            return torch.device("meta")
        if function is torch.Tensor.to:
            cls.moved.append(args[0].shape)
            return args[0].as_subclass(torch.Tensor)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_only_tokens_and_products_change_places():
    table = tiny_model(tiny_config("peer")).model.layers[0].mlp.expert_pool.up_proj
    tokens, indices = torch.randn(5, table.embedding_dim), torch.randint(table.num_embeddings, (5, 3))
    OnAnotherDevice.moved.clear()
    with torch.no_grad():
        products = table(*(each.as_subclass(OnAnotherDevice) for each in (tokens, indices)))
    assert OnAnotherDevice.moved == [tokens.shape, indices.shape]
    assert products.is_meta and products.shape == indices.shape
