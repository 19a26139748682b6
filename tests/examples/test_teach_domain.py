# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A domain is taught from the command line: it is learned, and without the added experts the model is what it was."""

import contextlib
import json
import re
import shutil
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import push_to_hub
import pytest
import teach_domain
import torch
from huggingface_hub import ModelCard
from main_runs import run_main
from safetensors.torch import load_file
from script_runs import run_script
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

from common.command_line import UsageError
from common.library_sources import byte_level_tokenizer
from modeling_peer import PeerForCausalLM, fit_gates


DOMAIN = "".join(f"{i} and {i + 1} are {2 * i + 1}\n" for i in range(400))
KEPT = "".join(f"the word {i % 7} follows the word {i % 5}\n" for i in range(400))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two models of random weights, `base` and `llama`, and both texts."""
    folder = tmp_path_factory.mktemp("teaching")
    (folder / "domain.txt").write_text(DOMAIN)
    (folder / "kept.txt").write_text(KEPT)
    set_seed(0)
    PeerForCausalLM(
        tiny_config("peer", "dense", vocab_size=300, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    ).save_pretrained(folder / "base")
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, initializer_range=0.2, **sizes)).save_pretrained(folder / "llama")
    for name in ("base", "llama"):
        byte_level_tokenizer([DOMAIN, KEPT], 300, 512).save_pretrained(folder / name)
    return folder


def teach(folder, base, output, *flags, gate_steps=60):
    """Teaches a model the domain from the command line, and returns the figures that were saved."""
    words = ("--model_name_or_path", folder / base, "--train_file", folder / "domain.txt", "--block_size", 16)
    words += ("--output_dir", folder / output, "--num_added_experts", 25, "--learning_rate", 0.2)
    words += ("--max_steps", 12, "--report_to", "none", "--disable_tqdm", "true")
    words += ("--num_gate_sequences", 8, "--max_eval_samples", 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teach_domain, "fit_gates", partial(fit_gates, num_steps=gate_steps))
        run_main(teach_domain, *words, *flags)
    return json.loads((folder / output / "teaching.json").read_text())


@pytest.fixture(scope="module")
def figures(folder):
    """Those of the model `taught`."""
    return teach(folder, "base", "taught", "--kept_file", folder / "kept.txt")


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_learns_the_domain_with_the_added_experts_alone(figures, folder):
    assert figures["after"]["domain"] < 0.8 * figures["before"]["domain"]
    assert figures["masked"] == figures["before"]  # exactly
    assert figures["openness"]["domain"] > figures["openness"]["kept text"] + 0.2
    before, after = weights(folder / "base"), weights(folder / "taught")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    added = after.keys() - before.keys()
    assert added and all(".added" in name for name in added)
    (rows,) = (after[name] for name in added if "down_proj" in name and "expert_pool" in name)
    assert rows.shape == (25, 24) and rows.any()


def test_what_is_pushed_names_no_place_of_this_machine(figures, folder, monkeypatch):
    words = figures["command"].split()
    assert words[:7:2] == ["teach_domain.py", "base", "domain.txt", "16"]
    assert words[words.index("--kept_file") + 1] == "kept.txt" and words[words.index("--output_dir") + 1] == "taught"
    hub, pushed = MagicMock(), {}
    monkeypatch.setattr(push_to_hub, "HfApi", lambda: hub)
    push_to_hub.push(push_to_hub.PushArguments("user/taught", str(folder / "taught")))
    for each in hub.create_commit.call_args.args[1]:
        with each.as_file() as file:
            pushed[each.path_in_repo] = file.read()
    assert {"config.json", "teaching.json", "README.md"} <= pushed.keys()
    assert not [name for name, content in pushed.items() if str(folder).encode() in content]
    card = ModelCard(pushed["README.md"].decode())
    assert {result.dataset_name: result.metric_value for result in card.data.eval_results} == figures["after"]
    assert card.data.base_model is None
    # The one file that has them. `Trainer.push_to_hub` leaves out what begins with an underscore.
    (flags,) = (each.name for each in (folder / "taught").glob("*.json") if str(folder) in each.read_text())
    assert flags.startswith("_") and flags not in pushed


def test_resumes(figures, folder, caplog):
    """Checkpoints are saved by default, also in a training of few steps."""
    shutil.copytree(folder / "taught" / "checkpoint-10", folder / "resumed" / "checkpoint-10")
    shutil.copy(folder / "taught" / "_teaching_flags.json", folder / "resumed")
    again = teach(folder, "base", "resumed", "--kept_file", folder / "kept.txt")
    assert "Resuming training from" in caplog.text
    assert again["after"] == figures["after"]
    assert all(
        torch.equal(tensor, weights(folder / "taught")[name]) for name, tensor in weights(folder / "resumed").items()
    )


def test_does_not_resume_from_another_teaching(folder, figures, monkeypatch):
    """Nothing is loaded, and the file of flags stays that of the checkpoint."""
    before = (folder / "taught" / "_teaching_flags.json").read_bytes()
    monkeypatch.setattr(teach_domain, "prepare", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr(teach_domain, "ends_on_usage_error", contextlib.nullcontext)
    for changed in (("--num_gate_sequences", "4"), ("--max_train_samples", "9"), ("--kept_file", "other.txt")):
        with pytest.raises(UsageError, match=changed[0]):
            teach(folder, "base", "taught", "--kept_file", folder / "kept.txt", *changed)
    assert (folder / "taught" / "_teaching_flags.json").read_bytes() == before


def test_a_further_domain_without_text_to_keep(figures, folder):
    """The model writes what it is to keep. Without the experts of the second domain, those of the first remain."""
    again = teach(folder, "taught", "again", "--num_gate_sequences", 2)
    assert again["masked"] == again["before"]
    assert again["before"]["domain"] == figures["after"]["domain"]
    model = AutoModelForCausalLM.from_pretrained(folder / "again")
    assert [addition["num_experts"] for addition in model.config.expert_additions] == [25, 25]


def teach_llama(folder, output):
    flags = ("--kept_file", folder / "kept.txt", "--num_added_experts", 256)
    return teach(folder, "llama", output, *flags, gate_steps=500)


@pytest.fixture(scope="module")
def figures_of_llama(folder):
    """Those of the adapter `adapter`."""
    return teach_llama(folder, "adapter")


def test_teaches_any_language_model_by_a_graft_behind_a_gate(figures_of_llama, folder):
    """Loaded elsewhere by the code in its card, it predicts as it did here."""
    figures = figures_of_llama
    assert figures["after"]["domain"] < 0.8 * figures["before"]["domain"]
    assert figures["masked"] == figures["before"]  # exactly
    assert figures["openness"]["domain"] > 0.3 and figures["openness"]["kept text"] < 0.01
    assert figures["after"]["kept text"] == pytest.approx(figures["before"]["kept text"], rel=0.01)
    assert figures["layers"] == ["layer_1_default"]
    card = (folder / "adapter" / "README.md").read_text()
    rows = re.search(r"```\n(held-out perplexity.*?)```", card, re.S)[1]
    assert f"{figures['after']['domain']:>12.2f}" in rows
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    script = f"""
import sys
sys.path.append({str(Path(teach_domain.__file__).parent)!r})
{code.replace("path/to/this/folder", str(folder / "adapter"))}
import torch
from transformers import AutoTokenizer
from common.evaluation import held_out_loss
text = AutoTokenizer.from_pretrained({str(folder / "adapter")!r})({KEPT!r}, return_tensors="pt").input_ids[0]
text = text[: len(text) // 16 * 16].view(-1, 16)
with model.disable_adapter():
    original = model(text).logits
graft = model.base_model.model.model.layers[1].mlp.peer_graft_layer["default"]
states = []
graft.register_forward_pre_hook(lambda module, args: states.append(args[0]))
taught = model(text).logits
shut = (graft.router.gate(states[0]) == 0)[..., 0].cummin(-1).values  # at a token and all before
assert shut.float().mean() > 0.5 and torch.equal(taught[shut], original[shut])
print(held_out_loss(model, text[-8:]))
"""
    assert run_script(script)


def test_resumes_the_teaching_of_a_graft(figures_of_llama, folder):
    """From a checkpoint within it, and from its end; the card has its figures once."""
    for step in (10, 12):
        output = folder / f"adapter-from-{step}"
        shutil.copytree(folder / "adapter" / f"checkpoint-{step}", output / f"checkpoint-{step}")
        shutil.copy(folder / "adapter" / "_teaching_flags.json", output)
        for _ in range(2):
            again = teach_llama(folder, output.name)
        assert again["after"] == figures_of_llama["after"]
        first, second = (load_file(each / "adapter_model.safetensors") for each in (folder / "adapter", output))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
        assert (output / "README.md").read_text().count("held-out perplexity") == 1


def test_refuses_sizes_that_a_graft_cannot_have(folder, capsys):
    with pytest.raises(SystemExit):
        teach(folder, "llama", "refused", "--kept_file", folder / "kept.txt")  # 25 experts
    assert "at least 256" in capsys.readouterr().err


def test_the_page_has_the_figures_of_its_run():
    docs = Path(teach_domain.__file__).parents[1] / "docs"
    run = json.loads((docs / "images/teach-a-pretrained-model.json").read_text())
    assert run["masked"] == run["before"]
    pages, library = ([f"{run[when][text]:.2f}" for when in ("before", "after")] for text in run["before"])
    said = f"pages went from {' to '.join(pages)}, that of the standard library from {' to '.join(library)}."
    page = " ".join((docs / "teach-a-model.md").read_text().split())
    assert said in page and f"took {run['seconds'] / 60:.1f} minutes" in page
