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
"""Pictures drawn of the saved results: nothing is clipped, and a variant has one color and marker in all of them."""

import re
from pathlib import Path

import pytest
from draw_pictures import drawings
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from common.pictures import NEUTRAL, TRAININGS, VARIANTS, look_of
from studies.facts.arms import ARMS as FACTS_ARMS
from studies.stream.arms import ARMS as STREAM_ARMS


ROOT = Path(__file__).parents[2]
DRAWINGS = drawings()

LABELS = {look.label: look for look in VARIANTS.values()}
LABELS |= {arm.label: TRAININGS[name] for arms in (STREAM_ARMS, FACTS_ARMS) for name, arm in arms.items()}


@pytest.fixture(scope="module", params=DRAWINGS)
def figure(request):
    """A picture of the repository, laid out but not saved."""
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, file, **options: drawn.append(figure))
        DRAWINGS[request.param](Path("unused.png"))
    (figure,) = drawn
    figure.draw_without_rendering()
    return figure


def named_looks(figure):
    """The color and marker of each line and bar that a legend names."""
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if hasattr(handle, "get_marker"):
                yield label, to_hex(handle.get_color()), handle.get_marker()
            elif hasattr(handle, "patches"):
                yield label, to_hex(handle.patches[0].get_facecolor()), None


def test_nothing_is_clipped_and_no_titles_overlap(figure):
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(drawn.x0, drawn.y0, width - drawn.x1, height - drawn.y1) > -0.01, drawn
    titles = [axes.title for axes in figure.axes if axes.get_title()]
    for i, first in enumerate(titles):
        for second in titles[:i]:
            assert not first.get_window_extent().overlaps(second.get_window_extent()), first.get_text()


def test_a_variant_has_its_color_and_marker(figure):
    for label, color, marker in named_looks(figure):
        look = LABELS.get(label) or look_of(label.partition(",")[0].replace("PEER", "peer"))
        if look.color != NEUTRAL:
            assert color == look.color.lower(), label
            assert marker in (look.marker, None, "None"), label


def test_the_pictures_of_the_pages_are_these():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]
    shown = {
        str((page.parent / link).resolve().relative_to(ROOT))
        for page in pages
        for link in re.findall(r"!\[[^]]*\]\(([^):]+\.png)\)", page.read_text())
    }
    assert shown == set(DRAWINGS)


@pytest.mark.parametrize("looks", [VARIANTS, TRAININGS])
def test_colors_and_markers_differ(looks):
    assert len({look.color for look in looks.values()}) == len({look.marker for look in looks.values()}) == len(looks)


def test_all_scripts_take_colors_from_one_place():
    own = re.compile(r"""["'](tab:\w+|#[0-9A-Fa-f]{6})["']|f["']C\{|import Figure|subplots\(\)|pyplot""")
    files = {*(ROOT / "examples").rglob("*.py")} - {ROOT / "examples/common/pictures.py"}
    found = {str(file.relative_to(ROOT)): own.findall(file.read_text()) for file in files}
    assert not {name: colors for name, colors in found.items() if colors}
