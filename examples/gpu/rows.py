# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The rows of a part: what is checked or measured one after the other, and the file that keeps what was found."""

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


# One check or measurement. Returns what was found, with `passed` if it is a check.
Row = Callable[[], dict[str, Any]]


class SkippedError(Exception):
    """Raised by a row that cannot run here. The message says why, in a sentence."""


class PartFile:
    """
    The file of a part, which is written after every row: what its results depend on, its rows, and which row runs.

    Args:
        file (`Path`)
        conditions (`dict`): What results depend on.

    Raises:
        `ValueError`: if the file is of other conditions.
    """

    def __init__(self, file: Path, conditions: dict[str, Any]):
        self.file = file
        conditions = json.loads(json.dumps(conditions))
        self.content = {"conditions": conditions, "running": None, "rows": {}}
        if file.is_file():
            found = json.loads(file.read_text())
            differing = [key for key in conditions if conditions[key] != found["conditions"].get(key)]
            if differing:
                raise ValueError(
                    f"{file} is of a run with other {differing}: --overwrite runs the part again, another "
                    "--output_dir keeps both."
                )
            self.content = found

    def is_finished(self, name: str) -> bool:
        """Whether a row has a result. One that failed or was skipped has none: it runs again."""
        row = self.content["rows"].get(name)
        return row is not None and not {"error", "skipped"} & row.keys() and row.get("passed", True)

    def was_tried(self, name: str, attempt: str) -> bool:
        """Whether a row ran in this attempt already."""
        return self.content["rows"].get(name, {}).get("attempt") == attempt

    def start(self, name: str) -> None:
        """Note that a row runs, for the case that the process ends in it."""
        self.content["running"] = name
        self._write()

    def put(self, name: str, found: dict[str, Any], attempt: str) -> None:
        """Keep what a row found."""
        self.content["rows"][name] = {**found, "attempt": attempt}
        self.content["running"] = None
        self._write()

    def forget(self, name: str) -> None:
        """Drop what is known of a row."""
        if self.content["rows"].pop(name, None) is not None:
            self._write()

    def put_ended(self, reason: str, attempt: str) -> bool:
        """Keep why the process ended in the row that ran. Returns whether there was one."""
        name = self.content["running"]
        if name is not None:
            self.put(name, {"error": reason}, attempt)
        return name is not None

    def _write(self):
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(temporary, self.file)


def outcome(row: Row) -> dict[str, Any]:
    """What a row finds, or why it found nothing."""
    try:
        return row()
    except SkippedError as reason:
        return {"skipped": str(reason)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
