# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
What `./run` does before and after it makes its environment, with a Python that installs nothing and prints how it is
called.
"""

import os
import subprocess
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
    for name in ("pyproject.toml", "examples", "tests"):
        (folder / name).symlink_to(ROOT / name)
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


def test_own_scripts_run_where_they_are_called_and_others_in_the_checkout(checkout):
    done = call(checkout, "python", "my.py", "--flag")
    assert done.stdout == f"in {checkout.parent}/elsewhere: my.py --flag\n"
    assert "Collecting torch" in done.stderr
    again = call(checkout, "python", "-c", "pass")
    assert (again.stdout, again.stderr) == ("", "")
    assert call(checkout, "quickstart", "--anything").stdout.startswith(f"in {checkout}: examples/quickstart.py")
    assert call(checkout, "facts").stdout == f"in {checkout}: examples/store_facts.py\n"
    study = call(checkout, "study", "recipe", "--hours", "1", "--output_dir=a")
    assert study.stdout == f"in {checkout}: -m studies.recipe --hours 1 --output_dir=a\n"


def test_an_environment_that_could_not_be_made_is_made_by_the_next_call(checkout):
    for environment in ({"NO_VENV": "1"}, {"TOO_OLD": "1"}, {"PYTHON": "no-such-python"}):
        assert call(checkout, "python", "my.py", **environment).returncode == 2
    assert not (checkout / ".venv").exists()
    assert call(checkout, "python", "my.py").stdout.endswith(": my.py\n")
