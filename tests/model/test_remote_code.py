# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
A checkpoint carries the code it needs: it loads with `trust_remote_code=True` where the package is not. That code says
which releases of Transformers and torch run models.
"""

import ast
import contextlib
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from script_runs import run_script
from tiny_models import VARIANTS, random_tokens, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer


ROOT = Path(__file__).parents[2]
CHECKPOINTS = ROOT / "tests" / "checkpoints"
SHIPPED = sorted((ROOT / "examples" / "checkpoints").iterdir())

CORE = {
    f"{name}.py": ROOT / "modeling_peer" / f"{name}.py"
    for name in ("configuration_peer", "experts", "feed_forward", "modeling_peer", "router")
}

CORE_FILES = {name: file.read_bytes() for name, file in CORE.items()}

AUTO_CLASSES = {
    *("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForQuestionAnswering"),
    *("AutoModelForSequenceClassification", "AutoModelForTokenClassification"),
}

WITHOUT_THE_PACKAGE = """
import json, sys
import torch

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_peer":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import transformers

def load(folder, auto_class="AutoModelForCausalLM", **fields):
    return getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True, **fields)

found = {}
"""


def run(script, *arguments, home, isolated=True, **environment):
    """What a script prints last, as JSON. Isolated, it has neither the current folder nor `PYTHONPATH`."""
    environment |= {"HF_HOME": str(home / "huggingface"), "HF_HUB_OFFLINE": "1"}
    flags = ["-I"] if isolated else []
    return json.loads(run_script(script, *arguments, flags=flags, cwd=home, **environment).splitlines()[-1])


def with_code(name, folder):
    """A copy of a checkpoint of tests/checkpoints/, which are without code."""
    shutil.copytree(CHECKPOINTS / name, folder / name)
    for file in CORE.values():
        shutil.copy(file, folder / name)
    return folder / name


@pytest.fixture
def folder(tmp_path):
    """That of a saved model, with tokens and its logits for them."""
    model, tokens = tiny_model(VARIANTS["all_in_one"]), random_tokens(2, 9)
    model.save_pretrained(tmp_path / "checkpoint")
    torch.save((tokens, model(tokens).logits.detach()), tmp_path / "checkpoint" / "expected.pt")
    return tmp_path / "checkpoint"


def test_a_saved_model_travels_on(folder, tmp_path):
    """With all its classes, heads first: nothing else has made the base model known."""
    script = """
folder = sys.argv[1]
tokens, expected = torch.load(folder + "/expected.pt")
names = json.load(open(folder + "/config.json"))["auto_map"]
for auto_class in sorted(set(names) - {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}) + ["AutoModel"]:
    found[auto_class] = type(load(folder, auto_class)).__name__
model = load(folder)
model.save_pretrained(folder + "/again")
again = load(folder + "/again")
for each in (model, again):
    torch.testing.assert_close(each(tokens).logits, expected)
again.train()(tokens, labels=tokens).loss.backward()
assert all(parameter.grad.any() for name, parameter in again.named_parameters() if "down_proj" in name)
for kernels in ("eager", "torch", "cpu", "of somebody else"):
    torch.testing.assert_close(load(folder, expert_kernels=kernels)(tokens).logits, expected)
print(json.dumps(found))
"""
    found = run(WITHOUT_THE_PACKAGE + script, folder, home=tmp_path)
    assert found == {
        "AutoModel": "PeerModel",
        "AutoModelForQuestionAnswering": "PeerForQuestionAnswering",
        "AutoModelForSequenceClassification": "PeerForSequenceClassification",
        "AutoModelForTokenClassification": "PeerForTokenClassification",
    }
    first, second = (json.loads((each / "config.json").read_text()) for each in (folder, folder / "again"))
    assert first["auto_map"] == second["auto_map"]
    for each in (folder, folder / "again"):
        assert {file.name: file.read_bytes() for file in each.glob("*.py")} == CORE_FILES


def test_checkpoints_of_earlier_code_compute_the_same(tmp_path):
    """Grown ones, and one of another class, where the package cannot be imported."""
    script = """
from safetensors.torch import load_file
saved = load_file(sys.argv[1])
for folder in sys.argv[2:]:
    name = folder.rpartition("/")[2]
    classifies = name == "sequence_classification"
    model = load(folder, "AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM")
    tokens, mask, expected = (saved[f"{name}.{each}"] for each in ("input_ids", "attention_mask", "logits"))
    chosen = slice(None) if classifies else mask.bool()
    logits = model(input_ids=tokens, attention_mask=mask).logits
    torch.testing.assert_close(logits[chosen], expected[chosen], rtol=0, atol=1e-5)
print("true")
"""
    folders = [with_code(name, tmp_path) for name in ("grown", "grown_shared_pool", "sequence_classification")]
    assert run(WITHOUT_THE_PACKAGE + script, CHECKPOINTS / "logits.safetensors", *folders, home=tmp_path)


def test_a_quantized_checkpoint_asks_for_the_package(tmp_path):
    script = """
for folder in sys.argv[1:]:
    try:
        load(folder)
    except ImportError as error:
        found[folder] = "`modeling_peer`" in str(error)
