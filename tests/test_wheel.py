# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The built wheel, as a stranger installs it: what it contains, and a user's script in a new environment."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from hub_server import HubServer
from slow_tests import slow


CHECKOUT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]

SCRIPT = """
import modeling_peer
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
)
from modeling_peer import PeerGraftConfig, configuration_path, list_configurations, make_optimizer
from modeling_peer.ops.native import load_library

print(modeling_peer.__file__, *list_configurations())
assert load_library() is not None  # compiled from the sources in the wheel
set_seed(0)
config = AutoConfig.from_pretrained(configuration_path("peer-tiny"))
AutoModelForCausalLM.from_config(config).save_pretrained("model")
model = AutoModelForCausalLM.from_pretrained("model")

tokens = torch.randint(config.vocab_size, (8, 9))
dataset = [{"input_ids": text, "labels": text} for text in tokens]
args = TrainingArguments("run", max_steps=3, per_device_train_batch_size=4, learning_rate=0.01, report_to="none",
                         use_cpu=True, disable_tqdm=True)
trainer = Trainer(model, args, train_dataset=dataset, optimizers=(make_optimizer(model, args), None))
before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
first = trainer.evaluate(dataset)["eval_loss"]
trainer.train()
assert trainer.evaluate(dataset)["eval_loss"] < first
name = "model.layers.1.mlp.expert_pool.down_proj.weight"
moved = (model.get_parameter(name) != before[name]).any(1).float().mean()
assert 0 < moved < 0.9  # the rows of retrieved experts

model.eval()
greedy = dict(max_new_tokens=6, do_sample=False, eos_token_id=-1)
texts = [model.generate(tokens[:2], cache_implementation=cache, **greedy) for cache in ("dynamic", "static")]
assert texts[0].shape == (2, 15) and torch.equal(*texts)

model.push_to_hub("user/peer")
pulled = AutoModelForCausalLM.from_pretrained("user/peer").eval()
torch.testing.assert_close(pulled(tokens).logits, model(tokens).logits)

base = LlamaForCausalLM(LlamaConfig(vocab_size=4096, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                    num_attention_heads=2))
base.save_pretrained("base")
graft = PeerGraftConfig(task_type="CAUSAL_LM", num_experts=16, num_experts_per_head=4, num_retrieval_heads=1)
grafted = get_peft_model(base, graft).eval()
for parameter in grafted.parameters():
    if parameter.requires_grad:
        torch.nn.init.normal_(parameter)
grafted.save_pretrained("adapter")
loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter").eval()
torch.testing.assert_close(loaded(tokens).logits, grafted(tokens).logits)
with loaded.disable_adapter():
    assert not torch.allclose(loaded(tokens).logits, grafted(tokens).logits)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([*PIP, "wheel", CHECKOUT, "--no-deps", "--no-build-isolation", "-w", folder], check=True)
    (file,) = folder.glob("*.whl")
    return file


def test_has_the_package_and_its_configurations(wheel):
    """And nothing else: no tests, no examples, no checkpoints of the repository."""
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = [file for folder in ("modeling_peer", "configuration") for file in (CHECKOUT / folder).rglob("*")]
    names = [file.relative_to(CHECKOUT).as_posix() for file in sources if file.is_file() and file.suffix != ".pyc"]
    assert found == {name if name.startswith("modeling_peer/") else f"modeling_peer/{name}" for name in names}
    assert {".c", ".h", ".json", ".py"} <= {Path(name).suffix for name in found}


@slow
def test_serves_a_user(wheel, tmp_path):
    """The new environment has what this one has, behind the wheel, but not this checkout."""
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    (packages,) = (tmp_path / "venv").glob("lib/*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"])
    user = tmp_path / "user"
    user.mkdir()
    (user / "script.py").write_text(SCRIPT)
    with HubServer() as hub:
        environment = os.environ | hub.environment(tmp_path / "home")
        done = subprocess.run([python, "-I", "script.py"], cwd=user, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "model.safetensors" in hub.files("user/peer")
    imported_from, *configurations = done.stdout.split("\n")[0].split()
    assert Path(imported_from).is_relative_to(packages)
    assert configurations == sorted(file.parent.name for file in (CHECKOUT / "configuration").glob("*/config.json"))
