# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""All tests of kernels that are marked `interpreted`, in a process in which Triton is interpreted."""

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
from kernel_cases import needs_triton
from slow_tests import REASON


FOLDER = Path(__file__).parent
FILES = sorted(
    file
    for file in FOLDER.glob("test_*.py")
    if re.search(r"mark\.interpreted|\bTRITON\b", file.read_text()) and file != Path(__file__)
)

pytestmark = needs_triton


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """The tests of each file that ran, in XML, and what was printed."""
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    command = [sys.executable, "-m", "pytest", *FILES, "-q", "-p", "no:cacheprovider", "--durations=5"]
    variables = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [*command, f"--junit-xml={report}"], env=variables, cwd=FOLDER.parents[1], capture_output=True, text=True
    )
    assert finished.returncode in (0, 1), finished.stdout + finished.stderr
    tests = defaultdict(list)
    for test in ElementTree.parse(report).iter("testcase"):
        module = test.get("classname").removeprefix("tests.kernels.").split(".")[0]
        tests[f"{module}.py"].append(test)
    return tests, finished.stdout


@pytest.mark.parametrize("file", [file.name for file in FILES])
def test_in_the_interpreter(interpreted, file):
    tests, printed = interpreted
    assert tests[file]
    found = [each for test in tests[file] for each in test if each.get("message") != REASON]
    assert not found, printed  # failures, errors and skips
