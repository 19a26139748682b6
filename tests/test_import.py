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
"""Importing the package is cheap, and what it offers is there."""

import subprocess
import sys

import modeling_peer


# What models are made of and what grafts are a method of, with all that these import themselves.
BEFORE = """
import sys, time
import peft
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
"""


def run(script):
    completed = subprocess.run([sys.executable, "-c", BEFORE + script], capture_output=True, text=True, timeout=300)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def test_importing_takes_little_time():
    """Time of the processor, as others may keep it busy; the first import also compiles the files."""
    script = """
start = time.process_time()
import modeling_peer
print(time.process_time() - start)
"""
    assert any(float(run(script)) < 0.3 for _ in range(3))


def test_importing_leaves_out_what_few_need():
    """Training, data loading and progress bars, whatever of it Transformers and PEFT do not import themselves."""
    script = """
before = set(sys.modules)
import modeling_peer
from peft import PeftType
assert PeftType("PEER_GRAFT")
print(*sorted(set(sys.modules) - before))
"""
    found = run(script).split()
    assert "modeling_peer.graft.model" in found and "modeling_peer.graft_merged" in found
    slow = ("modeling_peer.analysis.", "modeling_peer.continual.", "modeling_peer.optim.", "transformers.trainer")
    slow += ("transformers.training_args", "datasets", "gguf", "tqdm", "matplotlib", "triton.")
    assert not [name for name in found if name.startswith(slow)]


def test_public_names_are_there():
    for name in [*modeling_peer.__all__, "PeerGraftConfig", "PeerGraftModel"]:
        assert getattr(modeling_peer, name).__module__.startswith("modeling_peer"), name
        assert name in dir(modeling_peer)
    assert not hasattr(modeling_peer, "nothing_of_this_name")
