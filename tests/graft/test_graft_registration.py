# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Grafts are registered with PEFT once, or not at all and with one warning. In processes of their own, as an import
registers them once for all.
"""

import subprocess
import sys

import pytest


def run(script):
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


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
    assert "refused" in run(script)


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
    assert run(script) == "PeerGraftConfig\nPeerGraftModel\n"


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
    assert message in run(script)
