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
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "run_pages.py")],
        input=json.dumps(PAGES_WITH_CODE),
        cwd=folder,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("page", PAGES_WITH_CODE)
def test_python_blocks_run_from_top_to_bottom(results, page):
    if not is_at_least(needed := NEEDED_RELEASES.get(page, "5.0")):
        pytest.skip(f"The page shows what needs Transformers {needed}.")
    result = results[page]
    assert result["error"] is None, result["error"]
    printed, code = "".join(result["outputs"]), "".join(code for _, code in PAGES_WITH_CODE[page])
    assert printed.count("True") >= code.count("# True") and "False" not in printed.splitlines()
