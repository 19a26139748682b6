# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A domain is taught from the command line: it is learned, and without the added experts the model is what it was."""

import contextlib
import io
import json
import shutil
import sys
from contextlib import redirect_stdout
from functools import partial
from unittest.mock import MagicMock

import datasets
import push_to_hub
import pytest
import teach_domain
import torch
from graft_models import grafted
from safetensors.torch import load_file
from tiny_models import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, set_seed

from common.cards import card_of_folder
from common.command_line import UsageError
from common.library_sources import byte_level_tokenizer
from modeling_peer import PeerForCausalLM, PeerQuantizationConfig, fit_gates


DOMAIN = "".join(f"{i} and {i + 1} are {2 * i + 1}\n" for i in range(400))
KEPT = "".join(f"the word {i % 7} follows the word {i % 5}\n" for i in range(400))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model of random weights, `base`, and both texts."""
    folder = tmp_path_factory.mktemp("teaching")
    (folder / "domain.txt").write_text(DOMAIN)
    (folder / "kept.txt").write_text(KEPT)
    set_seed(0)
    PeerForCausalLM(
        tiny_config("peer", "dense", vocab_size=300, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    ).save_pretrained(folder / "base")
    byte_level_tokenizer([DOMAIN, KEPT], 300, 512).save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def teach(folder):
    """Teaches a model the domain from the command line, and returns the figures that were saved."""

    def main(base, output, *flags):
        words = ("--model_name_or_path", folder / base, "--train_file", folder / "domain.txt", "--block_size", 16)
        words += ("--output_dir", folder / output, "--num_added_experts", 25, "--learning_rate", 0.2)
        words += ("--max_steps", 12, "--save_steps", 6, "--report_to", "none", "--disable_tqdm", "true")
        words += ("--num_gate_sequences", 8, "--max_eval_samples", 8)
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
            patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
            patch.setattr(teach_domain, "setup_logging", lambda training_args: None)  # would outlast the test
            patch.setattr(teach_domain, "fit_gates", partial(fit_gates, num_steps=60))
            patch.setattr(sys, "argv", ["teach_domain.py", *map(str, [*words, *flags])])
            teach_domain.main()
        return json.loads((folder / output / "teaching.json").read_text())

    return main


@pytest.fixture(scope="module")
def figures(teach, folder):
    """Those of the model `taught`."""
    return teach("base", "taught", "--kept_file", folder / "kept.txt")


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_learns_the_domain_and_can_be_restored(figures):
    assert figures["after"]["domain"] < 0.8 * figures["before"]["domain"]
    assert figures["masked"] == figures["before"]  # exactly
    assert figures["openness"]["domain"] > figures["openness"]["kept text"] + 0.2
    assert 0 < figures["shared"] <= 1


def test_trains_the_added_experts_alone(figures, folder):
    before, after = weights(folder / "base"), weights(folder / "taught")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    added = after.keys() - before.keys()
    assert added and all(".added" in name for name in added)
    (rows,) = (after[name] for name in added if "down_proj" in name and "expert_pool" in name)
    assert rows.shape == (25, 24) and rows.any()


@pytest.fixture
def load_texts(folder, tmp_path):
    """Loads texts for the model `base`, in sequences of 16 tokens, of which gates are fitted to eight."""

    def load(train_file, kept_file, **data):
        args = teach_domain.TeachingArguments(kept_file=list(map(str, kept_file)), num_gate_sequences=8)
        data_args = teach_domain.DomainArguments(
            train_file=[str(train_file)], block_size=16, overwrite_cache=True, **data
        )
        training_args = teach_domain.DomainTrainingArguments(output_dir=str(tmp_path), report_to="none")
        model_args = teach_domain.ModelArguments(model_name_or_path=str(folder / "base"))
        config = AutoConfig.from_pretrained(folder / "base")
        return teach_domain.load_texts(args, model_args, data_args, training_args, config)

    return load


def test_all_texts_to_keep_count_the_same(load_texts, folder, tmp_path):
    """However long they are: of a text that is short beside others the gates would know nothing."""
    (tmp_path / "short.txt").write_text("".join(f"{i} but not {i}\n" for i in range(60)))
    tokenizer, texts = load_texts(
        folder / "domain.txt", [folder / "kept.txt", tmp_path / "short.txt"], max_eval_samples=2
    )
    for split, number in (("train", 4), ("validation", 1)):
        kept = tokenizer.batch_decode(texts["kept text"][split]["input_ids"][:])
        assert ["follows" in text for text in kept] == [True] * number + [False] * number
        assert ["but" in text for text in kept] == [False] * number + [True] * number


def test_card(figures, folder):
    """Perplexities are in it, and no folder as a model of the Hub."""
    card = card_of_folder(folder / "taught", "user/taught", AutoConfig.from_pretrained(folder / "taught"))
    assert card.data.base_model is None
    values = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    assert values == figures["after"]


def test_what_is_pushed_names_no_place_of_this_machine(figures, folder, monkeypatch):
    words = figures["command"].split()
    assert words[:7:2] == ["teach_domain.py", "base", "domain.txt", "16"]
    assert words[words.index("--kept_file") + 1] == "kept.txt" and words[words.index("--output_dir") + 1] == "taught"
    hub, pushed = MagicMock(endpoint="here"), {}

    def create_commit(repo_id, operations, commit_message):
        for each in operations:
            with each.as_file() as file:
                pushed[each.path_in_repo] = file.read()
        return MagicMock()

    hub.create_commit = create_commit
    monkeypatch.setattr(push_to_hub, "HfApi", lambda: hub)
    push_to_hub.push(push_to_hub.PushArguments("user/taught", str(folder / "taught")))
    assert {"config.json", "teaching.json", "README.md"} <= pushed.keys()
    assert not [name for name, content in pushed.items() if str(folder).encode() in content]
    # The one file that has them. `Trainer.push_to_hub` leaves out what begins with an underscore.
    (flags,) = (each.name for each in (folder / "taught").glob("*.json") if str(folder) in each.read_text())
    assert flags.startswith("_") and flags not in pushed


def test_resumes(figures, folder, teach, caplog):
    shutil.copytree(folder / "taught" / "checkpoint-6", folder / "resumed" / "checkpoint-6")
    shutil.copy(folder / "taught" / "_teaching_flags.json", folder / "resumed")
    again = teach("base", "resumed", "--kept_file", folder / "kept.txt")
    assert "Resuming training from" in caplog.text
    assert again["after"] == figures["after"]
    assert all(
        torch.equal(tensor, weights(folder / "taught")[name]) for name, tensor in weights(folder / "resumed").items()
    )


def test_does_not_resume_from_another_teaching(folder, figures, teach, monkeypatch):
    """Nothing is loaded, and the file of flags stays that of the checkpoint."""
    before = (folder / "taught" / "_teaching_flags.json").read_bytes()
    monkeypatch.setattr(teach_domain, "prepare", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr(teach_domain, "ends_on_usage_error", contextlib.nullcontext)
    for changed in (("--num_gate_sequences", "4"), ("--max_train_samples", "9"), ("--kept_file", "other.txt")):
        with pytest.raises(UsageError, match=changed[0]):
            teach("base", "taught", "--kept_file", folder / "kept.txt", *changed)
    assert (folder / "taught" / "_teaching_flags.json").read_bytes() == before


def test_does_not_resume_from_a_checkpoint_of_another_script(folder, figures, teach, monkeypatch):
    """Nothing is loaded: it would fail after all work but the training, for the weights of the added experts."""
    shutil.copytree(folder / "taught" / "checkpoint-6", folder / "pretrained" / "checkpoint-6")
    monkeypatch.setattr(teach_domain, "prepare", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr(teach_domain, "ends_on_usage_error", contextlib.nullcontext)
    with pytest.raises(UsageError, match=r"pretrained has checkpoints, but no .*choose another --output_dir"):
        teach("base", "pretrained", "--kept_file", folder / "kept.txt")
    assert not (folder / "pretrained" / "_teaching_flags.json").exists()


def test_a_further_domain_without_text_to_keep(figures, teach, folder):
    """The model writes what it is to keep. Without the experts of the second domain, those of the first remain."""
    again = teach("taught", "again", "--num_gate_sequences", 2)
    assert again["masked"] == again["before"]
    assert again["before"]["domain"] == figures["after"]["domain"]
    model = AutoModelForCausalLM.from_pretrained(folder / "again")
    assert [addition["num_experts"] for addition in model.config.expert_additions] == [25, 25]


@pytest.mark.parametrize(
    ("config", "number"),
    [
        (lambda: tiny_config("dense", "pkm"), 25),
        (LlamaConfig, 25),
        (lambda: grafted().merge_and_unload().config, 25),
        (lambda: tiny_config(quantization_config=PeerQuantizationConfig(bits=8)), 25),
        (tiny_config, 24),
        (tiny_config, 4),
    ],
)
def test_models_that_cannot_be_taught(config, number):
    with pytest.raises(ValueError):
        teach_domain.check_can_be_taught(config(), number)
