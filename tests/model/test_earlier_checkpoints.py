# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and adapters that earlier code saved load with the logits of that time: see tests/checkpoints/README.md."""

from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import modeling_peer


CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"

MODELS = [
    "plain",
    "variants",
    "pkm",
    "shared_pool",
    "grown",
    "grown_shared_pool",
    "quantized_8",
    "quantized_4",
    "sequence_classification",
    "merged_graft",
]

# The model that an adapter is of.
BASE_MODELS = {"adapter": "llama", "adapter_in_place": "gpt2", "lora": "plain"}

NAMES = [*MODELS, *BASE_MODELS]

KERNELS = ["auto", "eager", "torch"]

SAVED = load_file(CHECKPOINTS / "logits.safetensors")


def load_model(name, kernels):
    """A saved model, every tensor of which has found its place, with kernels where it has experts."""
    config = AutoConfig.from_pretrained(CHECKPOINTS / name)
    if isinstance(config, modeling_peer.PeerConfig):
        fields = {"expert_kernels": kernels}
    else:
        for grafted in getattr(config, "peer_grafts", {}).values():
            for graft in grafted["grafts"]:
                graft["expert_kernels"] = kernels
        fields = {"config": config}
    is_classifier = name == "sequence_classification"
    auto_class = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    model, report = auto_class.from_pretrained(CHECKPOINTS / name, output_loading_info=True, **fields)
    assert not any(report.values()), report
    return model.eval()


def load(name, kernels):
    """A saved model, or a saved adapter on its base model."""
    if name in MODELS:
        return load_model(name, kernels)
    config = PeftConfig.from_pretrained(CHECKPOINTS / name)
    if isinstance(config, modeling_peer.PeerGraftConfig):
        config.expert_kernels = kernels
    model = PeftModel.from_pretrained(load_model(BASE_MODELS[name], kernels), CHECKPOINTS / name, config=config)
    report = model.load_adapter(CHECKPOINTS / name, "default")  # once more, as only this reports what it loads
    assert not report.missing_keys and not report.unexpected_keys, report
    return model.eval()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_has_the_logits_of_the_code_that_saved_it(name, kernels):
    tokens, mask, expected = (SAVED[f"{name}.{each}"] for each in ("input_ids", "attention_mask", "logits"))
    assert not mask.all() and mask.any(-1).all()
    logits = load(name, kernels)(input_ids=tokens, attention_mask=mask).logits
    assert logits.dtype == expected.dtype == torch.float32 and logits.shape == expected.shape
    if expected.ndim == 3:  # what stands at padding means nothing
        logits, expected = logits[mask.bool()], expected[mask.bool()]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_every_checkpoint_is_tested():
    assert {folder.name for folder in CHECKPOINTS.iterdir() if folder.is_dir()} == {*NAMES, *BASE_MODELS.values()}
    assert {key.partition(".")[0] for key in SAVED} == set(NAMES)
