# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What tests of studies share: texts, and runs in processes that need not import the libraries."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict
from preloaded import start_python

from studies.common import training_study


TEXTS = {
    name: DatasetDict({split: Dataset.from_list([{"text": words * 300}] * 4) for split in ("train", "validation")})
    for name, words in {"old": "one two three ", "new": "four five six "}.items()
}


def run_preloaded(command, env, output, check=True):
    """What `subprocess.run` does, in a process that need not import the libraries."""
    process = start_python(command[1:], env, output)
    process.join()
    if check and process.exitcode:
        raise subprocess.CalledProcessError(process.exitcode, command, output.read_text())
    return subprocess.CompletedProcess(command, process.exitcode)


def make_study(module, folder, plan):
    """
    Makes a study of [`TrainingStudy`], and yields its folder and a function that goes on with it, with further flags.

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
            named = ["--plan", str(folder / "plan.json"), "--output_dir", str(folder)]
            patch.setattr(sys, "argv", [module.__name__, *named, *flags])
            module.main()

    def run_here(command, env, stdout=None, stderr=None, check=False):
        return run_preloaded(command, env, folder / "seconds.log" if stdout is None else Path(stdout.name), check)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_study, "subprocess", SimpleNamespace(run=run_here))
        main()
        yield folder, main
