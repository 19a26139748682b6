# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The project's own tests, on the releases of libraries and on the device that are here."""

import functools
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu.rows import Row, SkippedError
from gpu.settings import Settings


ROOT = Path(__file__).parents[2]

# Seconds that a group of tests may take.
MOST_SECONDS = 240

# Failed tests that are named.
MOST_NAMES = 20


def test_rows(settings: Settings) -> dict[str, Row]:
    """A check for each group of tests."""
    return {f"tests: {name}": functools.partial(run_tests, patterns) for name, patterns in settings.tests.items()}


def run_tests(patterns: list[str]) -> dict[str, Any]:
    """Runs test files by pytest, and counts results. A test whose packages are missing does not count as failed."""
    if find_spec("pytest") is None:
        raise SkippedError("pytest is not installed.")
    files = sorted(str(file) for pattern in patterns for file in ROOT.glob(pattern))
    if not files:
        raise SkippedError(f"There are no tests {', '.join(patterns)}.")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--junitxml={report}"]
        variables = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }
        command = [sys.executable, "-m", "pytest", *options, *files]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=MOST_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise SkippedError(f"The tests took longer than {MOST_SECONDS} seconds.") from None
        if not report.is_file():
            return {"passed": False, "output": (done.stdout + done.stderr)[-2000:]}
        return _counts(ElementTree.parse(report).getroot())


def _counts(root):
    cases = list(root.iter("testcase"))
    failed = [each for each in cases if any(_is_failure(found) for found in each)]
    return {
        "passed": not failed and bool(cases),
        "tests": len(cases),
        "skipped_tests": sum(each.find("skipped") is not None for each in cases),
        "failed_tests": [f"{each.get('classname')}::{each.get('name')}" for each in failed][:MOST_NAMES],
        "packages_missing": sum(any(_is_missing_package(found) for found in each) for each in cases),
    }


def _is_failure(found):
    return found.tag in ("failure", "error") and not _is_missing_package(found)


def _is_missing_package(found):
    missing = re.search(r"ModuleNotFoundError: No module named '(\w+)", found.text or "")
    return found.tag in ("failure", "error") and missing is not None and missing[1] != "modeling_peer"
