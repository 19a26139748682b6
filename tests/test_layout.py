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
"""The folder tree is the architecture: flat files are what a checkpoint carries, folders are what works on models."""

import ast
import re
from pathlib import Path

import pytest
from tiny_models import tiny_config

from modeling_peer import PeerForCausalLM, __version__


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "modeling_peer"

FLAT = {file.name for file in PACKAGE.glob("*.py")}
FOLDERS = {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()}

# The package's own door, and what finds `configuration/` by the place where it lies.
NOT_CARRIED = {"__init__.py", "named_configurations.py"}


def imports_of(file: Path) -> set[str]:
    """What a file of the package imports from the package: names such as `key_grid` or `optim.row_adamw`."""
    package = file.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = package[: len(package) - node.level + 1]
            found.add(".".join([*start, *([node.module] if node.module else [])]))
    return found


def code_in(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("*.py")}


def test_a_checkpoint_carries_the_flat_files_and_no_others(tmp_path):
    PeerForCausalLM(tiny_config()).save_pretrained(tmp_path / "model")
    carried = code_in(tmp_path / "model")
    assert carried <= FLAT - NOT_CARRIED
    rest = FLAT - NOT_CARRIED - carried
    assert rest and all(name.startswith("graft_") for name in rest), rest


def test_a_merged_graft_carries_the_rest_of_them(tmp_path):
    from graft_models import grafted

    PeerForCausalLM(tiny_config()).save_pretrained(tmp_path / "model")
    grafted().merge_and_unload().save_pretrained(tmp_path / "merged")
    assert code_in(tmp_path / "model") | code_in(tmp_path / "merged") == FLAT - NOT_CARRIED


@pytest.mark.parametrize("name", sorted(FLAT - {"__init__.py"}))
def test_no_flat_file_imports_a_folder(name):
    assert not {each.partition(".")[0] for each in imports_of(PACKAGE / name)} & FOLDERS


def test_the_configuration_imports_nothing_that_it_configures():
    reached, ahead = set(), ["configuration_peer"]
    while ahead:
        name = ahead.pop()
        reached.add(name)
        ahead += imports_of(PACKAGE / f"{name}.py") - reached
    assert reached == {"configuration_peer", "expert_additions", "key_grid", "library_releases"}


def test_imports_go_one_way():
    files = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
    arrows = {name: {each for each in imports_of(file) if each in files} for name, file in files.items()}
    done: list[str] = []

    def visit(name, path=()):
        assert name not in path, f"{' -> '.join([*path, name])}: these import each other"
        if name not in done:
            for each in arrows[name]:
                visit(each, (*path, name))
            done.append(name)

    for name in arrows:
        visit(name)
    order = {"optim": set(), "analysis": set(), "continual": {"optim", "analysis"}, "graft": set()}
    order |= {"explorer": {"analysis"}, "serving": set()}
    assert set(order) == FOLDERS
    for folder, below in order.items():
        for name, targets in arrows.items():
            if name.startswith(f"{folder}."):
                others = {each.partition(".")[0] for each in targets} & FOLDERS
                assert others <= below | {folder}, name


def test_contributing_names_every_file():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text[text.index("## Where things are") : text.index("## What a change needs")]
    named = set(re.findall(r"`([\w./-]+)`", table))
    tree = {str(file.relative_to(ROOT)) for file in PACKAGE.rglob("*.py") if file.name != "__init__.py"}
    missing = {path for path in named if "/" in path and not (ROOT / path).exists()}
    assert not missing, f"CONTRIBUTING.md names what is not there: {sorted(missing)}"
    assert tree <= named, f"CONTRIBUTING.md does not say what is in {sorted(tree - named)}"


def test_tests_mirror_the_package():
    folders = {folder.name for folder in (ROOT / "tests").iterdir() if any(folder.glob("test_*.py"))}
    assert folders == FOLDERS | {
        *("model", "kernels", "examples", "studies", "benchmark", "gpu", "docs", "distributed")
    }


@pytest.mark.parametrize("folder", ["modeling_peer", "examples", "tests"])
def test_no_file_is_longer_than_600_lines(folder):
    lengths = {file: len(file.read_text().splitlines()) for file in (ROOT / folder).rglob("*.py")}
    assert not {str(file.relative_to(ROOT)): length for file, length in lengths.items() if length > 600}


def test_citation_is_of_this_release():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_no_line_of_the_package_is_longer_than_119_columns():
    long = {
        f"{file.relative_to(ROOT)}:{number}"
        for file in PACKAGE.rglob("*.py")
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if len(line) > 119
    }
    assert not long
