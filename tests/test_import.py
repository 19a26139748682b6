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
`import modeling_peer`: what it costs, and that it changes nothing in the process but the registries of auto classes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]

# What a program that uses PEFT has imported anyway.
BEFORE = """
import json, os, signal, sys, threading, time
import peft, torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
"""


def run(script, **environment):
    """What a script prints last, as JSON, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", BEFORE + script],
        env=os.environ | {"PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_it_changes_nothing_in_the_process(tmp_path):
    script = """
forks, hooks = [], torch.nn.modules.module
registrations = torch._C._dispatch_get_registrations_for_dispatch_key
os.register_at_fork = lambda **functions: forks.append(list(functions))
def state():
    return {
        "aten": [
            sorted(name for name in registrations(key) if name.startswith("aten::"))
            for key in ("CPU", "CUDA", "SparseCPU", "SparseCUDA", "CompositeImplicitAutograd", "AutogradCPU")
        ],
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "grad": torch.is_grad_enabled(),
        "random": torch.get_rng_state().sum().item(),
        "modules": [len(hooks._global_forward_hooks), len(hooks._global_backward_hooks)],
        "python threads": threading.active_count(),
        "environment": dict(os.environ),
        "path": list(sys.path),
        "signals": [str(signal.getsignal(each)) for each in signal.valid_signals()],
    }
before = state()
import modeling_peer
after = state()
print(json.dumps({"changed": [key for key in before if before[key] != after[key]], "forks": forks}))
"""
    found = run(script, HF_HOME=str(tmp_path / "home"))
    assert found == {"changed": [], "forks": []}
    assert not (tmp_path / "home" / "modeling_peer").exists()  # and nothing is compiled


def test_it_is_quick():
    """In seconds of the processor, the least of some: other processes do not count."""
    script = """
start = time.process_time()
import modeling_peer
print(time.process_time() - start)
"""
    measured = []
    for _ in range(4):
        measured.append(run(script, OMP_NUM_THREADS="1"))
        if measured[-1] < 0.3:
            return
    pytest.fail(f"importing the package took {measured} s")
