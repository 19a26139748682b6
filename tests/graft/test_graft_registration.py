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
"""
Grafts are registered with PEFT once, or not at all and with one warning. In processes of their own, as an import
registers them once for all.
"""

import subprocess
import sys


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
except ImportError as error:
    assert "already has a method `PEER_GRAFT`" in str(error)
    print("refused")
"""
    assert "refused" in run(script)


def test_without_peft_nothing_is_said_until_grafts_are_asked_for():
    script = """
import inspect, sys, warnings
sys.modules["peft"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import modeling_peer
    from modeling_peer import *
assert not [str(each.message) for each in caught if "graft" in str(each.message).lower()]
assert PeerForCausalLM and modeling_peer.graft_merged
members = dict(inspect.getmembers(modeling_peer))  # reads each name that `dir` lists
assert "PeerConfig" in members and "RowAdamW" in members
assert not {"PeerGraftConfig", "PeerGraftModel"} & {*members}
for name in ("PeerGraftConfig", "PeerGraftModel"):
    try:
        getattr(modeling_peer, name)
    except ImportError as error:
        assert "which is not installed: install the extra `graft` of modeling-peer: `pip install " in str(error)
        assert str(error).endswith('`pip install ".[graft]"` in a clone, or `pip install peft`.')
        print(name)
"""
    assert run(script) == "PeerGraftConfig\nPeerGraftModel\n"


# How a release of PEFT may not fit: what makes it so, what undoes that, and what the warning says.
BREAKAGES = [
    (
        "metadata.version = lambda name: '0.20.1'",
        "metadata.version = version",
        "Grafts need PEFT 0.21 or later, found 0.20.1",
    ),
    (
        "type.__setattr__(PeftType, '_member_names_', tuple(PeftType._member_names_))",
        "type.__setattr__(PeftType, '_member_names_', list(PeftType._member_names_))",
        "'tuple' object has no attribute 'append'",
    ),
    (
        "peft.utils.register_peft_method = lambda **kwargs: None",
        "peft.utils.register_peft_method = register",
        "KeyError: 'PEER_GRAFT'",
    ),
    (
        "del peft.utils.register_peft_method",
        "peft.utils.register_peft_method = register",
        "cannot import name 'register_peft_m",
    ),
    (
        "mixin.to_dict = lambda self: {'peft_type': 'PEER_GRAFT', 'task_type': None}",
        "mixin.to_dict = to_dict",
        "a configuration came back as",
    ),
    (
        "mapping.PEFT_TYPE_TO_CONFIG_MAPPING['PEER_GRAFT'] = int",
        "del mapping.PEFT_TYPE_TO_CONFIG_MAPPING['PEER_GRAFT']",
        "already has a method `PEER_GRAFT`, of <class 'int'>",
    ),
    (
        "del tuners_utils.BaseTuner._replace_module",
        "tuners_utils.BaseTuner._replace_module = replace_module",
        "Grafts use methods of PEFT that PEFT .* does not have: BaseTuner._replace_module.",
    ),
    (
        "sys.modules['peft.tuners.tuners_utils'] = None",
        "sys.modules['peft.tuners.tuners_utils'] = tuners_utils",
        "tuners_utils",
    ),
]


def test_releases_of_peft_that_do_not_fit_give_one_warning():
    script = f"""
import re, sys, warnings
from importlib import metadata
import peft, peft.config, peft.utils, torch, transformers
from peft import PeftType, mapping
from peft.tuners import tuners_utils
version, register, mixin = metadata.version, peft.utils.register_peft_method, peft.config.PeftConfigMixin
to_dict, replace_module = mixin.to_dict, tuners_utils.BaseTuner._replace_module

def state_of_peft():
    names = ("CONFIG", "TUNER", "PREFIX")
    registries = [dict(getattr(mapping, f"PEFT_TYPE_TO_{{name}}_MAPPING")) for name in names]
    return dict(PeftType.__members__), list(PeftType), registries, hasattr(PeftType, "PEER_GRAFT")

for breakage, repair, message in {BREAKAGES!r}:
    for name in [name for name in sys.modules if name == "modeling_peer" or name.startswith("modeling_peer.graft.")]:
        del sys.modules[name]
    exec(breakage)
    before = state_of_peft()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import modeling_peer
    said = [str(each.message) for each in caught if "PEER grafts do not work" in str(each.message)]
    assert len(said) == 1 and re.search(message, said[0]), (message, [str(each.message) for each in caught])
    assert state_of_peft() == before
    try:
        modeling_peer.PeerGraftConfig
    except Exception as error:
        assert re.search(message, f"{{type(error).__name__}}: {{error}}"), error
        print("refused")
    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_experts=4, query_size=4)
    config = modeling_peer.PeerConfig(**sizes, num_hidden_layers=1, num_experts_per_head=2, num_retrieval_heads=1)
    assert modeling_peer.PeerForCausalLM(config)(torch.ones(1, 2, dtype=torch.long)).logits.isfinite().all()
    assert modeling_peer.model_costs(config).flops
    exec(repair)

del sys.modules["modeling_peer"]
import modeling_peer
assert PeftType("PEER_GRAFT") and modeling_peer.PeerGraftConfig().num_experts
print("works")
"""
    assert run(script) == "refused\n" * len(BREAKAGES) + "works\n"
