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
"""All tests of kernels that are marked `interpreted`, each file in a process in which Triton is interpreted."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).parent
FILES = sorted(file.name for file in FOLDER.glob("test_*triton*.py") if "mark.interpreted" in file.read_text())


# Where its wheels are, Triton is a part of the test environment, and its absence a failure.
@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Triton is for Linux, on x86-64."
)
@pytest.mark.parametrize("file", [file for file in FILES if file != Path(__file__).name])
def test_in_the_interpreter(file):
    command = [sys.executable, "-m", "pytest", FOLDER / file, "-q", "-p", "no:cacheprovider", "--durations=5"]
    variables = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=variables, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert re.search(r"\d+ passed", finished.stdout)
    assert "skipped" not in finished.stdout
