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
"""The cards that are saved with models and adapters say how to load them, and never replace another README.md."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from graft_models import base_model_of, graft_config, grafted, logits_of, trained
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from sft import save_tokenizer, sft_trainer
from tiny_models import EXPERTS, VARIANTS, random_tokens, tiny_config
from transformers import Trainer, TrainingArguments

from common.library_sources import byte_level_tokenizer
from modeling_peer import (
    PeerForCausalLM,
    PeerForTokenClassification,
    add_experts,
    checkpoint_card,
    complete_model_card,
    model_costs,
    quantize_experts,
)
from modeling_peer.checkpoint_card import describe_sizes, is_written_card, replace_card_of_transformers


def card_of(folder):
    return (folder / "README.md").read_text()


@pytest.fixture
def saved(tmp_path):
    """Folders of a PEER model, an adapter, its base model and the merged graft, and what each should compute."""
    torch.manual_seed(0)
    tokens = random_tokens(2, 5)
    peer = PeerForCausalLM(tiny_config()).eval()
    base_model_of().save_pretrained(tmp_path / "base")
    adapter = trained(grafted())
    adapter.save_pretrained(tmp_path / "adapter")
    logits = {"peer": logits_of(peer, tokens), "adapter": logits_of(adapter, tokens)}
    merged = adapter.merge_and_unload()
    for name, model in (("peer", peer), ("merged", merged)):
        model.save_pretrained(tmp_path / name)
    byte_level_tokenizer(["text"], 280, 16).save_pretrained(tmp_path / "peer")
    torch.save((tokens, {**logits, "merged": logits["adapter"]}), tmp_path / "expected.pt")
    return tmp_path


def test_what_the_cards_say_is_so(saved):
    """Where nothing but the folders is there: each fails to load as it is, and loads by the code in its card."""
    code = {
        name: re.search(r"```python\n(.*?)```", card_of(saved / name), re.S)[1]
        for name in ("peer", "adapter", "merged")
    }
    code = {name: text.replace("path/to/this/folder", str(saved / name)) for name, text in code.items()}
    code["adapter"] = code["adapter"].replace("path/to/the/base/model", str(saved / "base"))
    # Without the package, in the second code of the card: nothing asks whether to run code of the checkpoint.
    tokenizer_line = re.search(r"^tokenizer = .*", card_of(saved / "peer"), re.M)[0]
    tokenizer_line = tokenizer_line.replace("path/to/this/folder", str(saved / "peer"))
    script = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
exec({tokenizer_line!r})
assert tokenizer("text").input_ids
tokens, expected = torch.load({str(saved / "expected.pt")!r})
base_model = AutoModelForCausalLM.from_pretrained({str(saved / "base")!r})
try:
    PeftModel.from_pretrained(base_model, {str(saved / "adapter")!r})
except KeyError as error:
    print(error)
for name in ("peer", "merged"):
    try:
        AutoModelForCausalLM.from_pretrained({str(saved)!r} + "/" + name, trust_remote_code=False)
    except ValueError as error:
        print("trust_remote_code=True" in str(error))
assert "modeling_peer" not in sys.modules
for name, text in {code!r}.items():
    exec(text)
    assert torch.equal(model.eval()(input_ids=tokens).logits, expected[name]), name
    print(name, type(model).__name__)
"""
    completed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    loaded = "peer PeerForCausalLM\nadapter PeftModelForCausalLM\nmerged PeerGraftedLlamaForCausalLM\n"
    assert completed.stdout == f"'PEER_GRAFT'\nTrue\nTrue\n{loaded}", completed.stderr


def test_cards_name_the_package_and_the_auto_class(saved):
    for name in ("peer", "adapter", "merged"):
        said = " ".join(card_of(saved / name).split())
        assert "`modeling-peer`" in said and "It is installed from a clone of its repository: ```bash" in said, name
        # No registry of packages has it.
        command = '".[graft]"' if name == "adapter" else "."
        assert re.findall(r"^pip install .*", card_of(saved / name), re.M) == [f"pip install {command}"], name
    PeerForTokenClassification(tiny_config()).save_pretrained(saved / "other")
    assert "AutoModelForTokenClassification.from_pretrained(" in card_of(saved / "other")
    assert is_written_card(card_of(saved / "peer")) and not is_written_card(card_of(saved / "adapter"))


