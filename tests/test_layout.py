# Copyright 2026 The PEER for Transformers authors.
# SPDX-License-Identifier: Apache-2.0
"""
The folder tree is the architecture: flat files are what a checkpoint carries, folders are what works on models, and
imports go one way.
"""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "modeling_peer"

# Each imports only what is before it.
ORDER = [
    *("configuration_peer", "experts", "router", "feed_forward", "modeling_peer", "graft_layer", "fact_graft"),
    *(
        "graft_merged",
        "arguments",
        "memory",
        "ops",
        "quantization",
        "optim",
        "parallel",
        "graft",
        "analysis",
        "continual",
        "facts",
    ),
    *("serving", "configurations"),
]
LONGEST_CHAIN = 12

FLAT = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__"}
FOLDERS = {file.parent.name for file in PACKAGE.glob("*/*.py")}


def name_of(file: Path) -> str:
    """Such as `router`, `ops.kernels` or, of a folder's `__init__.py`, `ops`."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(file: Path, names: set[str]) -> set[str]:
    """Which `names` of modules a file of the package imports, in functions too; `""` is the package itself."""
    package = file.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = [*package[: len(package) - node.level + 1], *([node.module] if node.module else [])]
        elif isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "modeling_peer":
            start = node.module.split(".")[1:]
        else:
            if isinstance(node, ast.Import) and any(a.name.partition(".")[0] == "modeling_peer" for a in node.names):
                found.add("")
            continue
        for alias in node.names:
            module = ".".join([*start, alias.name])
            found.add(module if module in names else ".".join(start))
    return found


def arrows(with_init: bool) -> dict[str, set[str]]:
    """What each file imports of the others, with or without every `__init__.py`."""
    files = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"}
    files = {name: file for name, file in files.items() if with_init or file.name != "__init__.py"}
    return {name: imports_of(file, set(files)) - {name} for name, file in files.items()}


def part(name: str) -> str:
    return name.partition(".")[0]


def arrows_between_parts(with_init: bool) -> dict[str, set[str]]:
    """The same with every folder counted as one file."""
    found: dict[str, set[str]] = {}
    for name, targets in arrows(with_init).items():
        found.setdefault(part(name), set()).update({part(each) for each in targets} - {part(name)})
    return found


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """The longest way along arrows. Raises `ValueError` for a circle."""
    found: dict[str, list[str]] = {}

    def visit(name, path):
        if name in path:
            raise ValueError(f"These import each other: {' -> '.join([*path, name])}")
        if name not in found:
            ways = [visit(each, (*path, name)) for each in sorted(graph[name] & graph.keys())]
            found[name] = [name, *max(ways, key=len, default=[])]
        return found[name]

    return max((visit(name, ()) for name in graph), key=len)


def test_imports_go_one_way():
    graph = arrows_between_parts(with_init=True)
    assert set(graph) == set(ORDER) == FLAT | FOLDERS
    upwards = {
        name: back
        for place, name in enumerate(ORDER)
        if (back := graph[name] - set(ORDER[:place]))  # the package itself is above all
    }
    assert not upwards


def test_no_files_import_each_other():
    longest_chain(arrows(with_init=True))


def test_chains_of_imports_are_short():
    chain = longest_chain(arrows_between_parts(with_init=False))
    assert len(chain) <= LONGEST_CHAIN, " -> ".join(chain)


def test_flat_files_are_what_checkpoints_carry(tmp_path):
    """One of a PEER model the core, one with merged grafts the layer of grafts besides."""
    from graft_models import grafted
    from tiny_models import tiny_config

    from modeling_peer import PeerForCausalLM

    PeerForCausalLM(tiny_config()).save_pretrained(tmp_path / "model")
    grafted().merge_and_unload().save_pretrained(tmp_path / "merged")
    model, merged = ({file.stem for file in (tmp_path / name).glob("*.py")} for name in ("model", "merged"))
    assert model == set(ORDER[:5])
    assert {"graft_layer", "fact_graft", "graft_merged"} <= merged <= FLAT == model | merged


@pytest.mark.parametrize("folder", ["modeling_peer", "examples", "tests"])
def test_files_are_short(folder):
    texts = {file.relative_to(ROOT): file.read_text().splitlines() for file in (ROOT / folder).rglob("*.py")}
    assert not {str(file): len(lines) for file, lines in texts.items() if len(lines) > 600}
    wide = [f"{file}:{i}" for file, lines in texts.items() for i, line in enumerate(lines, 1) if len(line) > 119]
    assert folder != "modeling_peer" or not wide


def test_contributing_names_every_folder():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert not [name for name in sorted(FOLDERS) if not re.search(rf"`(modeling_peer/)?{name}/?`", text)]


def test_citation_is_of_this_release():
    version = re.search(r'__version__ = "(.*)"', (PACKAGE / "__init__.py").read_text())[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
