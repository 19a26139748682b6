# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""A PEER model goes to the Hub and comes back, over HTTP, with the client that users have."""

import json

import huggingface_hub
import pytest
from hub_server import HubServer
from packaging.version import Version
from script_runs import run_script


PUSH = """
import sys, torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from tokenizers import Tokenizer, models, pre_tokenizers
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from modeling_peer import ExpertBackground, PeerConfig, PeerForCausalLM, PeerGraftConfig

words = Tokenizer(models.WordLevel({"[UNK]": 0, **{f"w{i}": i for i in range(1, 32)}}, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
config = PeerConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                    num_experts=64, num_retrieval_heads=2, num_experts_per_head=4, query_size=8)
model = PeerForCausalLM(config).eval()
model.generation_config.max_new_tokens = 7
torch.save(model(**tokenizer("w1 w2 w3", return_tensors="pt")).logits, sys.argv[1])
try:
    model.push_to_hub("user/peer", token="hf_wrong")
except HfHubHTTPError as error:
    assert error.response.status_code == 401
else:
    raise AssertionError
for part in (model, tokenizer):
    part.push_to_hub("user/peer")
ModelCard.from_template(ModelCardData(license="apache-2.0", library_name="transformers", tags=["peer"]),
                        model_id="user/peer").push_to_hub("user/peer")
ExpertBackground({"pool": torch.arange(4)}, 7).save_pretrained("background")
HfApi().upload_folder(repo_id="user/peer", folder_path="background")

base = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                    num_attention_heads=2))
graft = PeerGraftConfig(task_type="CAUSAL_LM", num_experts=16, num_experts_per_head=4, num_retrieval_heads=1)
get_peft_model(base, graft).save_pretrained("graft")  # PEFT's `push_to_hub` replaces the card
HfApi().create_repo("user/graft")
HfApi().upload_folder(repo_id="user/graft", folder_path="graft")
print("{}")
"""

PULL = """
import json, sys, torch
from huggingface_hub import ModelCard
from peft import PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

remote = sys.argv[2] == "remote code"
if remote:
    sys.modules["modeling_peer"] = None  # an import of it fails
else:
    import modeling_peer
model = AutoModelForCausalLM.from_pretrained("user/peer", trust_remote_code=remote).eval()
tokenizer = AutoTokenizer.from_pretrained("user/peer", trust_remote_code=remote)
inputs = tokenizer("w1 w2 w3", return_tensors="pt")
card = ModelCard.load("user/peer")
background = None if remote else modeling_peer.ExpertBackground.from_pretrained("user/peer")
print(json.dumps({
    "equal logits": torch.allclose(model(**inputs).logits, torch.load(sys.argv[1]), atol=1e-5),
    "generated": model.generate(**inputs, do_sample=False, eos_token_id=-1).shape[1],
    "module": type(model).__module__.split(".")[0],
    "license": card.data.license, "library": card.data.library_name,
    "background": background and [background.document_counts["pool"].tolist(), background.num_documents],
    "graft": None if remote else PeftConfig.from_pretrained("user/graft").peft_type,
}))
"""


def run(script, hub, folder, *arguments):
    """What a script prints last, as JSON, in a process whose Hub is `hub`."""
    printed = run_script(script, folder / "logits", *arguments, cwd=folder, **hub.environment(folder / "home"))
    return json.loads(printed.splitlines()[-1])


@pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("2"),
    reason="before 2 huggingface_hub has model cards checked by huggingface.co, whatever the endpoint",
)
def test_pushed_and_pulled(tmp_path):
    with HubServer() as hub:
        run(PUSH, hub, tmp_path)
        pulled = {how: run(PULL, hub, tmp_path, how) for how in ("package", "remote code")}
        files, adapter = set(hub.files("user/peer")), hub.files("user/graft")
    names = {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "README.md"}
    code = {"configuration_peer.py", "experts.py", "feed_forward.py", "modeling_peer.py", "router.py"}
    assert names <= files and {name for name in files if name.endswith(".py")} == code
    assert {"adapter_config.json", "adapter_model.safetensors"} <= adapter.keys()
    assert b"import modeling_peer\n" in adapter["README.md"]
    expected = {"equal logits": True, "generated": 10, "license": "apache-2.0", "library": "transformers"}
    of_package = {"module": "modeling_peer", "background": [[0, 1, 2, 3], 7], "graft": "PEER_GRAFT"}
    assert pulled["package"] == expected | of_package
    assert pulled["remote code"] == expected | {"module": "transformers_modules", "background": None, "graft": None}
