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

from modeling_peer.library_releases import is_at_least


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
    if not is_at_least("Transformers", needed := NEEDED_RELEASES.get(page, "5.0")):
        pytest.skip(f"The page shows what needs Transformers {needed}.")
    result = results[page]
    assert result["error"] is None, result["error"]
    blocks = PAGES_WITH_CODE[page]
    assert len(result["outputs"]) == len(blocks)
    silent = [line for (line, _), output in zip(blocks, result["outputs"], strict=True) if not output.strip()]
    assert not silent, f"{page}: the blocks at lines {silent} print nothing"


def test_pages_say_what_they_print(results):
    """Where a comment says that a line prints True or zero, it does."""
    outputs = {page: "".join(result["outputs"]) for page, result in results.items()}
    assert "deviation=0.0" in outputs["docs/continual-learning.md"]
    for page, number in (
        ("docs/continual-learning.md", 1),
        ("docs/checkpoints.md", 3),
        ("docs/grafts.md", 2),
        ("docs/serving.md", 2),
        ("docs/teach-a-domain.md", 1),
        ("docs/training.md", 1),
    ):
        assert outputs[page].count("True") == number, outputs[page]
        assert "False" not in outputs[page]
