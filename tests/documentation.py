# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
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


def numbers(text: str) -> list[str]:
    """The numbers in a text, without signs."""
    return re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e\d+)?", text)


def numbers_of_blocks(page: Path) -> list[list[str]]:
    """Those of each paragraph, list and row of a table."""
    return [numbers(block) for block in re.split(r"\n\s*\n|\n(?=\|)", page.read_text())]


def fixed(digits: int, *values: float) -> list[str]:
    """Numbers as pages write them, whose signs are of the words."""
    return [f"{abs(value):,.{digits}f}" for value in values]


def percent(*values: float, digits: int = 1) -> list[str]:
    """Shares as pages write them."""
    return fixed(digits, *(100 * value for value in values))
