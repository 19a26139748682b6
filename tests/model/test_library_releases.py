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
"""Releases of Transformers and torch that are not supported are refused; in others, names that differ are found."""

import ast
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config

from modeling_peer import PeerForCausalLM, factored_gradient, library_releases


PACKAGE = Path(library_releases.__file__).parent

REFUSED = [
    ("Transformers", "4.57.6"),
    ("Transformers", "5.16.0"),
    ("Transformers", "6.0.0.dev0"),
    ("torch", "2.8.1+cu128"),
    ("torch", "3.0.0"),
]
SUPPORTED = [
    ("Transformers", "5.16.1"),
    ("Transformers", "5.99.0.dev0"),
    ("torch", "2.9.0a0+50eac81.nv25.09"),  # as a vendor numbers its builds
    ("torch", "2.99.1"),
]


def imports_of(module: str) -> set[str]:
    """The package's modules that a flat file imports, those for a type checker left out."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    checked = {node for each in ast.walk(tree) if isinstance(each, ast.If) for node in ast.walk(each)}
    return {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level} - {
        node.module for node in checked if isinstance(node, ast.ImportFrom)
    }


@pytest.mark.parametrize(("library", "release"), REFUSED)
def test_unsupported_releases_are_refused(library, release, monkeypatch):
    monkeypatch.setitem(library_releases.FOUND_RELEASES, library, release)
    message = rf"supports Transformers 5\.16\.1 to 5\.x and torch 2\.9 to 2\.x, and found {library} {release[:5]}"
    with pytest.raises(ImportError, match=message):
        library_releases.check_releases()


@pytest.mark.parametrize(("library", "release"), SUPPORTED)
def test_supported_releases_are_not(library, release, monkeypatch):
    monkeypatch.setitem(library_releases.FOUND_RELEASES, library, release)
    library_releases.check_releases()


REMOTE_CODE = """
import sys
import transformers
from transformers import AutoModelForCausalLM

transformers.__version__ = "5.15.1"
sys.modules["transformers.modeling_rope_utils"] = None  # stands for a module that release would not have
sys.modules["modeling_peer"] = None
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = os.environ | {"HF_MODULES_CACHE": str(cwd / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", *command], env=environment, capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 1
    return result.stderr.splitlines()[-1]


def test_a_checkpoints_own_code_refuses_them_before_it_imports_anything_else(tmp_path):
    PeerForCausalLM(tiny_config()).save_pretrained(tmp_path / "model")
    error = run(REMOTE_CODE, tmp_path / "model", cwd=tmp_path)
    assert error.startswith("ImportError: PEER for Transformers supports") and "found Transformers 5.15.1" in error


def test_the_package_refuses_them(tmp_path):
    error = run('import torch; torch.__version__ = "2.8.0"; import modeling_peer', cwd=tmp_path)
    assert error.startswith("ImportError: PEER for Transformers supports") and "found torch 2.8.0" in error


@pytest.mark.parametrize("file", ["configuration_peer.py", "graft_merged.py"])
def test_the_check_comes_first(file):
    """In the files that Transformers runs first of the code that a checkpoint carries."""
    docstring, check, *_ = ast.parse((PACKAGE / file).read_text()).body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(check, ast.ImportFrom) and (check.level, check.module) == (1, "library_releases")
    assert not imports_of("library_releases")


def forward_with_cache() -> Callable:
    def forward(self, hidden_states, cache: int | None = None, **kwargs):
        return self, hidden_states, cache, kwargs

    return library_releases.rename_cache(forward)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_has_the_name_of_the_release(name, monkeypatch):
    monkeypatch.setattr(library_releases, "CACHE", name)
    forward = forward_with_cache()
    assert list(inspect.signature(forward).parameters) == ["self", "hidden_states", name, "kwargs"]
    assert forward(1, 2, 3) == forward(1, hidden_states=2, **{name: 3}) == (1, 2, 3, {})
    assert forward(1, 2) == (1, 2, None, {})
    assert inspect.signature(forward).parameters[name].annotation == int | None


def test_before_5_24_a_cache_of_continuous_batching_is_another_argument(monkeypatch):
    monkeypatch.setattr(library_releases, "CACHE", "past_key_values")
    forward = forward_with_cache()
    assert forward(1, 2, cache=4) == (1, 2, None, {"cache": 4})
    assert forward(1, 2, cache=4, past_key_values=3) == (1, 2, 3, {"cache": 4})


def test_what_needs_a_later_release_says_so(monkeypatch):
    monkeypatch.setitem(library_releases.FOUND_RELEASES, "Transformers", "5.20.2")
    library_releases.require_transformers("5.20", "this")
    with pytest.raises(
        RuntimeError, match=r"^Tensor parallelism needs Transformers 5\.23 or later, found 5\.20\.2\.$"
    ):
        library_releases.require_transformers("5.23", "Tensor parallelism")


def test_a_private_function_that_is_gone_is_missed_once(caplog):
    function = library_releases._private("_no_such_function", -1, "something else happens.")
    assert [function(1), function()] == [-1, -1]
    assert library_releases._private("_current_graph_task_id", None, "") is torch._C._current_graph_task_id
    (record,) = caplog.records
    assert record.getMessage().endswith("has no `torch._C._no_such_function`: something else happens.")


def test_without_its_parallel_styles_the_library_only_loses_tensor_parallelism():
    """They are hidden after Transformers has imported what it needs of them itself."""
    script = """
import sys
from transformers import GenerationMixin, PreTrainedModel
sys.modules["transformers.distributed.tensor_parallel"] = None
from tiny_models import random_tokens, tiny_config, tiny_model
print(tuple(tiny_model(tiny_config("peer", "dense"))(random_tokens(2, 3)).logits.shape[:2]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "(2, 3)", done.stderr[-2000:]
    assert done.stderr.count("Tensor parallelism of experts is not available") == 1


def test_without_private_modules_of_torch_factored_gradients_work():
    """They are hidden from this package alone: torch needs them itself. Others are refused where they are needed."""
    script = """
import builtins, sys
import torch
import_module = builtins.__import__
def without(name, globals=None, *args, **kwargs):
    if name in ("torch.utils._pytree", "torch.utils._python_dispatch"):
        if globals and globals["__name__"].startswith("modeling_peer"):
            raise ImportError(name)
    return import_module(name, globals, *args, **kwargs)
builtins.__import__ = without
from modeling_peer import factored_gradient, split_initialization
from table_gradients import random_parts
gradient = factored_gradient.FactoredGradient(torch.empty(9, 4), random_parts(0, 9, 4, [(5, 3)]))
gradient[1:] = 0
torch._foreach_mul_([gradient], 2.0)
print(gradient.to_rows().ne(0).any(1).tolist())
try:
    with split_initialization.WholeDraws():
        pass
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [Path(__file__).parents[1], Path.cwd()]))},
        capture_output=True,
        text=True,
    )
    rows, error = done.stdout.splitlines() or done.stderr.splitlines()[-2:]
    assert rows == str([True] + 8 * [False])
    assert error == f"torch {torch.__version__} has no `TorchDispatchMode`: split models cannot be drawn."


def test_an_operator_that_is_gone_is_left_out():
    handlers = factored_gradient._by_operator({"add.Tensor": min, "add.Gone": min, "_foreach_gone_.Scalar": min})
    assert handlers == {torch.ops.aten.add.Tensor: min}
