# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""What the pages name and link to exists: files, headings, pictures, tests, fields and their defaults."""

import re

import pytest
from documentation import PAGES, ROOT, STUDY_PAGES, name_of, prose
from teach_domain import DomainTrainingArguments, TeachingArguments

from modeling_peer import PeerConfig, configuration_path


SOURCES = "\n".join(file.read_text() for file in (ROOT / "modeling_peer").rglob("*.py"))
DEFINED = set(re.findall(r"^(?:class|def) (\w+)", SOURCES, flags=re.M))
FIELDS = set(PeerConfig(num_hidden_layers=3).to_dict()) | {"num_trained_experts"}

ALL_PAGES = [*PAGES, *STUDY_PAGES]

every_page = pytest.mark.parametrize("page", ALL_PAGES, ids=map(name_of, ALL_PAGES))


def anchors_of(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_what_a_page_names_exists(page):
    """What it links to; files; classes that only this package could have, and functions such as `add_experts(…)`."""
    text = prose(page)
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link
    for span in re.findall(r"`([^`\n]+)`", text):
        if re.match(r"(modeling_peer|examples|tests|docs|configuration|model_cards)/[\w./-]*$", span):
            assert (ROOT / span).exists(), span
        elif re.fullmatch(r"\w+\.py", span):
            assert any(any((ROOT / folder).rglob(span)) for folder in ("tests", "modeling_peer", "examples")), span
    names = re.findall(r"`((?:Peer|Expert|RowAdamW|SparseFine|FeedForwardInter|ProductKey)\w*)[`(.]", text)
    names += re.findall(r"`([a-z]+(?:_[a-z]+)*_experts(?:_only)?)[`(]", text)
    assert set(names) <= DEFINED | FIELDS


def test_options_and_their_defaults():
    page = (ROOT / "docs/layer-and-options.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \| ([^|]*?) ?\| [^|]* \|$", page, flags=re.M)
    config, recipe = PeerConfig(num_hidden_layers=3), PeerConfig.from_pretrained(configuration_path("peer-toy"))
    assert {"num_experts", "query_norm", "expert_kernels"} <= {name for name, *_ in rows}
    for name, default, recommended in rows:
        for model, shown in ((config, default), (recipe, recommended or default)):
            value = shown.strip("`").replace("²", "**2").replace("d /", "model.hidden_size //")
            assert getattr(model, name) == eval(value), name


def test_flags_and_their_defaults():
    """Of the script that teaches a domain."""
    rows = re.findall(r"^\| `--(\w+)` \| ([\d.,]+) \|", (ROOT / "docs/teach-a-model.md").read_text(), flags=re.M)
    assert len(rows) > 3
    fields = TeachingArguments.__dataclass_fields__ | DomainTrainingArguments.__dataclass_fields__
    assert {name: float(shown.replace(",", "")) for name, shown in rows} == {
        name: fields[name].default for name, _ in rows
    }


def test_the_lowest_releases_are_those_of_the_project():
    """Of pyproject.toml, which pip reads, and of the constraints of `./run tests --lowest`."""
    project, constraints, *pages = (
        (ROOT / name).read_text()
        for name in ("pyproject.toml", "tests/lowest-releases.txt", "README.md", "docs/compatibility.md")
    )
    for name in ("transformers", "torch", "peft"):
        lowest = re.search(rf'"{name}>=([\d.]+)', project)[1]
        assert re.search(rf"^{name}=={re.escape(lowest)}(\.0)?$", constraints, flags=re.M), name
        assert all(re.search(rf"{name}[ |]+{re.escape(lowest)}\b", page, flags=re.I) for page in pages), name
