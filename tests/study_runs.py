# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What tests of studies that train models share: texts, and runs in processes that need not import the libraries."""

import json
import sys

import pytest
from datasets import Dataset, DatasetDict
from main_runs import run_main
from preloaded import python

from studies.common import training_study


TEXTS = {
    name: DatasetDict({split: Dataset.from_list([{"text": words * 300}] * 4) for split in ("train", "validation")})
    for name, words in {"old": "one two three ", "new": "four five six "}.items()
}


def make_study(module, folder, plan):
    """
    Makes a study of [`TrainingStudy`], and returns its folder and a function that goes on with it, with further flags.

    Args:
        module: The `__main__` of the study.
        folder (`Path`): Its folder, with the plan in `plan.json`.
        plan (`dict`): Its plan, whose texts are those of `TEXTS`.
    """
    folder.mkdir(exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(plan))

    def main(*flags):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training_study, "load_corpus", TEXTS.get)
            patch.setattr(sys, "executable", python())  # of the processes of runs
            run_main(module, "--plan", folder / "plan.json", "--output_dir", folder, *flags)

    main()
    return folder, main
