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

import pytest
import torch
from graft_models import base_model_of, graft_config, grafted, logits_of, trained
from huggingface_hub import ModelCard
from tiny_models import EXPERTS, VARIANTS, random_tokens, tiny_config

from common.library_sources import byte_level_tokenizer
from modeling_peer import PeerForCausalLM, PeerForTokenClassification, model_costs
from modeling_peer.checkpoint_card import describe_sizes, is_written_card


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


def test_a_process_that_saves_no_model_writes_no_card(tmp_path):
    PeerForCausalLM(tiny_config()).save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()
