# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""The rows of a part: what is checked or measured one after the other, and the file that keeps what was found."""

import itertools
import json
import os
import time
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
    One of other conditions, such as another GPU, is kept under another name.

    Args:
        file (`Path`)
        conditions (`dict`): What results depend on.
    """

    def __init__(self, file: Path, conditions: dict[str, Any]):
        self.file = file
        conditions = json.loads(json.dumps(conditions))
        self.content = {"conditions": conditions, "running": None, "rows": {}}
        if file.is_file():
            found = json.loads(file.read_text())
            differing = [key for key in conditions if conditions[key] != found["conditions"].get(key)]
            if not differing:
                self.content = found
                return
            others = (file.with_suffix(f".{number}.json") for number in itertools.count(1))
            kept = next(other for other in others if not other.exists())
            file.rename(kept)
            print(f"{file} is of a run with other {differing}: it is kept as {kept.name}, and the part begins anew.")

    def is_finished(self, name: str) -> bool:
        """Whether a row has a result. One that failed or was skipped has none: it runs again."""
        row = self.content["rows"].get(name)
        return row is not None and not {"error", "skipped"} & row.keys() and row.get("passed", True)

    def is_due(self, name: str, attempt: str, again: bool) -> bool:
        """Whether a row is to run: one that never did or, if `again`, one without a result of an earlier attempt."""
        row = self.content["rows"].get(name)
        return row is None or (again and not self.is_finished(name) and row["attempt"] != attempt)

    def seconds(self) -> float:
        """Seconds that all rows took."""
        return sum(row.get("took", 0.0) for row in self.content["rows"].values())

    def start(self, name: str) -> None:
        """Note that a row runs, for the case that the process ends in it."""
        self.content |= {"running": name, "since": time.time()}
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
            self.put(name, {"error": reason, "took": time.time() - self.content["since"]}, attempt)
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
