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
"""Modules of this folder, run in processes of their own."""

import os
import sys
from pathlib import Path


EXAMPLES = Path(__file__).parent.parent


def module_command(module: str, argument: str) -> list[str]:
    """The command that runs a module of this folder, by its dotted name, with one argument."""
    return [sys.executable, "-m", module, argument]


def module_environment() -> dict[str, str]:
    """The environment of this process, in which `PYTHONPATH` starts with the folder that holds the modules."""
    path = filter(None, (str(EXAMPLES), os.environ.get("PYTHONPATH")))
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}
