# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of the pages are drawn from the saved results."""

import re

import pytest
from documentation import ROOT
from draw_pictures import drawings

from studies.recipe import differences


DRAWINGS = drawings()


@pytest.mark.parametrize("name", DRAWINGS)
def test_every_picture_can_be_drawn(name, tmp_path, monkeypatch):
    monkeypatch.setattr(differences.below, "__defaults__", (100,))  # draws of an interval
    DRAWINGS[name](tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


def test_the_pictures_of_the_pages_are_these():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]
    shown = {
        str((page.parent / link).resolve().relative_to(ROOT))
        for page in pages
        for link in re.findall(r"!\[[^]]*\]\(([^):]+\.png)\)", page.read_text())
    }
    assert shown == set(DRAWINGS)
