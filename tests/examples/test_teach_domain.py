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
"""A domain is taught from the command line: it is learned, and without the added experts the model is what it was."""

import contextlib
import io
import json
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
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
from common.text_data import DataTrainingArguments
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
    """Teaches a model the domain from the command line, and returns the figures that were saved and what it printed."""

    def main(base, output, *flags):
        words = ("--model_name_or_path", folder / base, "--train_file", folder / "domain.txt", "--block_size", 16)
        words += ("--output_dir", folder / output, "--num_added_experts", 25, "--learning_rate", 0.2)
        words += ("--max_steps", 12, "--save_steps", 6, "--report_to", "none", "--disable_tqdm", "true")
        words += ("--num_gate_sequences", 8, "--max_eval_samples", 8)
        shown = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed, redirect_stderr(shown):
            patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
            patch.setattr(teach_domain, "setup_logging", lambda training_args: None)  # would outlast the test
            patch.setattr(teach_domain, "fit_gates", partial(fit_gates, num_steps=60))
            patch.setattr(sys, "argv", ["teach_domain.py", *map(str, [*words, *flags])])
            teach_domain.main()
        for bar in ("Perplexity", "Background", "Hidden states", "Gate of layer", "Generated text"):
            assert bar not in shown.getvalue(), "--disable_tqdm is for all bars"
        return json.loads((folder / output / "teaching.json").read_text()), printed.getvalue()

    return main


@pytest.fixture(scope="module")
def taught(teach, folder):
    """The figures of the model `taught`, and what was printed."""
    return teach("base", "taught", "--kept_file", folder / "kept.txt")


@pytest.fixture(scope="module")
def figures(taught):
    return taught[0]


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


def test_says_what_it_did(taught):
    figures, printed = taught
    assert (
        "25 experts were added to each of the layers [0]. With them masked, perplexities are what they were" in printed
    )
    row = "".join(f"{figures['after'][name]:12.2f}" for name in ("domain", "kept text"))
    assert f"after                       {row}\n" in printed
    assert len(printed.splitlines()) < 35


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


def test_text_to_keep_is_read_as_that_of_the_domain(load_texts, folder, tmp_path):
    """Where it has the column of the domain; a file of text has none."""
    rows = "".join(json.dumps({"id": "x", "body": KEPT[i : i + 200]}) + "\n" for i in range(0, 4000, 200))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "short.jsonl").write_text('{"body": "the"}\n')
    for file in (tmp_path / "rows.jsonl", folder / "kept.txt"):
        tokenizer, texts = load_texts(tmp_path / "rows.jsonl", [file], text_column_name="body")
        assert len(texts["kept text"]["train"]) == 8
        assert "follows" in tokenizer.decode(texts["kept text"]["train"][0]["input_ids"])  # and not the column before
    with pytest.raises(UsageError, match=r"The text to keep, files of short.jsonl, cannot be used: "):
        load_texts(tmp_path / "rows.jsonl", [tmp_path / "short.jsonl"], text_column_name="body")


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


def test_a_text_of_one_sequence_is_refused_when_it_is_loaded(load_texts, folder, tmp_path):
    (tmp_path / "one.txt").write_text(DOMAIN[:60])
    held_out = {"validation_file": [str(folder / "domain.txt")]}
    message = "The domain fills one sequence of 16 tokens, .* choose a smaller --block_size, or more text"
    with pytest.raises(UsageError, match=message):
        load_texts(tmp_path / "one.txt", [folder / "kept.txt"], **held_out)


