# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the pages show works when pasted.

The Python blocks of a page run in one process and namespace, from top to bottom, as in a clone: a page is read from the
top, and its later blocks go on with what earlier ones made. Pages do not depend on each other.
"""

import json
import os
import subprocess
import sys

import pytest
from documentation import PAGES, ROOT, code_blocks, name_of
from release_names import is_at_least


PAGES_WITH_CODE = {name_of(page): code_blocks(page, "python") for page in PAGES if code_blocks(page, "python")}

# The releases of Transformers that pages need, as they say.
NEEDED_RELEASES = {"docs/training-on-many-gpus.md": "5.24"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which each page, by its place among them, has run."""
    folder = tmp_path_factory.mktemp("pages")
    own = {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, ROOT / "tests" / "run_pages.py"],
        input=json.dumps(PAGES_WITH_CODE),
        cwd=folder,
        env={"PATH": os.environ["PATH"], **own},
        text=True,
        timeout=500,
        check=True,
    )
    return folder


@pytest.mark.parametrize("page", PAGES_WITH_CODE)
def test_python_blocks_run_from_top_to_bottom(folder, page):
    if not is_at_least(needed := NEEDED_RELEASES.get(page, "5.0")):
        pytest.skip(f"The page shows what needs Transformers {needed}.")
    files = (folder / str([*PAGES_WITH_CODE].index(page)) / name for name in ("code", "printed", "errors"))
    exit_code, printed, errors = (file.read_text() for file in files)
    assert exit_code == "0", errors[-3000:]
    code = "".join(code for _, code in PAGES_WITH_CODE[page])
    assert printed.count("True") >= code.count("# True") and "False" not in printed.splitlines()
