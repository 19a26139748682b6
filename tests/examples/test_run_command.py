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
What `./run` does before and after it makes its environment, with a Python that installs nothing and prints how it is
called.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]

PYTHON = """#!/bin/sh
case "$*" in
    -c*) exit ${TOO_OLD:-0} ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && exit ${NO_VENV:-0} ;;
    "-m pip "*) echo "Collecting torch" ;;
    *) echo "in $PWD: $*" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout without an environment, and another folder beside it."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("run", "pyproject.toml", "examples", "tests"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "run").unlink()
    (folder / "run").write_bytes((ROOT / "run").read_bytes())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "my.py").touch()
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return folder


def call(checkout, *words, **environment):
    return subprocess.run(
        ["sh", checkout / "run", *words],
        capture_output=True,
        text=True,
        cwd=checkout.parent / "elsewhere",
        env={**os.environ, "PYTHON": str(checkout.parent / "python"), **environment},
    )


def test_own_scripts_run_where_they_are_called(checkout):
    done = call(checkout, "python", "my.py", "--flag")
    assert done.stdout == f"in {checkout.parent}/elsewhere: my.py --flag\n"
    assert "Installing modeling-peer[train] into" in done.stderr and "Collecting torch" in done.stderr
    again = call(checkout, "python", "-c", "pass")
    assert (again.stdout, again.stderr) == ("", "")
    assert call(checkout, "quickstart", "--anything").stdout.startswith(f"in {checkout}: examples/quickstart.py")


def test_a_study_runs_in_a_new_environment_with_the_flags_that_were_checked(checkout):
    done = call(checkout, "study", "recipe", "--hours", "1", "--output_dir=a")
    assert done.stdout == f"in {checkout}: -m studies.recipe --hours 1 --output_dir=a\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quickstart", "--max_step=3", "--no-such-flag"], "quickstart has no flag --no-such-flag."),
        (["benchmark", "--num_expert", "4", "--bad"], "benchmark has no flag --bad."),
        (["study", "scaling", "--plan", "a.json", "--bad=1"], "study has no flag --bad."),
        (["study", "no_such"], "There is no study 'no_such'"),
        (["python", "no.py"], "There is no no.py in "),
        (["tests", "-k", "word", "tests/no.py::TestAll"], "There is no tests/no.py."),
        (["checks", "now"], "checks takes no arguments, got now."),
        (["no_such_part"], "There is no part 'no_such_part'."),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_installed(checkout, words, message):
    done = call(checkout, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("environment", [{"TOO_OLD": "1"}, {"PYTHON": "no-such-python"}])
def test_wrong_interpreters_are_told(checkout, environment):
    done = call(checkout, "python", **environment)
    assert done.returncode == 2
    assert "is not Python 3.10 or later: name another by PYTHON=" in done.stderr


def test_an_environment_that_could_not_be_made_is_made_by_the_next_call(checkout):
    done = call(checkout, "python", "my.py", NO_VENV="1")
    assert done.returncode == 2 and "install its module venv" in done.stderr
    assert not (checkout / ".venv").exists()
    assert call(checkout, "python", "my.py").stdout.endswith(": my.py\n")


def test_an_environment_without_its_python_is_told(checkout):
    call(checkout, "python", "my.py")
    (checkout / ".venv" / "bin" / "python").unlink()
    done = call(checkout, "python", "my.py")
    assert done.returncode == 2 and f"{checkout}/.venv has no pip" in done.stderr


def test_an_environment_is_made_again_where_the_checkout_was_moved_to(checkout):
    call(checkout, "python", "my.py")
    moved = checkout.rename(checkout.parent / "moved")
    done = call(moved, "python", "my.py")
    assert f"Installing modeling-peer[train] into {moved}/.venv" in done.stderr
    assert call(moved, "python", "my.py").stderr == ""


def test_is_not_called_through_a_link(checkout):
    (checkout.parent / "elsewhere" / "run").symlink_to(checkout / "run")
    done = call(checkout.parent / "elsewhere", "python", "my.py")
    assert done.returncode == 2 and "elsewhere is no checkout" in done.stderr
    assert not (checkout.parent / "elsewhere" / ".venv").exists()


def test_a_gpu_is_checked_with_a_python_that_has_torch(checkout):
    assert call(checkout, "gpu", "--tiny").stdout == f"in {checkout}: -m gpu --tiny\n"
    done = call(checkout, "gpu", "--tiny", TOO_OLD="1")
    assert done.returncode == 2 and "has no torch or no transformers: name one that has both" in done.stderr


@pytest.mark.parametrize(("module", "extra"), [("peft.tuners", "graft"), ("datasets", "train"), ("no_such", None)])
def test_extras_are_named_where_a_package_is_missing(module, extra):
    done = subprocess.run(
        [sys.executable, "-c", f"raise ModuleNotFoundError(name={module!r})"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "examples" / "common" / "startup")},
    )
    assert "ModuleNotFoundError" in done.stderr
    assert ("extra" in done.stderr) == (extra is not None)
    assert extra is None or f"pip install --editable '.[{extra}]'" in done.stderr