def test_adapters_by_name_have_cards_of_their_own(tmp_path):
    model = grafted()
    model.add_adapter("second", graft_config(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "second"):
        assert card_of(folder).count("import modeling_peer\n") == 1, folder
    model.base_model.peft_config["default"].base_model_name_or_path = "some/base"
    model.base_model.peft_config["default"].save_pretrained(tmp_path / "config")
    assert 'AutoModelForCausalLM.from_pretrained("some/base")' in card_of(tmp_path / "config")


@pytest.mark.parametrize("name", sorted({*VARIANTS, *EXPERTS}))
def test_sizes_in_the_card_are_those_that_costs_count(name):
    config = (VARIANTS | EXPERTS)[name]
    with torch.device("meta"):
        said = describe_sizes(PeerForCausalLM(config))
    costs = model_costs(config)
    assert f"It has {costs.parameters:,} parameters" in said
    if "moe" not in config.feed_forward_types:
        assert f", of which a token reads {costs.active_parameters:,}." in said
    h, k = config.num_retrieval_heads, config.num_experts_per_head
    experts = f"h = {h} heads retrieve k = {k} of N = {config.num_experts:,} experts"
    assert (experts in said) == ("peer" in config.feed_forward_types)


@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 4}, {"bits": 4, "group_size": 8}], ids=str)
def test_sizes_of_a_quantized_model_are_those_of_the_model(options):
    model = PeerForCausalLM(tiny_config("peer", "pkm", "dense"))
    before = describe_sizes(model)
    said = describe_sizes(quantize_experts(model, **options))
    assert said == f"{before} Its expert tables are quantized to {options['bits']} bits."


def test_cards_name_a_base_model_of_the_hub(tmp_path):
    for name, base_model in (("user/model", "user/model"), (str(tmp_path), None), ("", None)):
        model = PeerForCausalLM(tiny_config())
        model.name_or_path = name
        model.save_pretrained(tmp_path / "saved")
        assert ModelCard.load(tmp_path / "saved" / "README.md").data.base_model == base_model
        (tmp_path / "saved" / "README.md").unlink()


def test_an_existing_card_is_never_replaced(tmp_path):
    card = "---\nlicense: mit\n---\n\n# Mine\n\nWhat I say of it.\n"
    model = trained(grafted())
    merged = grafted(seed=1).merge_and_unload()
    saves = {
        "peer": PeerForCausalLM(tiny_config()).save_pretrained,
        "merged": merged.save_pretrained,
        "config": model.peft_config["default"].save_pretrained,
    }
    for name, save in saves.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(card)
        save(tmp_path / name)
        assert card_of(tmp_path / name) == card
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").write_text(card)
    model.save_pretrained(tmp_path / "adapter")
    # PEFT itself adds metadata and its release.
    assert "# Mine\n\nWhat I say of it." in card_of(tmp_path / "adapter")
    assert "modeling_peer" not in card_of(tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["peer", "merged"])
def test_the_card_of_a_model_that_changed_is_written_again(kind, tmp_path):
    model = PeerForCausalLM(tiny_config("peer")) if kind == "peer" else grafted().merge_and_unload()
    model.save_pretrained(tmp_path / "saved")
    first = card_of(tmp_path / "saved")
    model.name_or_path = "user/model"
    if kind == "peer":
        add_experts(model, 16)
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "new")
    assert card_of(tmp_path / "saved") == card_of(tmp_path / "new") != first
    assert ("16 experts were added to layer 0" in card_of(tmp_path / "saved")) == (kind == "peer")


def test_a_card_that_was_edited_stays(tmp_path):
    """Whatever was edited, metadata or text, with the mark or without it."""
    model = PeerForCausalLM(tiny_config())
    model.save_pretrained(tmp_path)
    written = card_of(tmp_path)
    edits = [
        written.replace("library_name", "license: mit\nlibrary_name"),
        written.replace(" parameters", " learned parameters"),
        written.replace(checkpoint_card.MARK + "\n", ""),
        written + "\n",
        re.sub("<!-- Checksum.*\n", "", written),
    ]
    model.name_or_path = "user/model"
    for edited in edits:
        assert edited != written
        (tmp_path / "README.md").write_text(edited)
        model.save_pretrained(tmp_path)
        assert card_of(tmp_path) == edited
    (tmp_path / "README.md").write_text("# Modèle\n", encoding="latin-1")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="latin-1") == "# Modèle\n"


