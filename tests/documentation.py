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
"""The pages of the documentation, for the tests that hold what they say."""

import re
from pathlib import Path


ROOT = Path(__file__).parents[1]

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# Pages of studies, which have their own tests for figures; their commands and links are held with all others.
STUDY_PAGES = sorted((ROOT / "examples").rglob("*.md"))


def name_of(page: Path) -> str:
    """What a page is called in the names of tests."""
    return str(page.relative_to(ROOT))


def code_blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language, each with the number of its first line of code."""
    text = page.read_text()
    return [
        (text[: found.start(1)].count("\n") + 1, found[1])
        for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
