# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Command-line flags of the examples, in the style of Transformers' own examples."""

import os
import shlex
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import fields, make_dataclass
from glob import has_magic
from pathlib import Path
from typing import get_type_hints

from transformers import HfArgumentParser


class UsageError(ValueError):
    """An error in flags or files, which users can fix. Its message alone, without a traceback, tells them how."""


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults of flags, and keeps the line breaks of the description."""


def parse_arguments(dataclass_types: tuple[type, ...], description: str, main_flags: Sequence[str] = ()) -> tuple:
    """
    Parses the command line, or the JSON file that is its only argument, into one object of each dataclass. A
    `ValueError` of a dataclass ends the program with its message.

    Args:
        dataclass_types (`tuple[type]`): Dataclasses whose fields are the flags.
        description (`str`): Description at the beginning of `--help`.
        main_flags (`Sequence[str]`, *optional*):
            Names of the flags that `--help` shows, in this order; `--help_all` then shows all of them.
    """
    words = sys.argv[1:]
    if main_flags and "--help_all" in words:
        words = ["--help"]
    elif main_flags and {"-h", "--help"}.intersection(words):
        dataclass_types = (_main_dataclass(dataclass_types, main_flags),)
        description += "\nThese are the main flags; --help_all shows all of them.\n"
    parser = HfArgumentParser(
        dataclass_types,
        prog=_program(),
        description=description,
        usage="%(prog)s [--flag value ...]",
        formatter_class=_HelpFormatter,
    )
    with ends_on_usage_error(ValueError, OSError):
        if len(words) == 1 and words[0].endswith(".json"):
            return parser.parse_json_file(json_file=os.path.abspath(words[0]))
        return parser.parse_args_into_dataclasses(words)


def _main_dataclass(dataclass_types, names):
    """A dataclass of the fields with these names."""
    found = {}
    for dataclass_type in dataclass_types:
        types = get_type_hints(dataclass_type)
        found |= {field.name: (types[field.name], copy(field)) for field in fields(dataclass_type)}
    return make_dataclass("MainArguments", [(name, *found[name]) for name in names])


@contextmanager
def ends_on_usage_error(*error_types: type[Exception]) -> Iterator[None]:
    """End the program on `UsageError` or errors of these types, with their message and exit code 2."""
    try:
        yield
    except (UsageError, *error_types) as error:
        print(f"{_program()}: error: {error}", file=sys.stderr)
        sys.exit(2)


def command_to_share(words: Sequence[str], secret: str | None = None) -> str:
    """
    A command line without local paths: it keeps only the names of files and folders.

    Args:
        words (`Sequence[str]`): The words of the command, the first of which is the script.
        secret (`str`, *optional*): A value, such as an access token, that `TOKEN` replaces.
    """
    shown = [os.path.basename(words[0])]
    for word in words[1:]:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        shown.append(flag + equals + ("TOKEN" if value == secret else _without_place(value)))
    return shlex.join(shown)


def _without_place(value):
    """The last part of a path or pattern. A name of two parts that is no local path is kept: it may be a Hub id."""
    is_place = os.path.exists(value) or has_magic(value) or value.startswith((".", "/", "~"))
    return Path(value).name or value if is_place or len(Path(value).parts) > 2 else value


def _program():
    """The program for `--help`: the name of a script, or `python -m` and the name of a package."""
    spec = sys.modules["__main__"].__spec__
    return os.path.basename(sys.argv[0]) if spec is None else f"python -m {spec.parent}"
