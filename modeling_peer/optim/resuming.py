# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Resuming a training that was killed, also while it saved a checkpoint."""

import json
import re
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..arguments.check_types import check_types


@check_types
def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """
    Find the newest checkpoint of a `Trainer` that was saved to its end, to resume from.

    `Trainer.train(resume_from_checkpoint=True)` takes the newest checkpoint even if the process was killed while it
    saved, and then fails for what is missing. `Trainer` writes `trainer_state.json` last, so a checkpoint is complete
    if that is there and whole. Processes other than the first may not have saved their random state by then; `Trainer`
    logs this when it resumes.

    Args:
        output_dir (`str` or `Path`): The `output_dir` of the `TrainingArguments`; it need not exist.

    Returns:
        `str`: path of the checkpoint. `None` if there is no complete one: `Trainer.train` then starts from scratch.
    """
    folders = {
        int(match[1]): folder
        for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name))
    }
    newest_first = (folders[step] for step in sorted(folders, reverse=True))
    return next((str(folder) for folder in newest_first if _is_complete(folder)), None)


def _is_complete(checkpoint):
    from transformers.trainer import TRAINER_STATE_NAME  # here, as `Trainer` takes long to import

    try:
        return isinstance(json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):  # not there, or cut off
        return False
