# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Runs the Python blocks of pages that it reads as JSON from its input, in its working directory. Each page gets a folder, by
its place among them, in which there is nothing but the examples of the clone, and then what it printed and its errors.
"""

import gc
import json
import multiprocessing
import os
import sys
from pathlib import Path


EXAMPLES = Path(__file__).parents[1] / "examples"


def run_page(folder: str, page: str, blocks: list) -> None:
    """The blocks of a page in one namespace, from top to bottom."""
    os.mkdir(folder)
    os.chdir(folder)
    for descriptor, name in ((1, "printed"), (2, "errors")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.symlink(EXAMPLES, EXAMPLES.name)
    namespace = {"__name__": "__main__"}
    for line, code in blocks:
        exec(compile("\n" * (line - 1) + code, page, "exec"), namespace)


def main():
    pages = json.load(sys.stdin)
    # What takes seconds to import is imported once; each page runs in a process of its own, which has only that.
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers.trainer  # noqa: F401

    gc.freeze()  # `Trainer` collects garbage, which takes long where all libraries are looked through
    for place, (page, blocks) in enumerate(pages.items()):
        process = multiprocessing.get_context("fork").Process(target=run_page, args=(str(place), page, blocks))
        process.start()
        process.join()
        Path(str(place), "code").write_text(str(process.exitcode))


if __name__ == "__main__":
    main()
