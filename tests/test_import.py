# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""`import modeling_peer`: what it costs, and that it adds to registries and changes nothing else in the process."""

import json

import pytest
from script_runs import run_script

import modeling_peer


# What a program that uses PEFT has imported anyway.
BEFORE = """
import json, os, signal, sys, threading, time
import peft, torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
"""


def run(script, **environment):
    """What a script prints last, as JSON, in a process of its own."""
    return json.loads(run_script(BEFORE + script, **environment).splitlines()[-1])


def test_it_changes_nothing_in_the_process(tmp_path):
    script = """
forks, hooks, optimizer = [], torch.nn.modules.module, sys.modules["torch.optim.optimizer"]
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
        "optimizers": [len(optimizer._global_optimizer_pre_hooks), len(optimizer._global_optimizer_post_hooks)],
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


def test_it_replaces_nothing_in_libraries():
    """No function of a module and no attribute of a class is another one afterward, and no class has new ones."""
    script = """
import importlib, types
for name in ("peft.tuners.tuners_utils", "peft.peft_model", "transformers.trainer", "transformers.modeling_utils"):
    importlib.import_module(name)
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "huggingface_hub")

def attributes():
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] not in LIBRARIES or not isinstance(module, types.ModuleType):
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, types.ModuleType) or getattr(value, "__module__", None) != module_name:
                continue  # a module may be one that is imported when it is asked for something
            found[module_name, name] = {"": value}
            if isinstance(value, type):
                found[module_name, name] |= vars(value)
    return found

def changed():
    after = attributes()
    return [
        [*key, name]
        for key, values in before.items()
        for name in values.keys() | after[key].keys()
        if values.get(name, name) is not after[key].get(name, name)
    ]

before = attributes()
assert ("peft.tuners.tuners_utils", "BaseTuner") in before and ("peft.peft_model", "PeftModel") in before
assert "inject_adapter" in before["peft.tuners.tuners_utils", "BaseTuner"]
import modeling_peer
found = changed()
sys.modules["peft"].PeftModel._upload_modified_files = print
print(json.dumps([len(before), found, changed()]))
"""
    number, changed, patched = run(script)
    # PEFT's enumeration of methods has one more.
    assert number > 3000 and {tuple(each) for each in changed} <= {("peft.utils.peft_types", "PeftType", "PEER_GRAFT")}
    assert ["peft.peft_model", "PeftModel", "_upload_modified_files"] in patched


def test_it_is_quick():
    """In seconds of the processor, the least of some: other processes do not count."""
    script = """
import gc
gc.freeze()  # what was there before is not collected meanwhile
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


def test_it_leaves_out_what_few_need():
    """Training, data loading and progress bars, whatever of it Transformers and PEFT do not import themselves."""
    script = """
before = set(sys.modules)
import modeling_peer
from peft import PeftType
assert PeftType("PEER_GRAFT")
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    found = run(script)
    assert "modeling_peer.graft.model" in found and "modeling_peer.graft_merged" in found
    slow = ("modeling_peer.analysis.", "modeling_peer.continual.", "transformers.trainer")
    slow += ("transformers.training_args", "datasets", "gguf", "tqdm", "matplotlib", "triton.")
    assert not [name for name in found if name.startswith(slow)]


def test_public_names_are_there():
    for name in modeling_peer.__all__:
        assert getattr(modeling_peer, name).__module__.startswith("modeling_peer"), name
        assert name in dir(modeling_peer)
    assert not hasattr(modeling_peer, "nothing_of_this_name")
