# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
Runs the Python blocks of pages that it reads as JSON from its input, and prints what came of them as JSON. Each page runs in
a folder of its own, in which there is nothing but the examples of the clone.
"""

import contextlib
import gc
import io
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path


EXAMPLES = Path(__file__).parents[1] / "examples"


def run_page(page: str, blocks: list) -> dict:
    """The blocks of a page in one namespace, from top to bottom: what each printed, and the error that stopped them."""
    namespace, outputs = {"__name__": "__main__"}, []
    for line, code in blocks:
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output):
                exec(compile("\n" * (line - 1) + code, page, "exec"), namespace)
        except BaseException:
            return {"outputs": outputs, "error": traceback.format_exc()}
        outputs.append(output.getvalue())
    return {"outputs": outputs, "error": None}


def main():
    pages = json.load(sys.stdin)
    # What takes seconds to import is imported once; each page runs in a process of its own, which has only that.
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers.trainer  # noqa: F401

    gc.freeze()  # `Trainer` collects garbage, which takes long where all libraries are looked through
    results = {}
    for page, blocks in pages.items():
        with tempfile.TemporaryDirectory() as folder:
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                gc.freeze()  # `Trainer` collects garbage, which takes long where all libraries are looked through
                os.chdir(folder)
                os.symlink(EXAMPLES, EXAMPLES.name)
                with os.fdopen(writer, "w") as pipe:
                    json.dump(run_page(page, blocks), pipe)
                os._exit(0)
            os.close(writer)
            with os.fdopen(reader) as pipe:
                answer = pipe.read()
            os.waitpid(child, 0)
            results[page] = json.loads(answer) if answer else {"outputs": [], "error": "the process died"}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
