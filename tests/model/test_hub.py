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
"""A PEER model goes to the Hub and comes back, over HTTP, with the client that users have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import HubServer
from packaging.version import Version
from slow_tests import slow


PACKAGE_ROOT = Path(__file__).parents[2]

PUSH = """
import sys, torch
from huggingface_hub import ModelCard, ModelCardData
from tokenizers import Tokenizer, models, pre_tokenizers
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from modeling_peer import PeerConfig, PeerForCausalLM, PeerGraftConfig

words = Tokenizer(models.WordLevel({"[UNK]": 0, **{f"w{i}": i for i in range(1, 32)}}, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
config = PeerConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                    num_experts=64, num_retrieval_heads=2, num_experts_per_head=4, query_size=8)
model = PeerForCausalLM(config).eval()
model.generation_config.max_new_tokens = 7
torch.save(model(**tokenizer("w1 w2 w3", return_tensors="pt")).logits, sys.argv[1])
for part in (model, tokenizer):
    part.push_to_hub("user/peer")
model.push_to_hub("user/short")
ModelCard.from_template(ModelCardData(license="apache-2.0", library_name="transformers", tags=["peer"]),
                        model_id="user/peer").push_to_hub("user/peer")

base = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                    num_attention_heads=2))
base.name_or_path = base.config._name_or_path = "user/llama"
graft = PeerGraftConfig(task_type="CAUSAL_LM", num_experts=16, num_experts_per_head=4, num_retrieval_heads=1)
get_peft_model(base, graft).push_to_hub("user/graft")
print("{}")
"""

PULL = """
import json, sys, torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

remote = sys.argv[2] == "remote code"
if remote:
    sys.modules["modeling_peer"] = None  # an import of it fails
else:
    import modeling_peer
model = AutoModelForCausalLM.from_pretrained("user/peer", trust_remote_code=remote).eval()
tokenizer = AutoTokenizer.from_pretrained("user/peer", trust_remote_code=remote)
inputs = tokenizer("w1 w2 w3", return_tensors="pt")
card, card_of_graft = ModelCard.load("user/peer"), ModelCard.load("user/graft")
print(json.dumps({
    "equal logits": torch.equal(model(**inputs).logits, torch.load(sys.argv[1])),
    "generated": model.generate(**inputs, do_sample=False, eos_token_id=-1).shape[1],
    "module": type(model).__module__.split(".")[0],
    "license": card.data.license, "library": card.data.library_name,
    "graft": [card_of_graft.data.library_name, card_of_graft.data.base_model],
    "usage": [line for line in card_of_graft.text.splitlines() if "modeling_peer" in line or "pip install" in line],
}))
"""


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def run(script, hub, tmp_path, *arguments, **changes):
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=tmp_path,
        env={**os.environ, **hub.environment(tmp_path / "home"), "PYTHONPATH": str(PACKAGE_ROOT), **changes},
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=300,
    )


def results(process):
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.strip().splitlines()[-1])


@pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("2"),
    reason="before 2 huggingface_hub has model cards checked by huggingface.co, whatever the endpoint",
)
def test_pushed_and_pulled(hub, tmp_path):
    results(run(PUSH, hub, tmp_path, str(tmp_path / "logits")))
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "README.md"} <= set(
        hub.files("user/peer")
    )
    assert {"modeling_peer.py", "configuration_peer.py", "feed_forward_peer.py"} <= set(hub.files("user/peer"))
    # Of a repository without a card, Transformers' own would say nothing of the package.
    short = hub.files("user/short")["README.md"].decode()
    assert "import modeling_peer\n" in short and "h = 2 heads retrieve k = 4 of N = 64 experts" in short
    expected = {"equal logits": True, "generated": 10, "license": "apache-2.0", "library": "transformers"}
    # The card of a pushed adapter is PEFT's, and names the package, how to install it, and its import.
    expected["graft"] = ["peft", "user/llama"]
    expected["usage"] = [
        'pip install ".[graft]"',
        "Import `modeling_peer` before PEFT loads the adapter, which otherwise fails with `KeyError: 'PEER_GRAFT'`:",
        "import modeling_peer",
    ]
    pulled = results(run(PULL, hub, tmp_path, str(tmp_path / "logits"), "package"))
    assert pulled == expected | {"module": "modeling_peer"}
    pulled = results(run(PULL, hub, tmp_path, str(tmp_path / "logits"), "remote code"))
    assert pulled == expected | {"module": "transformers_modules"}


@slow
def test_without_a_token_nothing_is_pushed(hub, tmp_path):
    process = run(PUSH, hub, tmp_path, str(tmp_path / "logits"), HF_TOKEN="")
    assert process.returncode != 0
    assert "401" in process.stderr
    with pytest.raises(KeyError):
        hub.files("user/peer")
