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
"""The checkpoints that come with the repository are what their cards and the pages say, and small."""

import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
import train_nano
from datasets import Dataset
from documentation import ROOT
from hatchling.builders.sdist import SdistBuilder
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.command_line import UsageError
from common.library_sources import library_files, read_source
from common.text_data import DataTrainingArguments, take_samples, tokenize_into_blocks
from modeling_peer import PeerConfig, configuration_path, explain_tokens, quantize_experts
from modeling_peer.checkpoint_card import how_to_install


CHECKPOINTS = ROOT / "examples" / "checkpoints"
NAMES = ["peer-nano", "dense-nano"]


def results(name):
    return json.loads((CHECKPOINTS / name / "results.json").read_text())


def load(name):
    return AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def perplexities(held_out):
    """Of both as they are saved, and of PEER with tables in 8 and 4 bits."""
    found = {name: perplexity(load(name), held_out) for name in NAMES}
    return found | {bits: perplexity(quantize_experts(load("peer-nano"), bits), held_out) for bits in (8, 4)}


def test_peer_predicts_better_than_its_twin(perplexities):
    assert perplexities["peer-nano"] < 0.95 * perplexities["dense-nano"]


def test_bits_cost_little(perplexities):
    assert perplexities[8] == pytest.approx(perplexities["peer-nano"], rel=1e-3)
    assert perplexities[4] == pytest.approx(perplexities["peer-nano"], rel=1e-2)
    assert len(set(perplexities.values())) == 4


def test_perplexities_are_those_that_are_recorded(perplexities, held_out):
    """With the standard library that they were trained on; others differ a little."""
    recorded = {name: results(name)["perplexity"]["16 bits"] for name in NAMES}
    recorded |= {bits: results("peer-nano")["perplexity"][f"{bits} bits"] for bits in (8, 4)}
    is_same_text = train_nano.checksum(held_out.tolist()) == results("peer-nano")["held_out_checksum"]
    assert perplexities == pytest.approx(recorded, rel=1e-4 if is_same_text else 0.2)


def test_experts_raise_what_comes_next(held_out):
    """The next token is among those that a token's experts raise far more often than a token of another place is."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / "peer-nano")
    text = tokenizer.decode(held_out[0, :300])
    explained = explain_tokens(load("peer-nano"), tokenizer, text, num_experts=8, num_words=10)
    raised = [{word for use in each.layers["layer_1"] for word in use.words} for each in explained]

    def share(distance):
        return sum(after.token in words for after, words in zip(explained[distance:], raised, strict=False)) / 300

    assert share(1) > 2 * max(share(distance) for distance in (17, 37, 59))


@pytest.mark.parametrize("name", NAMES)
class TestFolder:
    def test_is_the_named_configuration(self, name):
        config = PeerConfig.from_pretrained(CHECKPOINTS / name)
        named = json.loads(Path(configuration_path(name), "config.json").read_text())
        assert {field: getattr(config, field) for field in named} == named
        assert AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name).dtype == torch.bfloat16

    def test_card(self, name):
        card = ModelCard.load(CHECKPOINTS / name / "README.md")
        assert card.data.license == "apache-2.0"
        (result,) = card.data.eval_results
        assert result.metric_value == results(name)["perplexity"]["16 bits"]
        text = " ".join(card.text.split())
        assert "PSF License 2.0" in text and "`learning_rate` | 0.004" in text and "## Limitations" in text
        assert "`optimizer` | RowAdamW" in text and " ".join(how_to_install().split()) in text
        assert "trust_remote_code" not in text
        assert name != "peer-nano" or "Its twin of the same width, `dense-nano`" in text

    def test_carries_no_code(self, name):
        assert not [*(CHECKPOINTS / name).glob("*.py")]
        assert "auto_map" not in json.loads((CHECKPOINTS / name / "config.json").read_text())


def test_are_small_and_in_no_package():
    files = [file for file in CHECKPOINTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 6_000_000
    packed = {Path(file.path) for file in SdistBuilder(str(ROOT)).recurse_included_files()}
    assert ROOT / "examples" / "train_nano.py" in packed and packed.isdisjoint(files)


def test_both_have_one_tokenizer():
    first, second = ((CHECKPOINTS / name / "tokenizer.json").read_bytes() for name in NAMES)
    assert first == second


def test_the_command(tmp_path, monkeypatch):
    """It trains, saves and measures; when it has been at the end, it only does the last two again."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(train_nano, "setup_logging", lambda training_args: None)  # would outlast the test
    text = tmp_path / "numbers.txt"
    text.write_text("".join(f"{i} and {i + 1} are {2 * i + 1}\n" for i in range(400)))
    flags = ("--models", "peer-nano", "--output_dir", tmp_path, "--training_dir", tmp_path / "training")
    flags += ("--max_steps", 2, "--train_file", text, "--block_size", 32, "--max_eval_samples", 4)
    monkeypatch.setattr(sys, "argv", ["train_nano.py", *map(str, flags)])
    train_nano.main()
    folder = tmp_path / "peer-nano"
    names = {"config.json", "generation_config.json", "model.safetensors", "README.md", "results.json"}
    names |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {file.name for file in folder.iterdir()} == names
    weights, said = (folder / "model.safetensors").read_bytes(), json.loads((folder / "results.json").read_text())
    assert (said["tokens"], said["held_out_sequences"], said["block_size"]) == (2 * 2 * 32, 4, 32)
    trained, *saved = said["perplexity"].values()
    assert saved == pytest.approx([trained] * 3, rel=2e-2) and len({trained, *saved}) == 4
    card = (folder / "README.md").read_text()
    assert "Data: files of numbers.txt." in card and "PSF" not in card and "Base model" not in card
    train_nano.main()
    assert (folder / "model.safetensors").read_bytes() == weights and (folder / "README.md").read_text() == card


def test_other_names_are_refused_before_a_training():
    with pytest.raises(
        UsageError, match=r"--models must be some of \['peer-nano', 'dense-nano'\], got \['peer-tiny'\]"
    ):
        train_nano.NanoArguments(models=["dense-nano", "peer-tiny"])
