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
"""What cannot be quantized is refused before a model is loaded, or at least before it is evaluated."""

import sys

import datasets
import pytest
import quantize
from tiny_models import tiny_config

from common.text_data import DataTrainingArguments, load_datasets, train_tokenizer
from modeling_peer import PeerForCausalLM, PeerQuantizationConfig


def test_refuses_bits_before_it_loads_anything(monkeypatch, capsys):
    flags = ("--model_name_or_path", "runs/none", "--bits", "3", "--output_dir", "runs/quantized")
    monkeypatch.setattr(sys, "argv", ["quantize.py", *flags])
    with pytest.raises(SystemExit, match="2"):
        quantize.main()
    assert "`bits` must be one of [8, 4], got 3" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("variant", "quantization", "message"),
    [
        ("dense", None, "has no expert tables to quantize"),
        ("peer", PeerQuantizationConfig(), "is quantized already"),
    ],
)
def test_refuses_to_quantize_before_it_evaluates(variant, quantization, message, tmp_path, monkeypatch, capsys):
    text_file = tmp_path / "numbers.txt"
    text_file.write_text("".join(f"{i} and {i + 1} are {2 * i + 1}\n" for i in range(1000)))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    config = tiny_config(variant, vocab_size=300, quantization_config=quantization)
    if quantization is None:
        PeerForCausalLM(config).save_pretrained(tmp_path / "base")
        dataset = load_datasets(DataTrainingArguments(train_file=str(text_file)))["train"]
        train_tokenizer(dataset, "text", 300, 64).save_pretrained(tmp_path / "base")
    else:  # neither weights nor a tokenizer are there
        config.save_pretrained(tmp_path / "base")
    flags = ("--model_name_or_path", tmp_path / "base", "--train_file", text_file, "--block_size", 32)
    monkeypatch.setattr(sys, "argv", ["quantize.py", *map(str, flags), "--output_dir", str(tmp_path / "quantized")])
    monkeypatch.setattr(quantize, "perplexity", lambda trainer: pytest.fail("it evaluates"))
    with pytest.raises(SystemExit, match="2"):
        quantize.main()
    assert message in capsys.readouterr().err.splitlines()[-1]
