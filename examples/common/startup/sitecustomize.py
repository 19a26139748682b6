# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
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
