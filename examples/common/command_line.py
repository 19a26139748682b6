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
"""Flags of the examples, as those of Transformers' own examples are."""

import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter

from transformers import HfArgumentParser


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults of flags, and keeps the line breaks of the description."""


def parse_arguments(dataclass_types: tuple[type, ...], description: str) -> tuple:
    """
    Parses the command line, or the JSON file that is its only argument, into one object of each dataclass.

    Args:
        dataclass_types (`tuple[type]`): Dataclasses whose fields are the flags.
        description (`str`): Description at the beginning of `--help`.
    """
    parser = HfArgumentParser(
        dataclass_types,
        prog=_program(),
        description=description,
        usage="%(prog)s [--flag value ...]",
        formatter_class=_HelpFormatter,
    )
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(json_file=os.path.abspath(sys.argv[1]))
    return parser.parse_args_into_dataclasses()


def _program():
    """The program for `--help`: the name of a script, or `python -m` and the name of a package."""
    spec = sys.modules["__main__"].__spec__
    return os.path.basename(sys.argv[0]) if spec is None else f"python -m {spec.parent}"