print(json.dumps(list(found.values())))
"""
    folders = [with_code(name, tmp_path) for name in ("quantized_8", "quantized_4")]
    assert run(WITHOUT_THE_PACKAGE + script, *folders, home=tmp_path) == [True, True]


def test_the_code_of_a_checkpoint_stands_alone():
    """It imports nothing of the package but itself, and stays short."""
    allowed = {"huggingface_hub", "packaging", "torch", "transformers", *sys.stdlib_module_names}
    lines = 0
    for file in CORE.values():
        text = file.read_text()
        lines += sum(
            not line.startswith("#") or index > 12 for index, line in enumerate(text.splitlines())
        )  # no license
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, file
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in CORE, file
            elif isinstance(node, ast.ImportFrom):
                assert node.module.partition(".")[0] in allowed, file
    assert lines <= 1600


def test_the_package_and_a_copy_live_in_one_process(folder, tmp_path):
    script = """
import json, sys, torch
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
tokens, expected = torch.load(folder + "/expected.pt")
copy = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
import modeling_peer
package = AutoModelForCausalLM.from_pretrained(folder)
again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(package) is modeling_peer.PeerForCausalLM and type(copy) is not type(package)
for model in (copy, package, again):
    torch.testing.assert_close(model.eval()(tokens).logits, expected)
    assert len(model(tokens, output_router_indices=True).router_indices) == 3
    model.train()(tokens, labels=tokens).loss.backward()
print("true")
"""
    assert run(script, folder, home=tmp_path, isolated=False)


class TestShipped:
    """The checkpoints of examples/checkpoints/."""

    @pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
    def test_carry_the_code_of_the_package(self, folder):
        links = list(folder.glob("*.py"))
        assert {file.name for file in links} == {*CORE} and all(file.samefile(CORE[file.name]) for file in links)
        assert set(json.loads((folder / "config.json").read_text())["auto_map"]) == AUTO_CLASSES

    def test_load_where_the_package_is_not(self, tmp_path):
        script = """
for folder in sys.argv[1:]:
    model = load(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer("def main(", return_tensors="pt")
    found[folder] = {
        "logits": model(**inputs).logits[0, -1].tolist(),
        "generated": model.generate(**inputs, max_new_tokens=5, do_sample=False).tolist(),
    }
print(json.dumps(found))
"""
        # As their cards say to copy them; what links point to is copied, and missing in a copy of the links.
        copies = {folder: shutil.copytree(folder, tmp_path / "copies" / folder.name) for folder in SHIPPED}
        found = run(WITHOUT_THE_PACKAGE + script, *copies.values(), home=tmp_path)
        for folder, copied in copies.items():
            plain = shutil.copytree(folder, tmp_path / "links" / folder.name, symlinks=True)
            model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
            inputs = AutoTokenizer.from_pretrained(folder)("def main(", return_tensors="pt")
            generated = model.generate(**inputs, max_new_tokens=5, do_sample=False)
            assert found[str(copied)]["generated"] == generated.tolist()
            logits = model(**inputs).logits[0, -1].tolist()
            assert found[str(copied)]["logits"] == pytest.approx(logits, abs=1e-4)

    def test_load_where_the_package_is_not_imported(self, tmp_path):
        """By the code that they carry, though the package is installed."""
        script = """
import json, sys
from transformers import AutoModelForCausalLM, pipeline
found = []
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    generate = pipeline("text-generation", model=folder, trust_remote_code=True)
    (said,) = generate("def main(", max_new_tokens=5, do_sample=False)
    assert said["generated_text"].startswith("def main(")
    found += [type(each).__module__.partition(".")[0] for each in (model, generate.model)]
print(json.dumps([*found, "modeling_peer" in sys.modules]))
"""
        found = run(script, *SHIPPED, home=tmp_path, isolated=False)
        assert found == [*["transformers_modules"] * 4, False]


@pytest.mark.parametrize(
    ("library", "release", "is_supported"),
    [
        *((transformers, release, False) for release in ("4.57.6", "5.18.2", "6.0.0.dev0")),
        *((transformers, release, True) for release in ("5.19.0", "5.99.0.dev0")),
        *((torch, release, False) for release in ("2.8.1+cu128", "3.0.0")),
        *((torch, release, True) for release in ("2.9.0a0+50eac81.nv25.09", "2.99.1")),
    ],
)
def test_releases(library, release, is_supported, monkeypatch):
    """What `configuration_peer.py` says, imported first of the code of a checkpoint. A vendor's build may be an alpha."""
    # What is imported by that name now: Transformers puts another module in the place of its own.
    monkeypatch.setattr(sys.modules[library.__name__], "__version__", release)
    spec = importlib.util.spec_from_file_location("configuration_of_a_checkpoint", CORE["configuration_peer.py"])
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    with contextlib.nullcontext() if is_supported else pytest.raises(ImportError, match="found"):
        spec.loader.exec_module(module)


def test_without_its_parallel_styles_the_library_only_loses_tensor_parallelism(tmp_path):
    """They are hidden after Transformers has imported what it needs of them itself."""
    script = """
import sys
from transformers import GenerationMixin, PreTrainedModel
sys.modules["transformers.distributed.tensor_parallel"] = None
from tiny_models import random_tokens, tiny_config, tiny_model
print(list(tiny_model(tiny_config("peer", "dense"))(random_tokens(2, 3)).logits.shape[:2]))
"""
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    assert run(script, home=tmp_path, isolated=False, PYTHONPATH=path) == [2, 3]
