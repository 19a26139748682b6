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
"""Grafts whose tables are quantized: merged ones are saved and loaded so, live ones only run."""

import json

import pytest
import torch
from graft_models import grafted, logits_of, trained
from peft import get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from modeling_peer import PeerQuantizationConfig, dequantize_experts, quantize_experts
from modeling_peer.expert_table import ExpertTable


FORMATS = pytest.mark.parametrize("bits, group_size", [(8, None), (4, 16)])


def tables_of(model):
    return [module for module in model.modules() if isinstance(module, ExpertTable)]


@FORMATS
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged(family, bits, group_size, tmp_path):
    """GPT-2 has biases: rows of an odd width."""
    merged = trained(grafted(family)).merge_and_unload()
    merged.save_pretrained(tmp_path / "whole")
    whole = logits_of(merged)
    quantize_experts(merged, bits, group_size)
    expected = logits_of(merged)
    assert 0 < (expected - whole).norm() < 0.2 * whole.norm()
    at_load = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", quantization_config=PeerQuantizationConfig(bits, group_size)
    )
    assert torch.equal(logits_of(at_load), expected)
    merged.save_pretrained(tmp_path / "quantized")
    assert json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]["bits"] == bits
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", output_loading_info=True)
    assert not any(report.values())
    assert all(table.is_quantized for table in tables_of(loaded)) and tables_of(loaded)
    assert torch.equal(logits_of(loaded), expected)


@FORMATS
def test_live(bits, group_size):
    model = trained(grafted())
    quantize_experts(model, bits, group_size)
    logits = logits_of(model)
    with pytest.raises(ValueError, match="The state dict of an adapter needs expert tables in floating point"):
        get_peft_model_state_dict(model)
    with pytest.raises(ValueError, match="`merge_and_unload` needs expert tables in floating point"):
        model.merge_and_unload()
    assert not hasattr(model.get_base_model().config, "quantization_config")
    dequantize_experts(model)
    torch.testing.assert_close(logits_of(model), logits)
    assert get_peft_model_state_dict(model)
    torch.testing.assert_close(logits_of(model.merge_and_unload()), logits)
