# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The folder of a study, which can be resumed: one study owns it, and each of its files is complete or absent."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


# Arguments that may differ between calls: they select which runs are made and do not change their results.
FREE_ARGUMENTS = ("output_dir", "arms", "seeds")


def claim_folder(folder: Path, arguments: dict[str, Any]) -> None:
    """
    Creates the folder of a study, or ends the process if an existing folder belongs to another study.

    Args:
        folder (`Path`): Folder of the study.
        arguments (`dict[str, Any]`): Arguments of the study. They are saved in `arguments.json`.
    """
    arguments = {name: value for name, value in arguments.items() if name not in FREE_ARGUMENTS}
    file = folder / "arguments.json"
    if file.exists():
        before = json.loads(file.read_text())
        changed = {name for name in arguments.keys() | before.keys() if arguments.get(name) != before.get(name)}
        if changed:
            raise SystemExit(
                f"{folder} holds a study with other arguments: "
                + ", ".join(f"{name} was {before.get(name)}, got {arguments.get(name)}" for name in sorted(changed))
                + ". Choose another --output_dir, or remove it."
            )
        return
    write_json(file, arguments)


@contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Holds the folder of a study, which is created if need be. Ends the process if another one holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise SystemExit(
            f"Another process is running the study in {folder}: wait for it, or choose another --output_dir."
        ) from None


def write_json(file: Path, content: Any) -> None:
    """Writes a JSON file atomically: it is either complete or absent."""
    write_text(file, json.dumps(content, indent=1))


def write_text(file: Path, content: str) -> None:
    """Writes a text file atomically: it is either complete or absent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.unfinished-{os.getpid()}")
    unfinished.write_text(content)
    unfinished.rename(file)


def read_json(file: Path) -> Any:
    """Reads a file of [`write_json`]."""
    return json.loads(file.read_text())


def write_runs(file: Path, head: dict[str, Any], runs: dict[str, dict[str, Any]]) -> None:
    """Writes the results of all runs to a JSON file with one line per run, `runs`, after what they share."""
    shared = json.dumps(head, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(run)}" for name, run in sorted(runs.items()))
    write_text(file, f'{shared},\n "runs": {{\n{lines}\n }}\n}}\n')
