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
"""Packages that a user brings as wheels, for machines without a network."""

import zipfile
from pathlib import Path


def unpack(wheels: Path, target: Path) -> Path:
    """
    Unpacks all wheels of a folder into another, which is then for `sys.path`; nothing is installed.

    Raises:
        `ValueError`: if there are no wheels.
    """
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise ValueError(
            f"There are no wheels in --wheels {wheels}: fill it with `pip download`, see docs/on-a-gpu.md."
        )
    for file in files:
        with zipfile.ZipFile(file) as wheel:
            wheel.extractall(target)
    return target
