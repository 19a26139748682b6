# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Grafts whose tables are quantized: merged ones are saved and loaded so, live ones only run."""

import json

import pytest
import torch
from graft_models import graft_config, grafted, logits_of, trained
from peft import get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from modeling_peer import PeerQuantizationConfig, dequantize_experts, quantize_experts
from modeling_peer.experts import expert_tables
from modeling_peer.quantization.table import QuantizedTable


FORMATS = pytest.mark.parametrize("bits, group_size", [(8, None), (4, 16)])


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
    assert {type(table) for table in expert_tables(loaded).values()} == {QuantizedTable}
    assert torch.equal(logits_of(loaded), expected)


@FORMATS
def test_live(bits, group_size):
    model = trained(grafted())
    quantize_experts(model, bits, group_size)
    logits = logits_of(model)
    with model.disable_adapter():
        assert not torch.equal(logits_of(model), logits)
    model.add_adapter("more", graft_config())
    model.set_adapter("more")
    assert not torch.equal(logits_of(model), logits) and get_peft_model_state_dict(model, adapter_name="more")
    model.delete_adapter("more")
    model.set_adapter("default")
    assert torch.equal(logits_of(model), logits)
    with pytest.raises(ValueError, match="state dict"):
        get_peft_model_state_dict(model)
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.merge_and_unload()
    assert not hasattr(model.get_base_model().config, "quantization_config")
    dequantize_experts(model)
    torch.testing.assert_close(logits_of(model), logits)
    assert get_peft_model_state_dict(model)
    torch.testing.assert_close(logits_of(model.merge_and_unload()), logits)