def test_a_process_that_saves_no_model_writes_no_card(tmp_path):
    PeerForCausalLM(tiny_config()).save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("kind", ["peer", "graft", "merged", "lora", "other"])
def test_cards_of_trainers_keep_how_to_use_a_model(kind, tmp_path):
    """Beside what `Trainer` says, license included, and once however often a card is written."""
    models = {
        "peer": lambda: PeerForCausalLM(tiny_config()),
        "graft": grafted,
        "merged": lambda: grafted().merge_and_unload(),
        "lora": lambda: get_peft_model(PeerForCausalLM(tiny_config()), LoraConfig(task_type="CAUSAL_LM")),
        "other": base_model_of,
    }
    trainer = Trainer(models[kind](), TrainingArguments(str(tmp_path), report_to="none"))
    complete_model_card(trainer)
    trainer.hub_model_id = "user/mine"
    trainer.save_model()
    for _ in range(2):
        trainer.create_model_card(license="mit", model_name="mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and "\n# mine\n" in card.text and "learning_rate: 5e-05" in card.text
    assert card.text.count("`modeling-peer`") == card.text.count("\npip install ") == (kind != "other")
    assert ("peer" in (card.data.tags or [])) == (kind != "other")
    assert "path/to/this/folder" not in card.text
    assert ('AutoModelForCausalLM.from_pretrained("user/mine")' in card.text) == (kind in ("peer", "merged"))
    assert ('PeftModel.from_pretrained(base_model, "user/mine")' in card.text) == (kind == "graft")
    assert ("h = 2 heads retrieve k = 3 of N = 36 experts" in card.text) == (kind == "peer")


def test_cards_of_trl_keep_how_to_use_a_model(tmp_path):
    PeerForCausalLM(tiny_config()).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    trainer = sft_trainer(str(tmp_path / "model"), tmp_path / "trained")
    complete_model_card(trainer)
    trainer.create_model_card("mine")
    text = card_of(tmp_path / "trained")
    assert "It has been trained using [TRL]" in text and text.count("import modeling_peer\n") == 1


def test_a_pushed_card_of_transformers_is_replaced(tmp_path):
    """That which it makes for a repository without a card, and no other; its tags are kept."""
    model = PeerForCausalLM(tiny_config())
    readme = tmp_path / "README.md"
    for text, is_kept in (("This model card has been automatically generated.", False), ("Mine.", True)):
        model.save_pretrained(tmp_path)
        readme.write_text(f"---\ntags:\n- numbers\n---\n\n{text}\n")
        replace_card_of_transformers(tmp_path, model)
        card = ModelCard.load(readme)
        assert (text in card.text) == is_kept != ("import modeling_peer\n" in card.text)
        assert "numbers" in card.data.tags and is_kept != ("peer" in card.data.tags)


def test_the_repository_is_that_of_the_package(monkeypatch, tmp_path):
    """It is named in one constant and in pyproject.toml, and where it is known, cards link to it and install from it."""
    urls = re.findall(r'^Repository = "(.*)"$', (Path(__file__).parents[2] / "pyproject.toml").read_text(), re.M)
    assert urls == ([] if checkpoint_card.REPOSITORY is None else [checkpoint_card.REPOSITORY])
    monkeypatch.setattr(checkpoint_card, "REPOSITORY", "https://example.org/peer")
    PeerForCausalLM(tiny_config()).save_pretrained(tmp_path / "model")
    grafted().save_pretrained(tmp_path / "adapter")
    for name, extra in (("model", ""), ("adapter", "[graft]")):
        text = card_of(tmp_path / name)
        assert "[`modeling-peer`](https://example.org/peer)" in text
        assert f'\npip install "modeling-peer{extra} @ git+https://example.org/peer"\n' in text
