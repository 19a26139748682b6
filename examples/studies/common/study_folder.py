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
"""The folder of a study, which can be resumed: one study owns it, and each of its files is complete or absent."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


# What may differ from call to call: it changes which runs are made, not what comes of them.
FREE_ARGUMENTS = ("output_dir", "arms", "seeds")


def claim_folder(folder: Path, arguments: dict[str, Any]) -> None:
    """
    Makes the folder of a study, or goes on with it.

    Args:
        folder (`Path`)
        arguments (`dict[str, Any]`): The study's, kept in `arguments.json`.

    Raises:
        `ValueError`: if it holds a study with other arguments.
    """
    arguments = {name: value for name, value in arguments.items() if name not in FREE_ARGUMENTS}
    file = folder / "arguments.json"
    if file.exists():
        before = json.loads(file.read_text())
        changed = {name for name in arguments.keys() | before.keys() if arguments.get(name) != before.get(name)}
        if changed:
            raise ValueError(
                f"{folder} holds a study with other arguments: "
                + ", ".join(f"{name} was {before.get(name)}, got {arguments.get(name)}" for name in sorted(changed))
                + ". Choose another --output_dir, or remove it."
            )
        return
    write_json(file, arguments)


def write_json(file: Path, content: Any) -> None:
    """Writes a file that is there whole or not at all."""
    write_text(file, json.dumps(content, indent=1))


def write_text(file: Path, content: str) -> None:
    """Writes a file that is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.unfinished-{os.getpid()}")
    unfinished.write_text(content)
    unfinished.rename(file)


def read_json(file: Path) -> Any:
    """What is in a file of [`write_json`]."""
    return json.loads(file.read_text())


def saved_run(folder: Path, label: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """
    What came of a run, made or read.

    Args:
        folder (`Path`): Holds a file for each run.
        label (`dict[str, Any]`): The run's `arm`, `settings` and `seed`, which name its file and stand in it.
        make (`Callable`): Makes the run and returns what else is to be kept.
    """
    settings = (f"{key}={value:g}" for key, value in label["settings"].items())
    file = folder / ("-".join([label["arm"], *settings, f"seed={label['seed']}"]) + ".json")
    if not file.exists():
        start = time.time()
        write_json(file, {**label, **make(), "seconds": time.time() - start})
    return read_json(file)
