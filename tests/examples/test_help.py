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
"""What `--help` of the examples prints can be pasted into a shell."""

import ast
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"

SCRIPTS = [file for file in sorted(EXAMPLES.rglob("*.py")) if "parse_arguments(" in file.read_text(encoding="utf-8")]


def help_texts(file):
    """The docstring of a script, which is its description, and what it says of its flags."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    yield ast.get_docstring(tree) or ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "help":
                    yield from (
                        each.value for each in ast.walk(value) if isinstance(getattr(each, "value", None), str)
                    )


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: str(file.relative_to(EXAMPLES)))
def test_lines_go_on_after_one_backslash(file):
    texts = list(help_texts(file))
    assert any(texts) and not [text for text in texts if r"\\" in text]
