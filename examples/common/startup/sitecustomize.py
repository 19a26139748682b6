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
"""Imported by Python when `./run python` starts it: names the extra of this package that a script is missing."""

import re
import sys
from importlib.metadata import PackageNotFoundError, requires


def _extra_with(module):
    """The smallest extra of this package that installs a module, whose name is that of its distribution."""
    try:
        found = [re.match(r"([\w-]+).*extra == ['\"](\w+)", each) for each in requires("modeling-peer") or ()]
    except PackageNotFoundError:
        return None
    packages: dict[str, list[str]] = {}
    for each in filter(None, found):
        packages.setdefault(each[2], []).append(each[1].replace("-", "_").lower())
    return min(
        (extra for extra in packages if module.lower() in packages[extra]),
        key=lambda e: len(packages[e]),
        default=None,
    )


def _name_extra(error_type, error, traceback):
    sys.__excepthook__(error_type, error, traceback)
    if isinstance(error, ModuleNotFoundError) and (extra := _extra_with((error.name or "").partition(".")[0])):
        print(
            f"`{error.name}` comes with the extra `{extra}` of modeling-peer. In its folder:\n"
            f"    {sys.executable} -m pip install --editable '.[{extra}]'",
            file=sys.stderr,
        )


sys.excepthook = _name_extra
