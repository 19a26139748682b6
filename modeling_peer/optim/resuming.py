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
"""Resuming a training that was killed, also while it saved a checkpoint."""

import json
import re
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """
    Find the newest checkpoint of a `Trainer` that was saved to its end, to resume from.

    `Trainer.train(resume_from_checkpoint=True)` and `get_last_checkpoint` of Transformers take the newest checkpoint
    even if the process was killed while it saved, and then fail for what is missing. `Trainer` writes
    `trainer_state.json` last, so a checkpoint is complete if that is there and whole. One that was being written over
    a complete checkpoint of the same step cannot be told from it, but a training that resumes from the newest one
    writes over none. Other processes than the first may not have saved their random state by then, which `Trainer`
    logs when it resumes.

    Args:
        output_dir (`str` or `Path`): The `output_dir` of the `TrainingArguments`; it need not exist.

    Returns:
        `str`: path of the checkpoint, `None` if there is no complete one, with which `Trainer.train` starts afresh.

    ```python
    >>> trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))
    ```
    """
    folders = {
        int(match[1]): folder
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name))
    }
    for step in sorted(folders, reverse=True):
        if _is_complete(folders[step]):
            return str(folders[step])
    return None


def _is_complete(checkpoint):
    from transformers.trainer import TRAINER_STATE_NAME  # here, as `Trainer` takes long to import

    try:
        return isinstance(json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):  # not there, or cut off
        return False


__all__ = ["last_complete_checkpoint"]
