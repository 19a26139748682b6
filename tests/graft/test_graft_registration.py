# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Grafts are registered with PEFT once, or not at all and with one warning. In processes of their own, as an import
registers them once for all. The card of an adapter says how to load it, and keeps what else a README.md says.
"""

import re

import pytest
import torch
from graft_models import base_model_of, graft_config, grafted, logits_of, trained
from script_runs import run_script
from tiny_models import random_tokens
from transformers import Trainer, TrainingArguments


def test_registration_is_done_once():
    script = """
import copy, pickle
import modeling_peer
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
member = PeftType("PEER_GRAFT")  # by the import of the package alone
assert {"PeerGraftConfig", "PeerGraftModel"} <= {*dir(modeling_peer)}
import modeling_peer.graft.model as grafts
from modeling_peer.graft.registration import register_peer_graft
number = len(PeftType)
register_peer_graft(grafts.PeerGraftConfig, grafts.PeerGraftModel)
assert number == len(PeftType) and member is PeftType.PEER_GRAFT is PeftType["PEER_GRAFT"]
assert copy.deepcopy(member) is member is pickle.loads(pickle.dumps(member)) and member == "PEER_GRAFT"
assert PEFT_TYPE_TO_TUNER_MAPPING["PEER_GRAFT"] is grafts.PeerGraftModel
try:
    register_peer_graft(type("Other", (), {}), grafts.PeerGraftModel)
except KeyError:
    print("refused")
"""
    assert "refused" in run_script(script)


def test_without_peft_nothing_is_said_until_grafts_are_asked_for():
    script = """
import sys, warnings
sys.modules["peft"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import modeling_peer.graft_merged
assert not [str(each.message) for each in caught if "graft" in str(each.message).lower()]
for name in ("PeerGraftConfig", "PeerGraftModel"):
    try:
        getattr(modeling_peer, name)
    except ImportError as error:
        print(name)
"""
    assert run_script(script) == "PeerGraftConfig\nPeerGraftModel\n"


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        ("metadata.version = lambda name: '0.20.1'", "0.20.1"),
        ("type.__setattr__(PeftType, '_member_names_', tuple(PeftType._member_names_))", "'tuple' object"),
        ("del peft.utils.register_peft_method", "register_peft_m"),
        ("del tuners_utils.BaseTuner._replace_module", "_replace_module"),
    ],
)
def test_releases_of_peft_that_do_not_fit_leave_the_rest_of_the_package(breakage, message):
    script = f"""
import warnings
from importlib import metadata
import peft, peft.utils
from peft import PeftType
from peft.tuners import tuners_utils
{breakage}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import modeling_peer
print(*[each.message for each in caught if "grafts do not work" in str(each.message)])
modeling_peer.PeerConfig()
"""
    assert message in run_script(script)


def card_of(folder):
    return (folder / "README.md").read_text()


def test_what_a_card_says_is_so(tmp_path):
    """Where nothing but the folders is there, the adapter fails to load as it is, and loads by the code in its card."""
    torch.manual_seed(0)
    tokens = random_tokens(2, 5)
    base_model_of().save_pretrained(tmp_path / "base")
    adapter = trained(grafted())
    adapter.save_pretrained(tmp_path / "adapter")
    torch.save((tokens, logits_of(adapter, tokens)), tmp_path / "expected.pt")
    said = card_of(tmp_path / "adapter")
    assert re.findall(r"^pip install .*", said, re.M) == ['pip install ".[graft]"']
    code = re.search(r"```python\n(.*?)```", said, re.S)[1]
    code = code.replace("path/to/this/folder", str(tmp_path / "adapter"))
    code = code.replace("path/to/the/base/model", str(tmp_path / "base"))
    script = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
tokens, expected = torch.load({str(tmp_path / "expected.pt")!r})
base_model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
try:
    PeftModel.from_pretrained(base_model, {str(tmp_path / "adapter")!r})
except KeyError as error:
    print(error)
assert "modeling_peer" not in sys.modules
exec({code!r})
assert torch.equal(model.eval()(input_ids=tokens).logits, expected)
print(type(model).__name__)
"""
    assert run_script(script).split() == ["'PEER_GRAFT'", "PeftModelForCausalLM"]


def test_cards_of_adapters_by_name(tmp_path):
    model = grafted()
    model.add_adapter("second", graft_config(task_type="CAUSAL_LM"))
    for _ in range(2):
        model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "second"):
        assert card_of(folder).count("import modeling_peer\n") == 1, folder
    model.base_model.peft_config["default"].base_model_name_or_path = "some/base"
    model.base_model.peft_config["default"].save_pretrained(tmp_path / "config")
    assert 'AutoModelForCausalLM.from_pretrained("some/base")' in card_of(tmp_path / "config")


def test_what_others_wrote_into_a_card_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n\nWhat I say of it.\n")
    for _ in range(2):
        grafted().save_pretrained(tmp_path)
        card = card_of(tmp_path)
        assert "license: mit\n" in card and "# Mine\n\nWhat I say of it." in card
        assert card.count("import modeling_peer\n") == 1


def test_the_card_of_a_trainer_says_it_too(tmp_path):
    """Not PEFT's template, of which nobody reads the middle; and not only before `Trainer` wrote a card of its own."""
    trainer = Trainer(grafted(), TrainingArguments(tmp_path, report_to="none"))
    trainer.save_model()
    assert card_of(tmp_path).count("import modeling_peer\n") == 1
    assert "More Information Needed" not in card_of(tmp_path) and "- PEFT " in card_of(tmp_path)
    trainer.create_model_card(model_name="graft")
    trainer.save_model()
    card = card_of(tmp_path)
    assert card.count("import modeling_peer\n") == 1 and "### Training hyperparameters" in card
