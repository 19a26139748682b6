# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The checkpoints that come with the repository are what their cards and the pages say, and small."""

import json
from pathlib import Path

import pytest
import torch
import train_nano
from datasets import Dataset
from documentation import ROOT
from huggingface_hub import ModelCard
from main_runs import run_main
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.library_sources import library_files, read_source
from common.text_data import DataTrainingArguments, take_samples, tokenize_into_blocks
from modeling_peer import PeerConfig, configuration_path, quantize_experts


CHECKPOINTS = ROOT / "examples" / "checkpoints"
NAMES = ["peer-nano", "dense-nano"]


def results(name):
    return json.loads((CHECKPOINTS / name / "results.json").read_text())


def load(name):
    return AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32).eval()


def held_out():
    """The sequences that the checkpoints were evaluated on, or those of the Python that runs."""
    root, files = library_files()
    texts = Dataset.from_dict({"text": [read_source(root / name) for name in files["validation"]]})
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / "peer-nano")
    expected = results("peer-nano")
    blocks = tokenize_into_blocks(texts, tokenizer, expected["block_size"], DataTrainingArguments())
    return torch.tensor(take_samples(blocks, expected["held_out_sequences"])["input_ids"][:])


@torch.no_grad()
def perplexity(model, sequences):
    losses = [model(part, labels=part, use_cache=False).loss for part in sequences.split(8)]
    return torch.stack(losses).mean().exp().item()


def test_perplexities_are_those_that_are_recorded():
    """
    Of both as they are saved, and of PEER with tables in 8 and 4 bits, with the standard library that they were trained
    on; others differ a little.
    """
    sequences, of_peer = held_out(), results("peer-nano")
    found = {name: perplexity(load(name), sequences) for name in NAMES}
    found |= {bits: perplexity(quantize_experts(load("peer-nano"), bits), sequences) for bits in (8, 4)}
    recorded = {name: results(name)["perplexity"]["16 bits"] for name in NAMES}
    recorded |= {bits: of_peer["perplexity"][f"{bits} bits"] for bits in (8, 4)}
    is_same_text = train_nano.checksum(sequences.tolist()) == of_peer["held_out_checksum"]
    assert found == pytest.approx(recorded, rel=1e-4 if is_same_text else 0.2)
    assert found["peer-nano"] < 0.95 * found["dense-nano"]
    assert len(set(found.values())) == 4


@pytest.mark.parametrize("name", NAMES)
def test_is_the_named_configuration_with_the_results_in_its_card(name):
    config = PeerConfig.from_pretrained(CHECKPOINTS / name)
    named = json.loads(Path(configuration_path(name), "config.json").read_text())
    assert {field: getattr(config, field) for field in named} == named
    card = ModelCard.load(CHECKPOINTS / name / "README.md")
    (result,) = card.data.eval_results
    assert result.metric_value == results(name)["perplexity"]["16 bits"]


def test_the_command(tmp_path):
    """It trains, saves and measures; when it has been at the end, it only does the last two again."""
    text = tmp_path / "numbers.txt"
    text.write_text("".join(f"{i} and {i + 1} are {2 * i + 1}\n" for i in range(400)))
    flags = ("--models", "peer-nano", "--output_dir", tmp_path, "--training_dir", tmp_path / "training")
    flags += ("--max_steps", 2, "--train_file", text, "--block_size", 32, "--max_eval_samples", 4)
    run_main(train_nano, *flags)
    folder = tmp_path / "peer-nano"
    weights, said = (folder / "model.safetensors").read_bytes(), json.loads((folder / "results.json").read_text())
    assert (said["tokens"], said["held_out_sequences"], said["block_size"]) == (2 * 2 * 32, 4, 32)
    trained, *saved = said["perplexity"].values()
    assert saved == pytest.approx([trained] * 3, rel=2e-2) and len({trained, *saved}) == 4
    card = (folder / "README.md").read_text()
    run_main(train_nano, *flags)
    assert (folder / "model.safetensors").read_bytes() == weights and (folder / "README.md").read_text() == card
