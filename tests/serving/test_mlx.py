# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that MLX runs: the same logits and tokens as here."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from convert_to_mlx import ACTIVATIONS, convert
from graft_models import base_model_of
from tiny_models import ALL_CONFIGS, VARIANTS, random_tokens, tiny_config, tiny_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.command_line import UsageError
from modeling_peer import quantize_experts


if sys.platform != "linux":
    pytest.skip("this project tests mlx-lm on Linux", allow_module_level=True)

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model


NANO = Path(__file__).parents[2] / "examples" / "checkpoints" / "peer-nano"
CONFIGS = {name: config for name, config in ALL_CONFIGS.items() if {*config.feed_forward_types} <= {"dense", "peer"}}
QUANTIZED = {name: CONFIGS[name] for name in ("peer", "grown")}


def check_logits(model, folder):
    model.save_pretrained(folder / "saved")
    convert(folder / "saved", folder / "mlx")
    converted, _ = load_model(folder / "mlx", trust_remote_code=True)
    tokens = random_tokens(2, 9)
    found = torch.from_numpy(np.array(converted(mx.array(tokens.numpy()))))
    with torch.no_grad():
        assert_close(found, model(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_those_of_torch(config, tmp_path):
    check_logits(tiny_model(config), tmp_path)


@pytest.mark.parametrize("config", QUANTIZED.values(), ids=QUANTIZED)
@pytest.mark.parametrize("group_size", [None, 10])
def test_logits_of_tables_in_8_bits(config, group_size, tmp_path):
    check_logits(quantize_experts(tiny_model(config), 8, group_size), tmp_path)


def test_another_theta_and_bias(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    check_logits(tiny_model(tiny_config(rope_parameters=rope, attention_bias=True)), tmp_path)


def test_greedy_tokens_of_a_trained_model(tmp_path):
    convert(NANO, tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(NANO).float().eval(), AutoTokenizer.from_pretrained(NANO)
    prompt = tokenizer("class Reader:\n    def __init__(self", return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    converted, converted_tokenizer = load(tmp_path, model_config={}, trust_remote_code=True)
    converted.set_dtype(mx.float32)
    tokens = mx.array(converted_tokenizer.encode("class Reader:\n    def __init__(self"))
    assert tokens.tolist() == prompt["input_ids"][0].tolist()
    steps = generate_step(tokens, converted, max_tokens=40)
    assert [int(token) for token, _ in steps] == expected.tolist()


REFUSED = {
    "4 bits": lambda: quantize_experts(tiny_model(VARIANTS["peer"]), 4),
    "`hidden_act`": lambda: tiny_model(tiny_config(hidden_act="gelu")),
    "`expert_act`": lambda: tiny_model(tiny_config(expert_act="tanh")),
    "`feed_forward_types`": lambda: tiny_model(VARIANTS["pkm"]),
    "of type 'llama'": base_model_of,
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_mlx_does_not_run_is_refused(message, tmp_path):
    REFUSED[message]().save_pretrained(tmp_path / "saved")
    with pytest.raises(UsageError, match=message):
        convert(tmp_path / "saved", tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()


def test_the_converter_knows_what_the_file_has(tmp_path):
    convert(NANO, tmp_path)
    spec = importlib.util.spec_from_file_location("of_the_copy", tmp_path / "mlx_peer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(module.ACTIVATIONS) == set(ACTIVATIONS)