@pytest.mark.parametrize("percentage", [0, 10])
def test_text_is_held_out_of_each_text_to_keep(percentage):
    """
    Of the standard library what models were not trained on, of files as of the domain. These have no other held-out
    text: there is none of them if that of the domain is a file.
    """
    args = teach_domain.TeachingArguments(kept_file=["c.md", "d.md"], kept_standard_library=True)
    files = {"train_file": "a.md", "validation_file": "b.md", "text_column_name": "file"}
    data_args = teach_domain.DomainArguments(**files, validation_split_percentage=percentage)
    kept = [teach_domain.kept_arguments(name, args, data_args) for name in args.kept_texts]
    assert [each.train_file for each in kept] == [["c.md"], ["d.md"], None]
    assert [each.text_column_name for each in kept] == ["file", "file", None]
    assert {(each.max_train_samples, each.max_eval_samples) for each in kept} == {(128 // 3, 64 // 3)}
    assert not any(each.validation_file for each in kept)
    default = DataTrainingArguments().validation_split_percentage
    assert [each.validation_split_percentage for each in kept] == [percentage or default] * 2 + [default]
    assert default == 5


def test_card(figures, folder):
    card = card_of_folder(folder / "taught", "user/taught", AutoConfig.from_pretrained(folder / "taught"))
    assert "Base model: base.\n" in card.text and "Data: files of domain.txt.\n" in card.text
    assert "25 experts were added to layer 0 in protected mode." in card.text
    for key, said in (
        ("before", " before experts were added"),
        ("after", ""),
        ("masked", " with the added experts masked"),
    ):
        assert f"Held-out perplexity{said}, domain: {figures[key]['domain']:.4g}.\n" in card.text
    assert card.data.base_model is None  # a folder is none of the Hub
    assert "Base model: base.\n" in (folder / "taught" / "README.md").read_text()
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
    again, _ = teach("base", "resumed", "--kept_file", folder / "kept.txt")
    assert "Resuming training from" in caplog.text
    assert again["after"] == figures["after"]
    assert all(
        torch.equal(tensor, weights(folder / "taught")[name]) for name, tensor in weights(folder / "resumed").items()
    )
    said = (folder / "resumed" / "training.json").read_text()
    assert '"learning_rate": 0.2' in said
    teach("base", "resumed", "--kept_file", folder / "kept.txt", "--learning_rate", 0.3)
    assert (folder / "resumed" / "training.json").read_text() == said  # no step was trained at that rate


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--num_gate_sequences", "4"), "--num_gate_sequences was 8"),
        (("--max_train_samples", "9"), "--max_train_samples was None"),
        (("--kept_file", "other.txt", "--seed", "5"), "--kept_file was ['KEPT'], --seed was 42"),
    ],
)
def test_does_not_resume_from_another_teaching(changed, message, folder, taught, teach, monkeypatch):
    """Nothing is loaded, and the file of flags stays that of the checkpoint."""
    before = (folder / "taught" / "_teaching_flags.json").read_bytes()
    monkeypatch.setattr(teach_domain, "prepare", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr(teach_domain, "ends_on_usage_error", contextlib.nullcontext)
    expected = message.replace("KEPT", str(folder / "kept.txt"))
    whole = f"{folder / 'taught'} has a checkpoint of another teaching, of which {expected}: choose another"
    with pytest.raises(UsageError, match=re.escape(whole)):
        teach("base", "taught", "--kept_file", folder / "kept.txt", *changed)
    assert (folder / "taught" / "_teaching_flags.json").read_bytes() == before


def test_does_not_resume_from_a_checkpoint_of_another_script(folder, taught, teach, monkeypatch):
    """Nothing is loaded: it would fail after all work but the training, for the weights of the added experts."""
    shutil.copytree(folder / "taught" / "checkpoint-6", folder / "pretrained" / "checkpoint-6")
    monkeypatch.setattr(teach_domain, "prepare", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr(teach_domain, "ends_on_usage_error", contextlib.nullcontext)
    with pytest.raises(UsageError, match=r"pretrained has checkpoints, but no .*choose another --output_dir"):
        teach("base", "pretrained", "--kept_file", folder / "kept.txt")
    assert not (folder / "pretrained" / "_teaching_flags.json").exists()


def test_a_further_domain_without_text_to_keep(figures, teach, folder):
    """The model writes what it is to keep. Without the experts of the second domain, those of the first remain."""
    again, _ = teach("taught", "again", "--num_gate_sequences", 2)
    assert again["masked"] == again["before"]
    assert again["before"]["domain"] == figures["after"]["domain"]
    model = AutoModelForCausalLM.from_pretrained(folder / "again")
    assert [addition["num_experts"] for addition in model.config.expert_additions] == [25, 25]


@pytest.mark.parametrize(
    ("config", "number", "message"),
    [
        (
            lambda: tiny_config("dense", "pkm"),
            25,
            r"no PEER layer .* only \['dense', 'pkm'\]: choose another checkpoint",
        ),
        (LlamaConfig, 25, "this one has a LlamaConfig: give it experts by a graft, see docs/grafts.md"),
        (lambda: grafted().merge_and_unload().config, 25, "a graft that was merged .* with a further graft"),
        (
            lambda: tiny_config(quantization_config=PeerQuantizationConfig(bits=8)),
            25,
            "are quantized, .* teach the checkpoint that it was quantized from",
        ),
        (tiny_config, 24, "--num_added_experts must be a square number of at least 9, .* got 24"),
        (tiny_config, 4, "--num_added_experts must be a square number of at least 9, .* got 4"),
    ],
)
def test_models_that_cannot_be_taught(config, number, message):
    with pytest.raises(ValueError, match=message):
        teach_domain.check_can_be_taught(config(), number)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_file", "a.md"], "error: There is no model to teach: name a checkpoint by --model_name_or_path."),
        (
            ["--model_name_or_path", "here"],
            "error: There is no text to teach: name it by --train_file or --dataset_name.",
        ),
        (
            ["--train_file", "a.md", "--num_gate_sequences", "1"],
            "error: --num_gate_sequences must be at least 2, one to fit gates to and one to hold out, got 1.",
        ),
        (
            ["--train_file", "a.md", "--num_gate_sequences", "2", "--kept_standard_library", "--kept_file", "b", "c"],
            "error: --num_gate_sequences 2 gives none to some of the 3 texts to keep: name files that are one text by",
        ),
        (["--train_file", "a.md", "--streaming"], "error: --streaming is for longer texts than this script takes"),
        (
            ["--train_file", "a.md", "--validation_split_percentage", "0"],
            "error: There is no text of the domain to evaluate on: name it by --validation_file",
        ),
    ],
)
def test_wrong_flags_end_with_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(teach_domain, "setup_logging", lambda training_args: None)
    monkeypatch.setattr(sys, "argv", ["teach_domain.py", "--output_dir", str(tmp_path), *flags])
    with pytest.raises(SystemExit) as end:
        teach_domain.main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
