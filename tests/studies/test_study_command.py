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
"""`./run study` starts the study with the given name, and lists the names of all studies without one."""

import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", [[], ["no_such"], ["../benchmark"]])
def test_lists_the_studies(name):
    done = subprocess.run([ROOT / "run", "study", *name], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[1:] == ["facts", "graft_starts", "recipe", "scaling", "stream"]
